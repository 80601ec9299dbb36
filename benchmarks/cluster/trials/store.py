"""The store away for a minute: requests for adapters that replicas hold do not notice, others are refused at once, and
are answered when it is back.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cluster.trace import Asked, Load, make_trace, random_prompts
from benchmarks.cluster.trials.client import Answer, Client
from benchmarks.cluster.trials.tails import Tail
from benchmarks.cluster.trials.world import LOAD_TIMEOUT_S, World

MAX_RATIO = 1.3  # of the warm requests' p99 while the store is away to that before
REFUSED_S = LOAD_TIMEOUT_S + 2.0  # for a cold request while it is away
BACK_S = 60.0  # for all cold adapters after its return: a client waits as Retry-After says
Say = Callable[[str], None]
_COLD_PROMPT, _COLD_OUTPUT = 8, 4


@dataclass(frozen=True, slots=True)
class Plan:
    """Rates are requests a second; the power law is over `num_warm` adapters, each of which is asked for before."""

    num_warm: int = 100
    rate: float = 8.0
    cold_rate: float = 1.5
    seconds: float = 60.0
    settle_s: float = 10.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """`refused`: requests for cold adapters while the store was away. `back_s`: from its return until each of these
    adapters has been answered for; infinite: some never were.
    """

    before: Tail
    during: Tail
    refused: list[Answer]
    return_s: float
    back_s: float

    @property
    def ratio(self) -> float:
        return self.during.p99_s / self.before.p99_s

    def verdicts(self) -> list[tuple[str, bool]]:
        """What is asked, in words, and whether it was reached."""
        num_failed = self.before.num_failed + self.during.num_failed
        slowest = max((a.seconds for a in self.refused), default=math.nan)
        good = sum(a.status == 503 and a.retry_after_s > 0 for a in self.refused)
        back = f"after {self.back_s:.1f} s" if math.isfinite(self.back_s) else "never"
        return [
            (f"warm p99 TTFT while the store is away by that before, at most {MAX_RATIO}: {self.ratio:.2f}",
             self.ratio <= MAX_RATIO),
            (f"warm requests that failed: {num_failed} of {self.before.num + self.during.num}", not num_failed),
            (f"cold requests refused with 503 and Retry-After: {good} of {len(self.refused)}",
             0 < len(self.refused) == good),
            (f"the slowest refusal within {REFUSED_S:.0f} s: {slowest:.2f} s", slowest <= REFUSED_S),
            (f"all cold adapters answered within {BACK_S:.0f} s of the store's return: {back}", self.back_s <= BACK_S),
        ]  # fmt: skip

    def table(self) -> list[str]:
        lines = [f"{'store':<8} {'warm':>6} {'failed':>7} {'p50 TTFT':>10} {'p99 TTFT':>10}"]
        for name, tail in (("there", self.before), ("away", self.during)):
            p50, p99 = (f"{1e3 * s:.1f} ms" for s in (tail.p50_s, tail.p99_s))
            lines.append(f"{name:<8} {tail.num:>6} {tail.num_failed:>7} {p50:>10} {p99:>10}")
        return lines

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def run(world: World, plan: Plan, say: Say) -> Found:
    with world.deployed() as port:
        return asyncio.run(_run(world, Client(port), plan, say))


async def _run(world: World, client: Client, plan: Plan, say: Say) -> Found:
    names = world.names
    warm = names[: plan.num_warm]
    cold = names[plan.num_warm :]

    async def load(part: str, seconds: float) -> list[Answer]:
        asked = make_trace(Load(len(warm), plan.rate, seconds, seed=plan.seed)).counted
        return await client.open_loop(warm, asked, random_prompts(asked, f"{plan.seed}/{part}"))

    await client.warm(warm)
    await load("settling", plan.settle_s)
    say(f"{len(warm)} adapters are warm; {plan.seconds:.0f} s with the store")
    before = await load("before", plan.seconds)
    say(f"the store is killed, for {plan.seconds:.0f} s")
    await asyncio.to_thread(world.bucket.kill)
    num = min(len(cold), int(plan.cold_rate * plan.seconds))
    asked = [Asked(i / plan.cold_rate, i, _COLD_PROMPT, _COLD_OUTPUT) for i in range(num)]
    prompts = random_prompts(asked, "cold")
    during, refused = await asyncio.gather(load("before", plan.seconds), client.open_loop(cold, asked, prompts))
    begun = time.monotonic()
    await asyncio.to_thread(world.bucket.start)
    return_s = time.monotonic() - begun
    say(f"the store is back; it took {return_s:.1f} s to start")
    back_s = await _answered(client, [cold[a.adapter] for a in asked])
    return Found(Tail.of(before), Tail.of(during), refused, return_s, back_s)


async def _answered(client: Client, models: Sequence[str]) -> float:
    """Seconds until a request for each has been answered. Clients wait as long as they are told."""
    began = time.perf_counter()

    async def one(model: str) -> float:
        while True:
            answer = await client.ask(model, [1, 2, 3], 1, began)
            if not answer.error:
                return answer.last
            if answer.last > BACK_S:
                return math.inf
            await asyncio.sleep(max(1.0, answer.retry_after_s if math.isfinite(answer.retry_after_s) else 1.0))

    return max(await asyncio.gather(*map(one, models)), default=0.0)
