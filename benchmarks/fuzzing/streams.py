"""Well-behaved streams: one tenant each, one after the other, each of so many tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from benchmarks.serving.figures.rows import quantile
from benchmarks.serving.systems.client import Received, ask, read_events

_LOOK_S = 0.01  # between two looks how late the client itself is
_HUNG_S = 120.0
_AGAIN_S = 1.0  # after a failure


class Gap(NamedTuple):
    """Seconds without a token after a stream's first one. `began`: of `time.perf_counter`."""

    seconds: float
    began: float


@dataclass
class Seen:
    """What the clients saw, in seconds.

    gaps    between tokens of one stream, the longest first
    firsts  the times until first tokens, ascending
    late_s  how late the clients' own event loop was at most, which is in both
    failed  the streams that did not come to their end, and why
    """

    gaps: list[Gap] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    late_s: float = 0.0
    failed: list[str] = field(default_factory=list)

    @property
    def longest_s(self) -> float:
        return self.gaps[0].seconds if self.gaps else 0.0

    @property
    def row(self) -> dict[str, float]:
        """Numbers, and milliseconds of quantiles."""
        found = {"streams": len(self.firsts), "failed": len(self.failed), "tokens": len(self.gaps)}
        ascending = [gap.seconds for gap in reversed(self.gaps)]
        times = {f"gap p{100 * q:g}": quantile(ascending, q) for q in (0.5, 0.99, 0.999)} | {"longest": self.longest_s}
        times |= {"first p99": quantile(self.firsts, 0.99), "client late": self.late_s}
        return found | {name: 1e3 * s for name, s in times.items()}

    def read(self, tenant: str, received: Received, began: float) -> None:
        try:
            events = [(at, event["choices"][0]) for at, event in read_events(received) if event["choices"]]
        except (RuntimeError, ValueError) as e:
            self.failed.append(f"{tenant}: {e}")
            return
        if not events or not events[-1][1].get("finish_reason"):
            self.failed.append(f"{tenant}: ended before its last event, after {len(events)}")
            return
        times = [at for at, _ in events]
        self.firsts.append(times[0] - began)
        self.gaps += [Gap(b - a, a) for a, b in pairwise(times)]


def stream(
    port: int, keys: Mapping[str, str], models: Sequence[str], num_tokens: int, is_over: Callable[[], bool]
) -> Seen:
    """Each tenant asks a model of its own, again and again until `is_over`. Streams that have begun end. What came is
    read afterwards.
    """
    seen, answers = Seen(), list[tuple[str, Received, float]]()

    async def go_on(tenant: str, secret: str, model: str) -> None:
        body = {"model": model, "prompt": f"I am {tenant}", "max_tokens": num_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True}
        while not is_over():
            began = time.perf_counter()
            try:
                async with asyncio.timeout(_HUNG_S):
                    received = await ask(port, "/v1/completions", body, {"Authorization": f"Bearer {secret}"})
            except (TimeoutError, OSError) as e:
                seen.failed.append(f"{tenant}: {e!r}")
                await asyncio.sleep(_AGAIN_S)
                continue
            answers.append((tenant, received, began))
            if not received.parts or not received.parts[0][1].startswith(b"HTTP/1.1 200"):
                await asyncio.sleep(_AGAIN_S)

    async def all_go_on() -> None:
        looking = asyncio.create_task(_look(seen))
        pairs = enumerate(keys.items())
        await asyncio.gather(*(go_on(tenant, key, models[i % len(models)]) for i, (tenant, key) in pairs))
        looking.cancel()

    asyncio.run(all_go_on())
    for answer in answers:
        seen.read(*answer)
    seen.gaps.sort(reverse=True)
    seen.firsts.sort()
    return seen


async def _look(seen: Seen) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LOOK_S
        await asyncio.sleep(_LOOK_S)
        seen.late_s = max(seen.late_s, loop.time() - due)
