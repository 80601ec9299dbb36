"""The engine's step: take in what has loaded, schedule, run, sample, postprocess. One thread owns it; see `stream`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.admission import check_request
from loray.engine.memory.limits import max_model_len
from loray.engine.model.batch import Batch, build_batch
from loray.engine.model.decoder import Decoder
from loray.engine.model.landing import Landings
from loray.engine.parallel.workers import Workers
from loray.engine.pool.loading import AdapterLoads, LoadAdapter
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.engine.pool.pool import Pool
from loray.engine.pool.resident import ResidentAdapter
from loray.engine.request import Request, TokenLogprobs, TokenOutput
from loray.engine.residency.residency import Residency
from loray.engine.residency.table import Placement, Tier
from loray.engine.sampling.logprobs import score
from loray.engine.sampling.sampler import Sampler
from loray.engine.scheduling.fairness import token_weight
from loray.engine.scheduling.scheduler import Chunk, Scheduler
from loray.engine.stats.counters import Counters
from loray.engine.stats.stats import EngineStats
from loray.engine.stats.usage import UsageLog
from loray.errors import IntegrityError, RequestError
from loray.spec import AdapterBytes, AdapterRef, FinishReason, GenerateRequest, ServeSpec


class Engine:
    """Called from one thread. `wake` is called from loader threads whenever a load has landed."""

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
        self._model, self._pool, self._workers = model, pool, workers
        self._sampler = Sampler(base.config.eos_token_ids)
        packer = Packer(pool.geometry, pool.tensor.dtype, model.embedding_VD, pinned=pool.tensor.is_cuda)
        self._loads = AdapterLoads(pool, packer, load, lambda: self.wake())
        self._residency: Residency[PackedAdapter, ResidentAdapter] = Residency(
            host_bytes=spec.host_bytes,
            load=self._start_load,
            place=pool.place,
            remove=pool.remove,
            size=pool.size_of,
            usage=UsageLog(forgotten=self._loads.forget),
        )
        self._scheduler = Scheduler(
            allocator=pool.allocator,
            residency=self._residency,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            max_queued=spec.max_queued,
            adapter_blocks=self._adapter_blocks,
            token_weight=self._token_weight,
            ttft_slo_s=spec.ttft_slo_s,
            compact=pool.compact,
            enable_prefix_caching=spec.enable_prefix_caching,
        )
        pool.on_kv_moved = self._scheduler.moved
        self._requests: dict[str, Request] = {}
        self._counters = Counters()
        self.idle = True  # the last step had nothing to compute

    # -- requests -----------------------------------------------------------------------------------------------------

    def max_model_len(self, adapter: AdapterRef | None) -> int:
        """Tokens of prompt and output that a request may have: the model's, the spec's and the pool's limit.

        Of the pool the adapter takes its share, which is estimated from its published size until it has been loaded.
        """
        geometry = self._pool.geometry
        own = 0
        if adapter is not None:
            estimate = min(-(-adapter.nbytes // self._pool.block_bytes) + 1, geometry.num_blocks // 2)
            own = self._loads.num_blocks(adapter.digest) or estimate
        context = adapter.context_length if adapter is not None else self.base.config.max_position_embeddings
        return max_model_len(self.spec, context, (geometry.num_blocks - own) * geometry.block_tokens)

    def adapter_bytes(self, adapter: AdapterRef) -> AdapterBytes:
        """What an adapter takes in the pool; its published size until it has been loaded. From any thread."""
        return self._loads.nbytes(adapter.digest) or AdapterBytes(adapter.nbytes)

    def check(self, request: GenerateRequest) -> None:
        """Raise for a request that could never run: RequestError, ContextLengthExceeded, BaseMismatch."""
        check_request(request, self.base, max_model_len=self.max_model_len(request.adapter))

    def add(self, spec: GenerateRequest) -> None:
        """Queue a request; raises what `check` raises, and Overloaded when too many wait, or for too long."""
        self.check(spec)
        if spec.request_id in self._requests:
            raise RequestError(f"request id {spec.request_id!r} is in use", param="request_id")
        request = Request(spec, arrival=self._counters.totals["requests"], queued_at=time.monotonic())
        self._scheduler.add(request)
        self._counters.totals["requests"] += 1
        self._requests[spec.request_id] = request

    def cancel(self, request_id: str) -> None:
        """Give back all that a request holds; unknown or finished ones are none of our business."""
        request = self._requests.get(request_id)
        if request is not None:
            self._remove(request)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def step(self) -> list[TokenOutput]:
        """Advance every scheduled request by one chunk; returns the tokens and failures that came of it.

        An empty list with `has_work` means that all requests wait for adapters or are in the middle of their prompt.
        """
        plan = self._scheduler.next()
        outputs = []
        for request, error in plan.failed:
            outputs.append(TokenOutput(request.request_id, None, error=error))
            self._remove(request)
        if plan.chunks:
            outputs += self._run(plan.chunks)
        self.idle = not (plan.chunks or plan.failed or plan.landed)
        return outputs

    def _run(self, chunks: list[Chunk]) -> list[TokenOutput]:
        began = time.monotonic()
        self._counters.scheduled((chunk.request for chunk in chunks), began)
        batch = build_batch(
            chunks,
            self._resident,
            block_tokens=self._pool.geometry.block_tokens,
            hidden_size=self.base.config.hidden_size,
            device=self._pool.tensor.device,
        )
        landings = Landings(self._pool, [slot.adapter for slot in batch.adapters.slots])
        if landings:
            batch = replace(batch, wait_for_layer=landings.wait_for_layer)
        logits_RV = self._model.forward(batch, self._pool)
        num_tokens, num_adapters = sum(chunk.num_tokens for chunk in chunks), len(batch.adapters.slots)
        if landings:
            chunks, batch, logits_RV = landings.settle(chunks, batch, logits_RV)
        for chunk in chunks:
            chunk.request.num_computed += chunk.num_tokens
            self._counters.computed(chunk.request)
        outputs = self._results(chunks, batch, logits_RV)
        landings.over()
        seconds = time.monotonic() - began
        self._scheduler.observe_step(num_tokens, seconds)
        self._counters.stepped(num_tokens, num_adapters, seconds)
        return outputs

    @torch.inference_mode()
    def _results(self, chunks: list[Chunk], batch: Batch, logits_RV: Tensor) -> list[TokenOutput]:
        """Of `logits_RV` the sampled chunks' rows come first, then the scored tokens'."""
        requests = [chunk.request for chunk in batch.sampled]
        drawn = self._sampler(logits_RV[: len(requests)], requests)
        broken = {r.request_id: r for r, sampled in zip(requests, drawn, strict=True) if sampled is None}
        for part, logprobs in zip(batch.scored, score(logits_RV[len(requests) :], batch.scored), strict=True):
            if logprobs is None:
                broken[part.request.request_id] = part.request
            else:
                part.request.prompt_logprobs += logprobs
        outputs = [
            self._postprocess(r, sampled.token, sampled.logprobs)
            for r, sampled in zip(requests, drawn, strict=True)
            if sampled is not None and r.request_id not in broken
        ]
        for request in (chunk.request for chunk in chunks if not chunk.request.spec.params.max_tokens):
            if not request.num_pending and request.request_id not in broken:
                outputs.append(self._output(request, None, None, "length"))
        return outputs + [self._fail_not_finite(r) for r in broken.values()]

    def _fail_not_finite(self, request: Request) -> TokenOutput:
        model = self.base.name if request.adapter is None else f"adapter {request.adapter.label}"
        self._remove(request)
        self._scheduler.prefix_cache.forget(request.adapter_digest)  # nobody else begins with such keys and values
        error = IntegrityError(
            f"{model} gave logits that are not finite in {self.spec.dtype}; its weights are unusable"
        )
        return TokenOutput(request.request_id, None, error=error)

    def _postprocess(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        request.output_ids.append(token)
        self._counters.totals["output_tokens"] += 1
        params = request.spec.params
        reason: FinishReason | None = None
        ends = token in self.base.config.eos_token_ids and not params.ignore_eos
        if ends or token in params.stop_token_ids:
            reason = "stop"
        elif len(request.output_ids) >= params.max_tokens:
            reason = "length"
        return self._output(request, token, logprobs, reason)

    def _output(
        self, request: Request, token: int | None, logprobs: TokenLogprobs | None, reason: FinishReason | None
    ) -> TokenOutput:
        if reason is not None:
            self._counters.totals["finished"] += 1
            self._remove(request)
        scored = request.spec.params.prompt_logprobs is not None and len(request.output_ids) <= 1
        return TokenOutput(
            request.request_id,
            token,
            logprobs,
            reason,
            num_cached_tokens=request.num_cached_tokens or 0,
            prompt_logprobs=tuple(request.prompt_logprobs) if scored else None,
        )

    def _remove(self, request: Request) -> None:
        if request.adapter is not None:
            num_tokens = request.num_prompt_counted + len(request.output_ids)
            self._residency.table.usage.ended(request.adapter, num_tokens)
        self._scheduler.remove(request)
        del self._requests[request.request_id]

    # -- adapters -----------------------------------------------------------------------------------------------------

    def _start_load(self, ref: AdapterRef) -> Future[PackedAdapter]:
        return self._loads.start(ref, self._scheduler.first_step_seconds(ref.digest))

    def _resident(self, chunk: Chunk) -> ResidentAdapter | None:
        ref = chunk.request.adapter
        return None if ref is None else self._residency.table.resident(ref)

    def _adapter_blocks(self, request: Request) -> int:
        return 0 if request.adapter is None else self._loads.num_blocks(request.adapter.digest) or 0

    def _token_weight(self, request: Request) -> float:
        if request.adapter is None:
            return 1.0
        own, pair = self.adapter_bytes(request.adapter)
        base_bytes = self.base.config.num_matrix_elements * self._pool.tensor.itemsize
        return token_weight(own + (pair[1] if pair else 0), base_bytes)

    # -- looking in ---------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        tiers = self._residency.table.by_tier()
        blocks, cached = self._pool.allocator.occupancy()._asdict(), self._scheduler.prefix_cache.num_idle
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_loading=len(tiers[Tier.LOADING]),
            blocks=blocks | {"kv": blocks["kv"] - cached, "cached": cached},
            adapters_in_pool=tuple(r.digest for r in tiers[Tier.POOL]),
            adapters_on_host=tuple(r.digest for r in tiers[Tier.HOST]),
            host_bytes=self._residency.table.host_used,
            num_preemptions=self._scheduler.num_preemptions,
            num_aborted=self._scheduler.num_aborted,
            prefix_cache_queries=self._scheduler.prefix_cache_queries,
            prefix_cache_hits=self._scheduler.prefix_cache_hits,
            load_seconds=self._residency.load_seconds.counts(),
            **self._residency.counts.stats(),
            **self._counters.stats(),
        )

    def adapters(self, digests: Collection[str] | None = None) -> list[Placement]:
        """Where these adapters are and how they have been used; without `digests`, all that are known."""
        return self._residency.table.placements(digests)

    def check_integrity(self) -> None:
        """AssertionError unless every block is free, or held by exactly the running requests, the prefix cache and the
        resident adapters.
        """
        kv = Counter(block for request in self._scheduler.running for block in request.blocks)
        kv.update(self._scheduler.prefix_cache.blocks())
        self._scheduler.prefix_cache.check_integrity()
        self._pool.check_integrity(kv, self._residency.table.residents())
        self._residency.table.check_integrity()
        pins = Counter(r.adapter.digest for r in self._scheduler.running if r.adapter is not None)
        wants = Counter(r.adapter.digest for r in self._scheduler.waiting if r.adapter is not None)
        assert pins == Counter(self._residency.table.pins()), "adapter pins differ from the running requests"
        assert wants == Counter(self._residency.table.wants()), "wanted adapters differ from the waiting requests"

    def check_health(self) -> None:
        """EngineError where another rank has ended. From any thread."""
        if self._workers is not None:
            self._workers.check()

    def close(self) -> None:
        self._loads.close()
        if self._workers is not None:
            self._workers.stop()
