"""Well-behaved streams: one tenant each, one after the other, each of so many tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from benchmarks.serving.systems.client import Received, ask, read_events

_LOOK_S = 0.01  # between two looks how late the client itself is
_HUNG_S = 120.0


@dataclass
class Seen:
    """What the clients saw, in seconds.

    longest_s  the longest time without a token after a stream's first one
    first_s    the longest time until a first token
    late_s     how late the clients' own event loop was at most, which is in both
    failed     the streams that did not come to their end, and why
    """

    num: int = 0
    longest_s: float = 0.0
    first_s: float = 0.0
    late_s: float = 0.0
    failed: list[str] = field(default_factory=list)

    def read(self, tenant: str, received: Received, began: float) -> None:
        self.num += 1
        try:
            events = [(at, event["choices"][0]) for at, event in read_events(received) if event["choices"]]
        except (RuntimeError, ValueError) as e:
            self.failed.append(f"{tenant}: {e}")
            return
        if not events or not events[-1][1].get("finish_reason"):
            self.failed.append(f"{tenant}: ended before its last event, after {len(events)}")
            return
        times = [at for at, _ in events]
        self.first_s = max(self.first_s, times[0] - began)
        self.longest_s = max([self.longest_s, *(b - a for a, b in pairwise(times))])


async def stream(
    port: int, keys: Mapping[str, str], models: Sequence[str], num_tokens: int, is_over: Callable[[], bool]
) -> Seen:
    """Each tenant asks a model of its own, again and again until `is_over`. Streams that have begun end."""
    seen = Seen()

    async def go_on(tenant: str, secret: str, model: str) -> None:
        body = {"model": model, "prompt": f"I am {tenant}", "max_tokens": num_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        while not is_over():
            began = time.perf_counter()
            try:
                async with asyncio.timeout(_HUNG_S):
                    received = await ask(port, "/v1/completions", body, {"Authorization": f"Bearer {secret}"})
            except (TimeoutError, OSError) as e:
                seen.num += 1
                seen.failed.append(f"{tenant}: {e!r}")
                continue
            await asyncio.to_thread(seen.read, tenant, received, began)

    looking = asyncio.create_task(_look(seen))
    pairs = enumerate(keys.items())
    await asyncio.gather(*(go_on(tenant, key, models[i % len(models)]) for i, (tenant, key) in pairs))
    looking.cancel()
    return seen


async def _look(seen: Seen) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        seen.late_s = max(seen.late_s, loop.time() - due)
