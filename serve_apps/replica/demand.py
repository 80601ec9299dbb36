"""Measures the demand on a replica: its requests, and its engine's load."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from loray.errors import LorayError, Overloaded
from loray.serving.scaling.demand import DemandMeter, EngineLoad, TrackedRequest
from loray.serving.scaling.load import burst_s
from loray.spec import AutoscalingSpec, ServeSpec

if TYPE_CHECKING:
    from loray.engine.stream import EngineStream
    from loray.spec import GenerateRequest


class ReplicaDemand:
    """The demand on a replica that Serve scales."""

    def __init__(self, spec: ServeSpec, autoscaling: AutoscalingSpec, stream: EngineStream) -> None:
        self._stream, self._pool_bytes = stream, float(stream.pool_bytes)
        self._meter = DemandMeter(
            window_s=autoscaling.window_s,
            max_num_seqs=spec.max_num_seqs,
            pool_bytes=self._pool_bytes,
            adapter_bytes=stream.adapter_bytes,
            now=time.monotonic(),
            burst_s=burst_s(autoscaling),
        )

    def arrived(self, request: GenerateRequest) -> TrackedRequest:
        """The caller counts its output tokens as they come. What another replica has generated is prompt here."""
        prompt, left = len(request.prompt_ids), request.params.max_tokens
        if request.output_ids:
            prompt, left = prompt + len(request.output_ids), left - len(request.output_ids)
        return self._meter.arrived(prompt, left, request.adapter, time.monotonic())

    def ended(self, tracked: TrackedRequest, error: Exception | None) -> None:
        if isinstance(error, Overloaded):
            self._meter.refused(tracked, time.monotonic())
        elif isinstance(error, LorayError):
            self._meter.rejected(tracked)
        else:
            self._meter.finished(tracked, time.monotonic())

    def stats(self) -> dict[str, float]:
        """The report for the autoscaler, which asks for it at its intervals."""
        now, engine = time.monotonic(), self._stream.stats()
        load = EngineLoad(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_loading=engine.num_loading,
            num_tokens=engine.num_prompt_tokens + engine.num_output_tokens,
            kv_bytes=self._pool_bytes * engine.blocks["kv"] / sum(engine.blocks.values()),
        )
        self._meter.sample(load, now)
        loaded = frozenset((*engine.adapters_in_pool, *engine.adapters_on_host))
        return self._meter.observe(now, loaded).to_stats()
