"""How long an event loop was held up: a task that wants to run each millisecond."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_EVERY_S = 0.001


class Holds:
    """`longest_s`: the longest time in which the loop did not run the task that was due."""

    def __init__(self) -> None:
        self.longest_s = 0.0


@asynccontextmanager
async def heartbeat() -> AsyncIterator[Holds]:
    """Measures while the block runs."""
    holds = Holds()

    async def beat() -> None:
        while True:
            due = time.perf_counter() + _EVERY_S
            await asyncio.sleep(_EVERY_S)
            holds.longest_s = max(holds.longest_s, time.perf_counter() - due)

    task = asyncio.create_task(beat())
    await asyncio.sleep(0)
    try:
        yield holds
    finally:
        await asyncio.sleep(2 * _EVERY_S)  # so that what held the loop last is seen
        task.cancel()
