"""The engine's step: take loaded adapters, schedule, launch, read, postprocess. One thread calls it, see `stream`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future

import torch

from loray.bases.checkpoint import CheckpointReader
from loray.bases.registry import BaseModel
from loray.engine.admission import check_request
from loray.engine.integrity import check_integrity
from loray.engine.memory.limits import max_model_len
from loray.engine.model.decoder import Decoder
from loray.engine.model.warmup import warm_up
from loray.engine.parallel.workers import Workers
from loray.engine.pool.loading import AdapterLoads, LoadAdapter
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.engine.pool.pool import Pool
from loray.engine.pool.resident import ResidentAdapter
from loray.engine.recovery import undo_step
from loray.engine.report import report
from loray.engine.request import Request, State, TokenOutput
from loray.engine.residency.residency import Residency
from loray.engine.residency.table import Placement
from loray.engine.runner import ModelRunner, StepResults
from loray.engine.sampling.grammar import Grammars
from loray.engine.sampling.sampler import Sampler
from loray.engine.scheduling.fairness import token_weight
from loray.engine.scheduling.limits import WaitLimits
from loray.engine.scheduling.plan import Chunk
from loray.engine.scheduling.scheduler import Scheduler
from loray.engine.stats.counters import Counters
from loray.engine.stats.stats import EngineStats
from loray.engine.stats.usage import UsageLog
from loray.errors import IntegrityError, RequestError
from loray.spec import AdapterBytes, AdapterRef, FinishReason, GenerateRequest, ServeSpec, TokenLogprobs
from loray_kernels import Recorded


class Engine:
    """Called from one thread. Loader threads call `wake` when a load has a result or is complete.

    Only that thread may use `pool`, `residency` and `scheduler`; see EngineStream.call.
    """

    def __init__(
        self,
        spec: ServeSpec,
        base: BaseModel,
        model: Decoder,
        pool: Pool,
        load: LoadAdapter,
        workers: Workers | None = None,
    ) -> None:
        self.spec, self.base = spec, base
        self.wake: Callable[[], None] = lambda: None
        self._model, self.pool, self._workers = model, pool, workers
        self._grammars = Grammars(base, lambda: self.wake(), on_gpu=pool.tensor.is_cuda)
        checkpoint = CheckpointReader(base.path)
        packer = Packer(pool.geometry, pool.tensor.dtype, model.embedding_VD, checkpoint, pinned=pool.tensor.is_cuda)
        self._loads = AdapterLoads(pool, packer, load, lambda: self.wake(), model.prepare_rope)
        self.residency: Residency[PackedAdapter, ResidentAdapter] = Residency(
            host_bytes=spec.host_bytes,
            load=self._start_load,
            place=pool.place,
            remove=pool.remove,
            size=pool.size_of,
            arrived=pool.has_arrived,
            usage=UsageLog(on_forget=self._loads.forget),
            wake=lambda: self.wake(),
        )
        self.scheduler: Scheduler[PackedAdapter, ResidentAdapter] = Scheduler(
            allocator=pool.allocator,
            residency=self.residency,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            wait_limits=WaitLimits(spec.max_queued, spec.max_loading, spec.load_timeout_s),
            adapter_blocks=self._adapter_blocks,
            token_weight=self._token_weight,
            itl_slo_s=spec.itl_slo_s,
            ttft_slo_s=spec.ttft_slo_s,
            compact=pool.compact,
            enable_prefix_caching=spec.enable_prefix_caching,
            places_ahead=pool.tensor.is_cuda,
        )
        pool.on_kv_moved = self.scheduler.moved
        self._requests: dict[str, Request] = {}
        self.counters = Counters()
        self._runner = ModelRunner(
            model,
            pool,
            Sampler(model.ops, base.config.eos_token_ids),
            self._grammars,
            self.counters,
            resident=self._resident,
            observe=self.scheduler.observe_step,
        )
        self.idle = True  # the last step had nothing to compute

    def warm_up(self) -> Recorded | None:
        """Compile kernels and record decode steps, see `warmup`. In the thread that steps, before the first step."""
        return warm_up(self._model, self.pool, self.spec)

    def max_model_len(self, adapter: AdapterRef | None) -> int:
        """Tokens of prompt and output that a request may have: the model's, the spec's and the pool's limit.

        The pool's limit is what the adapter leaves.
        """
        geometry, own = self.pool.geometry, 0 if adapter is None else self._loads.expected_blocks(adapter)
        context = adapter.context_length if adapter is not None else self.base.config.max_position_embeddings
        return max_model_len(self.spec, context, (geometry.num_blocks - own) * geometry.block_tokens)

    def adapter_bytes(self, adapter: AdapterRef) -> AdapterBytes:
        """Bytes that an adapter takes in the pool; its published size until it has been loaded. From any thread."""
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
        if spec.params.structured is not None:
            self._grammars.prepare(request, spec.params.structured)
        self.counters.num_requests += 1
        self._requests[spec.request_id] = request

    def cancel(self, request_id: str) -> None:
        """End a request and release all that it holds. Unknown and finished requests are ignored."""
        if (request := self._requests.get(request_id)) is not None:
            self._remove(request)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def next_deadline(self) -> float:
        """When an idle engine must step although nothing happens, in seconds of `time.monotonic`; may be inf."""
        return min(self.scheduler.next_deadline(), self._grammars.next_deadline)

    def step(self) -> list[TokenOutput]:
        """Advance every scheduled request by one chunk; returns the new tokens and errors, where the runner is ahead
        those of the step before.

        If the list is empty and `has_work`, all requests wait for adapters or masks or are in the middle of their
        prompt, or a step is in flight.
        """
        outputs = [self._fail(*refused) for refused in self._grammars.take(self.scheduler.waiting.prepared)]
        plan = self.scheduler.next()
        outputs += [self._fail(*failed) for failed in plan.failed]
        chunks, runner = plan.chunks, self._runner
        try:
            if chunks and not runner.launch(chunks, plan.work):  # it needs tokens that are in flight
                self._collect(0, outputs)
                if chunks := _not_ended(chunks):
                    runner.launch(chunks, plan.work)
            self._collect(runner.num_ahead if chunks else 0, outputs)
        except RuntimeError as e:  # perhaps the device is out of memory
            outputs.append(self._fail(*undo_step(e, _not_ended(runner.last_chunks), self.scheduler, self._model)))
        if not self.scheduler.has_work:  # nobody may call again
            self._collect(0, outputs)
        self._grammars.end_step()
        self.idle = not (plan.chunks or outputs or plan.residency_changed or self._grammars.has_due)
        return outputs

    @property
    def last_adapters(self) -> frozenset[str]:
        """See ModelRunner."""
        return self._runner.last_adapters

    def _collect(self, num_left: int, outputs: list[TokenOutput]) -> None:
        """Read steps until so many are in flight; adds to `outputs`."""
        while self._runner.num_in_flight > num_left:
            with self._runner.collected() as results:
                outputs += self._results(results)

    @torch.inference_mode()
    def _results(self, results: StepResults) -> list[TokenOutput]:
        requests = [request for request, _ in results.outcomes]
        broken = {r.request_id: r for r, sampled in results.outcomes if sampled is None}
        for part, logprobs in results.scores:
            if logprobs is None:
                broken[part.request.request_id] = part.request
            else:
                part.request.num_scored += len(logprobs)
                part.request.prompt_logprobs += logprobs
        outputs = [
            self._fail(r, sampled)
            if isinstance(sampled, RequestError)
            else self._postprocess(r, sampled.token, sampled.logprobs)
            for r, sampled in results.outcomes
            if sampled is not None and r.request_id not in broken
        ]
        for request, token in self._grammars.forced([r for r in requests if r.request_id not in broken]):
            outputs.append(self._postprocess(request, token, None))
        self._grammars.advance(requests)
        for request in (r for r in results.computed if not r.spec.params.max_tokens):
            if not request.num_pending and request.request_id not in broken:
                outputs.append(self._output(request, None, None, "length"))
        scored = {part.request: None for part, _ in results.scores if part.request.prompt_logprobs}
        going_on = (r for r in scored if r.request_id not in broken and r.state is not State.FINISHED)
        outputs += [self._output(r, None, None, None) for r in going_on]
        return outputs + [self._fail_not_finite(r) for r in broken.values()]

    def _fail_not_finite(self, request: Request) -> TokenOutput:
        model = self.base.name if request.adapter is None else f"adapter {request.adapter.label}"
        reason = f"{model} gave logits that are not finite in {self.spec.dtype}; its weights are unusable"
        output = self._fail(request, IntegrityError(reason))
        # Its keys and values may not be finite either. It has just left the last of them.
        self.scheduler.prefix_cache.forget(request.adapter_digest)
        return output

    def _fail(self, request: Request, error: Exception) -> TokenOutput:
        self._remove(request)
        return TokenOutput(request.request_id, None, error=error)

    def _postprocess(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        request.output_ids.append(token)
        self.counters.num_output_tokens += 1
        params = request.spec.params
        reason: FinishReason | None = None
        ends = token in self.base.config.eos_token_ids and (not params.ignore_eos or params.structured is not None)
        if ends or token in params.stop_token_ids:
            reason = "stop"
        elif len(request.output_ids) >= params.max_tokens:
            reason = "length"
        return self._output(request, token, logprobs, reason)

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
            self.residency.table.usage.request_ended(ref, request.num_prompt_counted + request.num_generated)
        self.scheduler.remove(request)

    def _start_load(self, ref: AdapterRef) -> Future[PackedAdapter]:
        return self._loads.start(ref, self.scheduler.first_step_seconds(ref.digest))

    def _resident(self, chunk: Chunk) -> ResidentAdapter | None:
        return None if (ref := chunk.request.adapter) is None else self.residency.table.resident(ref)

    def _adapter_blocks(self, request: Request) -> int:
        return 0 if request.adapter is None else self._loads.num_blocks(request.adapter.digest) or 0

    def _token_weight(self, request: Request) -> float:
        own, pair = (0, None) if request.adapter is None else self.adapter_bytes(request.adapter)
        base_bytes = self.base.config.num_matrix_elements * self.pool.tensor.itemsize
        return token_weight(own + (pair[1] if pair else 0), base_bytes)

    def stats(self) -> EngineStats:
        return report(self.counters, self.scheduler, self.residency, self.pool)

    def adapters(self, digests: Collection[str] | None = None) -> list[Placement]:
        """Where these adapters are and how they have been used; without `digests`, of all that are known."""
        return self.residency.table.placements(digests)

    def check_integrity(self) -> None:
        """AssertionError unless the books of scheduler, residency and pool agree. Between steps."""
        check_integrity(self.scheduler, self.residency, self.pool)

    def check_health(self) -> None:
        """EngineError if another rank has ended. From any thread."""
        if self._workers is not None:
            self._workers.check()

    def close(self) -> None:
        self._loads.close()
        self._grammars.close()
        if self._workers is not None:
            self._workers.stop()


def _not_ended(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Without those of requests that tokens in flight have ended."""
    return [chunk for chunk in chunks if chunk.request.state is not State.FINISHED]
