"""`Engine`: its step, what it does before the first one, and what it accepts, reports, undoes and checks."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain

import torch

from loray.bases.registry import BaseModel
from loray.bases.weights import WeightSource
from loray.engine.memory.adapter_manager import AdapterManager, Placement, Tier
from loray.engine.memory.limits import check_length, max_model_len, tokens_of_a_request
from loray.engine.memory.prefix_cache import HostTier
from loray.engine.metrics import Counters, EngineStats
from loray.engine.model.decoder import Decoder
from loray.engine.parallel.worker import RankWorkers
from loray.engine.pool.loader import AdapterLoads, LoadAdapter
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.engine.pool.pool import Pool, ResidentAdapter
from loray.engine.request import Chunk, Request, RequestState, TokenOutput
from loray.engine.runner import ModelRunner, StepResults
from loray.engine.sampling.grammar import Grammars
from loray.engine.sampling.pooling import embedding_of
from loray.engine.sampling.sampler import Sampler
from loray.engine.scheduling.fairness import token_weight
from loray.engine.scheduling.scheduler import Scheduler
from loray.engine.scheduling.speculation import Speculation
from loray.engine.scheduling.waiting import WaitLimits
from loray.errors import EngineError, IntegrityError, RequestError
from loray.priority import ForegroundTime
from loray.spec import AdapterBytes, AdapterRef, FinishReason, GenerateRequest, SamplingParams, ServeSpec, TokenLogprobs
from loray.telemetry import get_logger
from loray_kernels import CaptureLimits, CaptureState
from loray_kernels.memory import is_out_of_memory

_log = get_logger(__name__)

_PROGRESS_S = 5.0  # between two lines of the log


def warm_up(model: Decoder, pool: Pool, spec: ServeSpec) -> CaptureState | None:
    """Compile kernels and capture decode steps; None where the backend captures none. A further call changes nothing.

    `pool` is empty; the keys and values of its first blocks are written, which nobody reads. It runs in the thread that
    steps, since cuBLAS has a handle and workspaces for each thread.
    """
    if not model.can_capture or model.capture_state is not None:
        return model.capture_state
    began = time.monotonic()
    for prompts in _prompts(pool, min(spec.max_num_batched_tokens, model.config.max_position_embeddings)):
        batch = model.batch(prompts, lambda chunk: None, pool)
        assert batch is not None
        model.forward(batch, pool)
    model.compile_adapters(pool)
    _log.info("steps with prompts are compiled, %.1f s", time.monotonic() - began)
    shown = time.monotonic()

    def show(progress: CaptureState) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _PROGRESS_S:
            shown = time.monotonic()
            _log.info("recording decode steps: %s", _text(progress))

    captured = model.capture(CaptureLimits(spec.graph_seconds, spec.graph_bytes), show)
    assert captured is not None
    _log.info("recorded decode steps: %s", _text(captured))
    if captured.num_captured < captured.num_wanted:
        _log.warning(
            "%d kinds of decode steps are not recorded (graph_record_s %g, graph_bytes %d); they are padded to larger "
            "ones, or are computed launch by launch",
            captured.num_wanted - captured.num_captured,
            spec.graph_seconds,
            spec.graph_bytes,
        )
    return captured


def _text(r: CaptureState) -> str:
    return f"{r.num_captured} of {r.num_wanted}, {r.seconds:.1f} s, {r.num_bytes / 2**20:.0f} MiB"


def _prompts(pool: Pool, max_tokens: int) -> list[list[Chunk]]:
    """Make steps of one prompt and of several: Triton compiles numbers that are 1 or multiples of 16 apart."""
    geometry = pool.geometry
    longest = min(max_tokens, geometry.num_blocks * geometry.block_tokens)
    steps = []
    for lengths in ((longest,), (longest // 4 * 2 + 1, longest // 4), (17, 2, 2)):
        step: list[Chunk] = []
        block = 0
        for i, length in enumerate(n for n in lengths if n > 1):
            request = Request(GenerateRequest(str(i), (0,) * length, SamplingParams(max_tokens=1)), i)
            num_blocks = geometry.blocks_for_tokens(length)
            request.blocks = list(range(block, block + num_blocks))
            block += num_blocks
            step.append(Chunk(request, 0, length))
        if step and block <= geometry.num_blocks:
            steps.append(step)
    return steps


def check_request(request: GenerateRequest, base: BaseModel, *, max_model_len: int) -> None:
    """Raise for a request that could never run on `base`: RequestError, ContextLengthExceeded, BaseMismatch."""
    adapter, vocab = request.adapter, base.config.vocab_size
    if adapter is not None:
        adapter.check_base(base.name, base.fingerprint, base.of)
    if not request.prompt_ids:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab:
        raise RequestError(f"a token id is outside the vocabulary of {vocab}", param="prompt")
    params = request.params
    if request.pooling is not None:
        if params.max_tokens or request.output_ids:
            raise RequestError("an embedding has no answer; give max_tokens 0 with `pooling`", param="max_tokens")
        if params.prompt_logprobs is not None or params.structured is not None:
            raise RequestError("an embedding has neither prompt_logprobs nor a constraint; leave them out")
    if not all(0 <= t < vocab for t in request.output_ids):
        raise RequestError(f"output_ids: a token id is outside the vocabulary of {vocab}", param="output_ids")
    if request.output_ids and len(request.output_ids) >= params.max_tokens:
        raise RequestError(
            f"the answer has {len(request.output_ids)} tokens and max_tokens is {params.max_tokens}; there is nothing "
            "to go on with",
            param="output_ids",
        )
    for param, ids in {
        "logit_bias": params.logit_bias,
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words": chain.from_iterable(params.bad_words),
        "thinking": () if params.thinking is None else (params.thinking.start_id, params.thinking.end_id),
    }.items():
        if not all(0 <= t < vocab for t in ids):
            raise RequestError(f"{param}: a token id is outside the vocabulary of {vocab}", param=param)
    num_prompt_tokens = len(request.prompt_ids)
    param = "max_tokens" if num_prompt_tokens < max_model_len else "prompt"
    check_length(max_model_len, num_prompt_tokens, request.params.max_tokens, param=param)


class Engine:
    """An engine is called from one thread. Loader threads call `wake` when a load has a result.

    Only that thread may use `pool`, `adapter_manager` and `scheduler`; see AsyncEngine.call.
    """

    def __init__(
        self,
        spec: ServeSpec,
        base: BaseModel,
        model: Decoder,
        pool: Pool,
        load: LoadAdapter,
        workers: RankWorkers | None = None,
    ) -> None:
        self.spec, self.base = spec, base
        self.wake: Callable[[], None] = lambda: None
        self._model, self.pool, self._workers = model, pool, workers
        self._grammars = Grammars(base, lambda: self.wake(), on_gpu=pool.tensor.is_cuda)
        packer = Packer(
            pool.geometry,
            pool.tensor.dtype,
            model.embedding_VD,
            WeightSource(base.path, base.config),
            base.config.fused,
            pinned=pool.tensor.is_cuda,
        )
        self._loads = AdapterLoads(pool, packer, load, model.rope.prepare)
        self.adapter_manager: AdapterManager[PackedAdapter, ResidentAdapter] = AdapterManager(
            host_bytes=spec.host_bytes,
            load=self._loads.start,
            place=pool.place,
            remove=pool.remove,
            size=pool.size_of,
            copy_is_done=pool.copy_is_done,
            on_forget=self._loads.forget,
            wake=lambda: self.wake(),
        )
        self.scheduler: Scheduler[PackedAdapter, ResidentAdapter] = Scheduler(
            allocator=pool.allocator,
            adapter_manager=self.adapter_manager,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            wait_limits=WaitLimits(spec.max_queued, spec.max_loading, spec.load_timeout_s),
            adapter_blocks=self._adapter_blocks,
            token_weight=self._token_weight,
            itl_slo_s=spec.itl_slo_s,
            ttft_slo_s=spec.ttft_slo_s,
            background_slack=spec.background_slack,
            enable_prefix_caching=spec.enable_prefix_caching,
            places_ahead=pool.tensor.is_cuda,
            window=base.config.window,
        )
        pool.on_kv_moved = self.scheduler.moved
        if pool.tensor.is_cuda and workers is None:  # on a CPU the pool is host memory itself
            tier = HostTier(self.adapter_manager.host, pool.copies, lambda: self.wake())
            self.scheduler.prefix_cache.host = tier
        self._requests: dict[str, Request] = {}
        self._retired: set[str] = set()  # digests that requests still use
        self.counters = Counters()
        self._runner = ModelRunner(
            model,
            pool,
            Sampler(model.ops, base.config.eos_token_ids),
            self._grammars,
            self.counters,
            resident=self._resident,
            observe=self.scheduler.step_time.observe,
        )
        self.idle = True  # the last step had nothing to compute
        self.foreground: ForegroundTime | None = None  # is told of steps with requests in the foreground

    def warm_up(self) -> CaptureState | None:
        """Compile kernels and capture decode steps. In the thread that steps, before the first step."""
        return warm_up(self._model, self.pool, self.spec)

    def guess_tokens(self) -> None:
        """Guess tokens from now on, see `Speculation`. A captured step has one token a request, so not where steps are
        captured: each with guesses would be computed launch by launch. Nor where what is beside a token changes its
        bits: with guesses there might be another token.
        """
        self.scheduler.speculation = Speculation(self.scheduler.step_time, self._grammars.allowed)

    def max_model_len(self, adapter: AdapterRef | None) -> int:
        """Count the tokens of prompt and output that a request may have: the model's, the spec's and the pool's limit.

        The pool's limit is what the adapter leaves.
        """
        geometry, own = self.pool.geometry, 0 if adapter is None else self._loads.expected_blocks(adapter)
        context = adapter.context_length if adapter is not None else self.base.config.max_position_embeddings
        limit = tokens_of_a_request(self.base.config, geometry, geometry.num_blocks - own)
        return max_model_len(self.spec, context, limit)

    def adapter_bytes(self, adapter: AdapterRef) -> AdapterBytes:
        """Count the bytes that an adapter takes in the pool; its published size until it is loaded. From any thread."""
        return self._loads.nbytes(adapter.digest) or AdapterBytes(adapter.nbytes)

    def check(self, request: GenerateRequest) -> None:
        """Raise for a request that could never run: RequestError, ContextLengthExceeded, BaseMismatch."""
        check_request(request, self.base, max_model_len=self.max_model_len(request.adapter))

    def add(self, spec: GenerateRequest) -> None:
        """Queue a request that `check` accepts. Raises RequestError (its id is in use), Overloaded (too many wait)."""
        if spec.request_id in self._requests:
            raise RequestError(f"request id {spec.request_id!r} is in use", param="request_id")
        request = Request(spec, arrival=self.counters.num_requests, queued_at=time.monotonic())
        self.scheduler.add(request)
        if spec.params.structured is not None or spec.params.thinking is not None:
            self._grammars.prepare(request, spec.params.structured)
        self.counters.num_requests += 1
        self._requests[spec.request_id] = request

    def cancel(self, request_id: str) -> None:
        """End a request and release all that it holds. Unknown and finished requests are ignored."""
        if (request := self._requests.get(request_id)) is not None:
            self._remove(request)
            if not self.scheduler.has_work and not self._runner.num_in_flight:
                self._runner.forget()

    def retire(self, digests: Iterable[str]) -> None:
        """Drop adapters and their prefixes for good: at once, or when the requests that use them have ended."""
        self._retired.update(digests)
        for digest in [digest for digest in self._retired if self.adapter_manager.retire(digest)]:
            self._retired.remove(digest)
            self.scheduler.kv_cache.forget(digest)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def next_deadline(self) -> float:
        """The time at which an idle engine must step although nothing happens, in seconds of `time.monotonic`; may be
        inf.
        """
        return min(self.scheduler.next_deadline(), self._grammars.next_deadline)

    def step(self) -> list[TokenOutput]:
        """Advance every scheduled request by one chunk; returns the new tokens and errors, where the runner is ahead
        those of the step before.

        If the list is empty and `has_work`, all requests wait for adapters or masks or are in the middle of their
        prompt, or a step is in flight.
        """
        outputs = [self._fail(*refused) for refused in self._grammars.take(self.scheduler.waiting.prepared)]
        scheduled = self.scheduler.next()
        outputs += [self._fail(*failed) for failed in scheduled.failed]
        chunks, runner = scheduled.chunks, self._runner
        is_foreground = any(not chunk.request.is_background for chunk in chunks)
        try:
            with self.foreground.step() if self.foreground is not None and is_foreground else nullcontext():
                if chunks and not runner.launch(chunks, scheduled.work):  # it needs tokens that are in flight
                    self._collect(0, outputs)
                    if chunks := _not_ended(chunks):
                        runner.launch(chunks, scheduled.work)
                self._collect(runner.num_ahead if chunks else 0, outputs)
        except RuntimeError as e:  # perhaps the device is out of memory
            outputs.append(self._undo(e, _not_ended(runner.last_chunks)))
        if not self.scheduler.has_work:  # nobody may call again
            self._collect(0, outputs)
            runner.forget()
        self._grammars.end_step()
        if self._retired:
            self.retire(())
        self.idle = not (scheduled.chunks or outputs or scheduled.adapters_moved or self._grammars.has_due)
        return outputs

    @property
    def last_adapters(self) -> frozenset[str]:
        """Digests of the adapters in the last steps, see ModelRunner."""
        return self._runner.last_adapters

    def _undo(self, error: RuntimeError, chunks: Sequence[Chunk]) -> TokenOutput:
        """Undo the step of `chunks`, which `error` ended before a request got a token, and end the request with the
        most tokens in it. Raises `error` if it has another reason than memory, or if there are no chunks, so that no
        request could be ended for it.
        """
        if not is_out_of_memory(error) or not chunks:
            raise error
        traceback.clear_frames(error.__traceback__)  # their tensors are freed
        torch.cuda.empty_cache()
        self._model.forget_steps()
        for chunk in chunks:
            chunk.request.num_computed, chunk.request.history = chunk.start, None
        largest = max(chunks, key=lambda chunk: (chunk.num_tokens, chunk.request.num_tokens))
        self.scheduler.undo(chunk.request for chunk in chunks if chunk is not largest)
        total = sum(chunk.num_tokens for chunk in chunks)
        _log.warning("a step of %d tokens needed more memory than the device has: %s", total, error)
        return self._fail(
            largest.request,
            EngineError(
                f"the step needed more memory than the device has; this request had the most of its {total} tokens, "
                f"{largest.num_tokens}. Send it again, or lower max_num_batched_tokens, pool_bytes or graph_bytes of "
                "the spec"
            ),
        )

    def _collect(self, num_left: int, outputs: list[TokenOutput]) -> None:
        """Read steps until so many are in flight; adds to `outputs`."""
        while self._runner.num_in_flight > num_left:
            with self._runner.collected() as results:
                outputs += self._results(results)

    @torch.inference_mode()
    def _results(self, results: StepResults) -> list[TokenOutput]:
        requests = list(dict.fromkeys(request for request, *_ in results.outcomes))
        broken = {r.request_id: r for r, sampled, _ in results.outcomes if sampled is None}
        for part, logprobs in results.scores:
            if logprobs is None:
                broken[part.request.request_id] = part.request
            else:
                part.request.num_scored += len(logprobs)
                part.request.prompt_logprobs += logprobs
        outputs: list[TokenOutput] = []
        for request, sampled, was_guessed in results.outcomes:
            if sampled is None or request.request_id in broken or request.state is RequestState.FINISHED:
                continue
            if isinstance(sampled, RequestError):
                outputs.append(self._fail(request, sampled))
            elif self._ends_too_early(request, sampled.token):
                request.num_computed -= 1  # its newest token is computed once more, for another one after it
            else:
                request.num_computed += was_guessed
                self.counters.num_accepted_tokens += was_guessed
                outputs.append(self._postprocess(request, sampled.token, sampled.logprobs))
        for request, token in self._grammars.forced([r for r in requests if r.request_id not in broken]):
            outputs.append(self._postprocess(request, token, None))
        self._grammars.advance(requests)
        for request in (r for r in results.computed if not r.spec.params.max_tokens):
            if request.num_pending or request.request_id in broken:
                continue
            if request.spec.pooling is None:
                outputs.append(self._output(request, None, None, "length"))
            elif (embedding := embedding_of(request)) is not None:
                outputs.append(self._output(request, None, None, "stop")._replace(embedding=embedding))
            else:
                broken[request.request_id] = request
        scored = {part.request: None for part, _ in results.scores if part.request.prompt_logprobs}
        going_on = (r for r in scored if r.request_id not in broken and r.state is not RequestState.FINISHED)
        outputs += [self._output(r, None, None, None) for r in going_on]
        return outputs + [self._fail_not_finite(r) for r in broken.values()]

    def _fail_not_finite(self, request: Request) -> TokenOutput:
        model = self.base.name if request.adapter is None else f"adapter {request.adapter.label}"
        what = "logits" if request.spec.pooling is None else "hidden states"
        reason = f"{model} gave {what} that are not finite in {self.spec.dtype}; its weights are unusable"
        output = self._fail(request, IntegrityError(reason))
        # Its keys and values may not be finite either. It has just left the last of them.
        self.scheduler.kv_cache.forget(request.kv_digest)
        return output

    def _fail(self, request: Request, error: Exception) -> TokenOutput:
        self._remove(request)
        return TokenOutput(request.request_id, None, error=error)

    def _postprocess(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        request.output_ids.append(token)
        self.counters.num_output_tokens += 1
        reason: FinishReason | None = None
        if self._is_end(request, token):
            reason = "stop"
        elif len(request.output_ids) >= request.spec.params.max_tokens:
            reason = "length"
        return self._output(request, token, logprobs, reason)

    def _ends_too_early(self, request: Request, token: int) -> bool:
        """Say whether the token would end the answer in a thought, before what must match."""
        if request.spec.params.thinking is None or not self._is_end(request, token):
            return False
        return self._grammars.close_thought(request, token)

    def _is_end(self, request: Request, token: int) -> bool:
        """Say whether the token ends the answer."""
        params = request.spec.params
        ends = token in self.base.config.eos_token_ids and (not params.ignore_eos or params.structured is not None)
        return ends or token in params.stop_token_ids

    def _output(
        self, request: Request, token: int | None, logprobs: TokenLogprobs | None, reason: FinishReason | None
    ) -> TokenOutput:
        if reason is not None:
            self.counters.num_finished += 1
            self._remove(request)
        part: tuple[TokenLogprobs, ...] | None = None
        if request.spec.params.prompt_logprobs is not None and len(request.output_ids) <= 1:
            part, request.prompt_logprobs = tuple(request.prompt_logprobs), []
        return TokenOutput(
            request.request_id,
            token,
            logprobs,
            reason,
            num_cached_tokens=request.num_cached_tokens or 0,
            prompt_logprobs=part,
        )

    def _remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        self._grammars.forget(request)
        if (ref := request.adapter) is not None:
            self.adapter_manager.request_ended(ref, request.num_prompt_counted + request.num_generated)
        self.scheduler.remove(request)

    def _resident(self, chunk: Chunk) -> ResidentAdapter | None:
        ref = chunk.request.adapter
        return None if ref is None or chunk.start < chunk.request.active_from else self.adapter_manager.resident(ref)

    def _adapter_blocks(self, request: Request) -> int:
        return 0 if request.adapter is None else self._loads.num_blocks(request.adapter.digest) or 0

    def _token_weight(self, request: Request) -> float:
        own, pair = (0, None) if request.adapter is None else self.adapter_bytes(request.adapter)
        pool = self.pool.tensor
        base_bytes = self.base.config.matrix_bytes(pool.itemsize, on_gpu=pool.is_cuda)
        return token_weight(own + (pair[1] if pair else 0), base_bytes)

    def stats(self) -> EngineStats:
        """Collect the figures of this moment. The pool's KV blocks that only the prefix cache holds are `cached`."""
        counters, scheduler, manager = self.counters, self.scheduler, self.adapter_manager
        at = manager.at
        loading = *at[Tier.QUEUED], *at[Tier.LOADING]
        blocks, num_cached = self.pool.allocator.occupancy()._asdict(), scheduler.prefix_cache.num_idle
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            longest_wait_s=scheduler.waiting.longest_wait_s(time.monotonic()),
            num_loading=len(loading),
            blocks=blocks | {"kv": blocks["kv"] - num_cached, "cached": num_cached},
            host_bytes=manager.host_used,
            num_steps=counters.num_steps,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_output_tokens=counters.num_output_tokens,
            num_finished=counters.num_finished,
            num_preemptions=scheduler.num_preemptions,
            num_aborted=scheduler.num_aborted,
            **asdict(manager.counts),
            max_adapters_in_step=counters.max_adapters_in_step,
            adapters_in_pool=(*at[Tier.POOL], *at[Tier.COPYING]),
            adapters_on_host=tuple(at[Tier.HOST]),
            adapters_loading=loading,
            prefix_cache_queries=scheduler.kv_cache.num_queries,
            prefix_cache_hits=scheduler.kv_cache.num_hits,
            prefixes=scheduler.prefix_cache.told(),
            num_draft_tokens=counters.num_draft_tokens,
            num_accepted_tokens=counters.num_accepted_tokens,
            step_seconds=counters.step_seconds.counts(),
            step_tokens=counters.step_tokens.counts(),
            step_adapters=counters.step_adapters.counts(),
            load_seconds=manager.load_seconds.counts(),
            queue_seconds={kind: histogram.counts() for kind, histogram in counters.queue_seconds.items()},
        )

    def adapters(self, digests: Collection[str] | None = None) -> list[Placement]:
        """Say where these adapters are and how they have been used; without `digests`, all that are known."""
        return self.adapter_manager.placements(digests)

    def check_integrity(self) -> None:
        """Raise AssertionError unless each block is free or held by running requests, the prefix cache or resident
        adapters, as the books of scheduler, adapter manager and pool say. Between steps.
        """
        scheduler, adapter_manager = self.scheduler, self.adapter_manager
        kv = Counter(block for request in scheduler.running for block in request.held_blocks)
        kv.update(chain(scheduler.prefix_cache.blocks(), scheduler.kv_cache.fetched()))
        scheduler.prefix_cache.check_integrity()
        self.pool.check_integrity(kv, adapter_manager.residents())
        adapter_manager.check_integrity()
        scheduler.waiting.check_integrity()
        pins = Counter(r.adapter.digest for r in scheduler.running if r.adapter is not None)
        waiters = Counter(r.adapter.digest for r in scheduler.waiting if r.adapter is not None)
        assert pins == Counter(adapter_manager.pins()), "adapter pins differ from the running requests"
        assert waiters == Counter(adapter_manager.waiters()), "wanted adapters differ from the waiting requests"

    def check_health(self) -> None:
        """Raise EngineError if another rank has ended. From any thread."""
        if self._workers is not None:
            self._workers.check()

    def close(self) -> None:
        self._loads.close()
        self.pool.copies.close()
        self._grammars.close()
        if self._workers is not None:
            self._workers.stop()


def _not_ended(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Leave out those of requests that tokens in flight have ended."""
    return [chunk for chunk in chunks if chunk.request.state is not RequestState.FINISHED]
