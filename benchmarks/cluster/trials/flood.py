"""One tenant floods beside another's steady requests, first as it likes and then within limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from benchmarks.cluster.trace import Asked, Load, make_trace, random_prompts
from benchmarks.cluster.trials.client import Answer, Client
from benchmarks.cluster.trials.flooder import Flood, Told, flooding
from benchmarks.cluster.trials.tails import Tail
from benchmarks.cluster.trials.world import World
from benchmarks.machine import busy_seconds
from benchmarks.processes import real_time
from loray.spec import Limits

MAX_RATIO = 1.5  # of the other tenant's p99 with a flood to that without
STEADY, USUAL, LOUD, LIMITED = "steady", "usual", "loud", "limited"  # tenants
FLOODS = {"none": None, "without limits": LOUD, "within limits": LIMITED}  # parts, and who floods in them
LIMITS = Limits(max_parallel_requests=2, rpm_limit=60, tpm_limit=30_000)  # of the last one
_LOOK_S = 0.01  # between two looks how late the clients are
_PAUSE_S = 3.0  # in which a flood begins, or what is left of it ends


@dataclass(frozen=True, slots=True)
class Plan:
    """Rates are requests a second of the tenants `steady`, which is judged, and `usual`, which is there beside it.

    rounds     that have all three parts, one after another, so that a slow minute of the machine is in all of them
    num        requests of `steady` in each part of a round
    at_once    of the tenant that floods: twice what three replicas run
    """

    rounds: int = 3
    num: int = 210
    rate: float = 5.0
    usual_rate: float = 2.0
    at_once: int = 200
    num_prompt: int = 200
    num_output: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """One part once. `cores`: processors of the machine that were busy; `late_s`: how late the clients' event loop was
    at most, which is in the times that they measure.
    """

    answers: list[Answer]
    cores: float
    late_s: float
    flood: Told


@dataclass(frozen=True, slots=True)
class Part:
    """All its rounds; its tail is that of all their answers together. `p99s`: of each round, in seconds."""

    name: str
    tail: Tail
    cores: float
    late_s: float
    flood: Told
    p99s: list[float]
    errors: list[str]

    @classmethod
    def of(cls, name: str, rounds: Sequence[Round]) -> Part:
        answers = [answer for one in rounds for answer in one.answers]
        return cls(
            name,
            Tail.of(answers),
            cores=fmean(one.cores for one in rounds),
            late_s=max(one.late_s for one in rounds),
            flood=sum((one.flood for one in rounds), Told()),
            p99s=[Tail.of(one.answers).p99_s for one in rounds],
            errors=[answer.error for answer in answers if answer.error][:10],
        )


@dataclass(frozen=True, slots=True)
class Found:
    """`parts`: without a flood, with one, and with one within limits."""

    parts: list[Part]

    def ratio(self, part: Part) -> float:
        return part.tail.p99_s / self.parts[0].tail.p99_s

    def verdicts(self) -> list[tuple[str, bool]]:
        """What is asked, in words, and whether it was reached."""
        found = []
        for part in self.parts[1:]:
            ratio = self.ratio(part)
            text = f"{part.name}: the other tenant's p99 TTFT by that without, at most {MAX_RATIO}: {ratio:.2f}"
            found.append((text, ratio <= MAX_RATIO))
        for part in self.parts:
            text = f"{part.name}: requests of the other tenant that failed: {part.tail.num_failed} of {part.tail.num}"
            found.append((text, not part.tail.num_failed))
        return found

    def table(self) -> list[str]:
        lines = [
            f"{'flood':<16} {'other':>6} {'failed':>7} {'p50 TTFT':>10} {'p99 TTFT':>10} {'ratio':>6} "
            f"{'flooder answered':>17} {'refused':>8} {'busy cores':>11} {'of it flooder':>14} {'client late':>12}"
        ]
        for part in self.parts:
            flood = part.flood
            p50, p99 = (f"{1e3 * s:.1f} ms" for s in (part.tail.p50_s, part.tail.p99_s))
            lines.append(
                f"{part.name:<16} {part.tail.num:>6} {part.tail.num_failed:>7} {p50:>10} {p99:>10} "
                f"{self.ratio(part):>6.2f} {flood.num_answered:>17} {flood.num_refused:>8} {part.cores:>11.2f} "
                f"{flood.cores:>14.2f} {1e3 * part.late_s:>9.1f} ms"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        return {"parts": [asdict(part) | {"ratio": self.ratio(part)} for part in self.parts]}


def run(world: World, plan: Plan, say: Callable[[str], None]) -> Found:
    catalog, keys = world.catalog, {}
    for tenant in (STEADY, USUAL, LOUD, LIMITED):
        catalog.create_tenant(tenant, LIMITS if tenant == LIMITED else None)
        keys[tenant] = catalog.create_key(tenant, tenant=tenant).secret
    for name in world.names:
        catalog.share(name, "public")
    with world.deployed() as port:
        asyncio.run(Client(port, keys[STEADY]).warm(world.names))
        asyncio.run(_ordinary(world, port, keys, plan, num=max(1, plan.num // 6)))  # settles
        rounds: dict[str, list[Round]] = {name: [] for name in FLOODS}
        for number in range(plan.rounds):
            for name, flooder in FLOODS.items():
                say(f"flood: {name}, round {number + 1} of {plan.rounds}")
                rounds[name].append(_round(flooder, world, port, keys, plan))
        return Found([Part.of(name, those) for name, those in rounds.items()])


def _round(flooder: str | None, world: World, port: int, keys: dict[str, str], plan: Plan) -> Round:
    """`flooder`: the tenant that floods; None: nobody does."""
    told = Told()
    with ExitStack() as stack:
        stack.enter_context(real_time())
        if flooder is not None:
            flood = Flood(port, keys[flooder], world.names, plan.at_once, plan.num_prompt, plan.num_output)
            told = stack.enter_context(flooding(flood))
        time.sleep(_PAUSE_S)
        busy, began = busy_seconds(), time.perf_counter()
        answers, late_s = asyncio.run(_ordinary(world, port, keys, plan, plan.num))
        cores = (busy_seconds() - busy) / (time.perf_counter() - began)
    time.sleep(_PAUSE_S)
    return Round(answers, cores, late_s, told)


async def _ordinary(world: World, port: int, keys: dict[str, str], plan: Plan, num: int) -> tuple[list[Answer], float]:
    """The requests of `steady`, with those of `usual` beside them. Equal in all parts. And how late the loop was."""
    steady = _requests(plan.rate, num, plan.seed, len(world.names))
    usual = [a for a in _requests(plan.usual_rate, num, plan.seed + 1, len(world.names)) if a.at < steady[-1].at]
    prompts = {STEADY: random_prompts(steady, STEADY), USUAL: random_prompts(usual, USUAL)}
    looking = asyncio.create_task(_lateness())
    answers, _ = await asyncio.gather(
        Client(port, keys[STEADY]).open_loop(world.names, steady, prompts[STEADY]),
        Client(port, keys[USUAL]).open_loop(world.names, usual, prompts[USUAL]),
    )
    looking.cancel()
    return answers, await looking


async def _lateness() -> float:
    """How late the event loop is at most, in seconds, until this is cancelled."""
    loop, longest_s = asyncio.get_running_loop(), 0.0
    while True:
        due = loop.time() + _LOOK_S
        try:
            await asyncio.sleep(_LOOK_S)
        except asyncio.CancelledError:
            return longest_s
        longest_s = max(longest_s, loop.time() - due)


def _requests(rate: float, num: int, seed: int, num_adapters: int) -> Sequence[Asked]:
    """The first `num` of a power law's."""
    seconds = 2 * num / rate + 30 / rate
    return make_trace(Load(num_adapters, rate, seconds, seed=seed)).counted[:num]
