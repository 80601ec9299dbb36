"""Measures the demand on a replica: its requests, and its engine's load."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from loray.errors import LorayError, Overloaded
from loray.serving.demand import DemandMeter, EngineLoad
from loray.spec import AutoscalingSpec, ServeSpec

if TYPE_CHECKING:
    from loray.engine.stream import EngineStream
    from loray.spec import GenerateRequest, TokenDelta


class ReplicaDemand:
    """The demand on a replica that Serve scales."""

    def __init__(self, spec: ServeSpec, autoscaling: AutoscalingSpec, stream: EngineStream) -> None:
        self._stream, self._pool_bytes = stream, float(spec.pool_bytes)
        self._meter = DemandMeter(
            window_s=autoscaling.window_s,
            max_num_seqs=spec.max_num_seqs,
            pool_bytes=self._pool_bytes,
            adapter_bytes=stream.adapter_bytes,
            now=time.monotonic(),
        )

    async def observed(
        self, request: GenerateRequest, deltas: AsyncGenerator[TokenDelta, None]
    ) -> AsyncGenerator[TokenDelta, None]:
        """Passes the deltas on and counts their tokens."""
        params = request.params
        tracked = self._meter.arrived(len(request.prompt_ids), params.max_tokens, request.adapter, time.monotonic())
        try:
            async with aclosing(deltas) as stream:
                async for delta in stream:
                    tracked.num_output_tokens += len(delta.token_ids)
                    yield delta
        except Overloaded:
            self._meter.refused(tracked, time.monotonic())
            raise
        except LorayError:
            self._meter.rejected(tracked)
            raise
        finally:
            if tracked.counted is None:
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
        return self._meter.observe(now).to_stats()
