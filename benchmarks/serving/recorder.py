"""A record of an engine's steps, made from outside: the scheduler's plans and the time that each step took."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from loray.engine.memory.adapter_manager import Tier
from loray.spec import AdapterRef

if TYPE_CHECKING:
    from loray.engine.engine import Engine
    from loray.engine.pool.pool import ResidentAdapter
    from loray.engine.request import SchedulerOutput, TokenOutput


class EngineStep(NamedTuple):
    """One step of `num_rows` chunks with `num_tokens` tokens in all. Distinct adapters are counted, and their published
    bytes.
    """

    began: float
    seconds: float
    num_tokens: int
    num_rows: int
    num_adapters: int
    adapter_bytes: int
    num_waiting: int

    @property
    def is_decode(self) -> bool:
        return 0 < self.num_tokens == self.num_rows


class EngineRecorder:
    """Wraps `step` of an engine, `next` of its scheduler and `acquire` of its residency; a step takes some microseconds
    longer.

    `placed_bytes`: published bytes of the adapters that were copied from host memory into the pool.
    """

    def __init__(self, engine: Engine) -> None:
        self.steps: list[EngineStep] = []
        self.placed_bytes = 0
        self._wrap_residency(engine)
        scheduler, plan_next, step = engine.scheduler, engine.scheduler.next, engine.step
        last: list[SchedulerOutput] = []

        def next_plan() -> SchedulerOutput:
            last[:] = [plan_next()]
            return last[0]

        def timed() -> list[TokenOutput]:
            began = time.perf_counter()
            outputs = step()
            seconds = time.perf_counter() - began
            chunks = last[0].chunks
            refs = {c.request.adapter.digest: c.request.adapter for c in chunks if c.request.adapter is not None}
            self.steps.append(
                EngineStep(
                    began,
                    seconds,
                    sum(c.num_tokens for c in chunks),
                    len(chunks),
                    len(refs),
                    sum(ref.nbytes for ref in refs.values()),
                    len(scheduler.waiting),
                )
            )
            return outputs

        scheduler.next = next_plan  # type: ignore[method-assign]
        engine.step = timed  # type: ignore[method-assign]

    def _wrap_residency(self, engine: Engine) -> None:
        adapter_manager, acquire = engine.adapter_manager, engine.adapter_manager.acquire

        def counted(ref: AdapterRef) -> ResidentAdapter | None:
            was_in_pool = adapter_manager.table.tier(ref) is Tier.POOL
            resident = acquire(ref)
            if resident is not None and not was_in_pool:
                self.placed_bytes += ref.nbytes
            return resident

        adapter_manager.acquire = counted  # type: ignore[method-assign]
