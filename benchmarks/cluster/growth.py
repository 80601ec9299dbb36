"""Replicas that follow the working set, and two bases that scale apart, on a real cluster over HTTP.

    python -m benchmarks.cluster.growth
    python -m benchmarks.cluster.growth --minutes 6 --plot growth.svg --json growth.json

Two bases of a tiny model in one deployment, each with its own autoscaler. Base A has one rate from the beginning to the
end. Its adapters in demand are a few, grow to more than one pool holds, stay, shrink, and are a few again. Base B is
asked once while A's are a few, and has a load of its own at the end. docs/benchmarks/cluster.md explains it.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import signal
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import inf, isinf, nan
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx
import numpy as np

from benchmarks.cluster.measured import Seen, adapter_config, figures, send
from benchmarks.cluster.trace import Asked, arrivals
from benchmarks.options import one_or_more
from benchmarks.report import Report, machine_line, quantile
from benchmarks.world import (
    World,
    describe_machine,
    load_average,
    started_cluster,
    until,
)
from loray.bases.registry import add_base
from loray.errors import LorayError
from loray.local.processes import LOOPBACK, free_ports
from loray.schemas.status import Status
from loray.spec import AutoscalingSpec, FleetSpec, ServeSpec
from tests.fixtures.publisher import publish_copies
from tests.fixtures.tiny import write_checkpoint

A, B = "tiny", "second"
MOST_B = 3  # replicas of B
COLUMNS = (
    "s\t.0f", "A: adapters\t.0f", "pools\t.2f", "wanted", "run", "p50 TTFT, ms\t.1f", "p99 TTFT, ms\t.1f",
    "not in pool\t.1%", "B: adapters\t.0f", "pools\t.2f", "wanted", "run", "p99 TTFT, ms\t.1f",
)  # fmt: skip
ROW_S = 15.0
_GROWS, _STAYS, _SHRINKS, _IS_BACK = 0.16, 0.32, 0.46, 0.54  # shares of the run, as all times of the plan
_WAKES, _B_BEGINS, _B_ENDS = 0.08, 0.72, 0.88
_FULL_S = 600.0  # of which the autoscalers' times are parts
_MIN_WINDOW_S = 9.0
_POOL_BYTES, _HOST_BYTES, _CONTEXT = 1 << 20, 32 << 20, 512
_WORKING_SET = re.compile(r"working set ([\d.]+) MiB of (\d+) adapters")


Draw = Callable[[random.Random, float], int]


@dataclass(frozen=True, slots=True)
class Plan:
    """rate, rate_b     requests a second of A, and of B while it has its load
    few, many, many_b   adapters in demand: A's at least and at most, and B's
    prompt, output      tokens of each request
    most                replicas that A may have
    """

    minutes: float = 10.0
    rate: float = 6.0
    rate_b: float = 4.0
    few: int = 12
    many: int = 80
    many_b: int = 48
    prompt: int = 64
    output: int = 8
    most: int = 4
    seed: int = 0

    @property
    def seconds(self) -> float:
        return 60 * self.minutes

    @property
    def wakes_s(self) -> float:
        """When B is asked once."""
        return _WAKES * self.seconds

    def in_demand(self, at: float) -> int:
        """A's adapters in demand, at this second."""
        shares = (_GROWS, _STAYS, _SHRINKS, _IS_BACK)
        return round(float(np.interp(at / self.seconds, shares, (self.few, self.many, self.many, self.few))))

    def warm(self) -> list[Asked]:
        """Each of A's few adapters once, before the run."""
        return [Asked(i / self.rate, i, self.prompt, self.output) for i in range(self.few)]

    def requests(self) -> list[Asked]:
        """In the order of time. Adapters from `many` on are B's. Equal for equal plans."""

        def part(name: str, rate: float, begins: float, ends: float, adapter: Draw) -> list[Asked]:
            chance, times = random.Random(f"{self.seed}/{name}"), random.Random(f"{self.seed}/times of {name}")
            due = arrivals(times, rate, begins, ends)
            return [Asked(at, adapter(chance, at), self.prompt, self.output) for at in due]

        of_a = part("a", self.rate, 0.0, self.seconds, lambda chance, at: chance.randrange(self.in_demand(at)))
        ends = _B_BEGINS * self.seconds, _B_ENDS * self.seconds
        of_b = part("b", self.rate_b, *ends, lambda chance, at: self.many + chance.randrange(self.many_b))
        return sorted([*of_a, Asked(self.wakes_s, self.many, self.prompt, self.output), *of_b])

    def fleet(self, port: int) -> FleetSpec:
        """The autoscalers' windows and delays are those of a run of ten minutes, or shorter in proportion."""
        pace = self.seconds / _FULL_S
        times = {"window_s": max(_MIN_WINDOW_S, 30 * pace), "upscale_delay_s": 3.0, "startup_s": 10.0}
        times |= {"downscale_delay_s": 20 * pace, "downscale_to_zero_delay_s": 20 * pace}
        spec = ServeSpec(
            base=A,
            dtype="float32",
            num_threads=1,
            pool_bytes=_POOL_BYTES,
            host_bytes=_HOST_BYTES,
            max_model_len=_CONTEXT,
            enable_prefix_caching=False,  # all prompts differ
            port=port,
            autoscaling=AutoscalingSpec(min_replicas=1, max_replicas=self.most, **times),
        )
        of_b = AutoscalingSpec(min_replicas=0, max_replicas=MOST_B, **times)
        return FleetSpec.of(spec, spec.model_copy(update={"base": B, "autoscaling": of_b}))


class Look(NamedTuple):
    """At one base. `at`: seconds of time.perf_counter(), and then after the run's begin.

    target        replicas that its autoscaler wants
    replicas      those that answer
    num_adapters  in demand, as its autoscaler says; `pools`: how many pools they fill. NaN where it says nothing
    asked         requests so far for an adapter, at all its replicas; `outside`: those that did not find it in the pool
    """

    at: float
    target: int
    replicas: frozenset[str]
    num_adapters: float
    pools: float
    asked: int
    outside: int


class Change(NamedTuple):
    """Of the number of replicas that is wanted. `at`: as a look's."""

    at: float
    before: int
    after: int
    reason: str


class Watch:
    """Looks at GET /status once a second while `running`. A look that gets no answer is left out, and counted."""

    def __init__(self, port: int) -> None:
        self.looks: dict[str, list[Look]] = {A: [], B: []}
        self.num_lost = 0
        self._url = f"http://{LOOPBACK}:{port}"
        self._changes: dict[str, dict[float, Change]] = {A: {}, B: {}}
        self._counts: dict[str, tuple[str, int, int]] = {}  # replica → base and its last counts
        self._ends = threading.Event()

    def changes(self, base: str) -> list[Change]:
        return [change for _, change in sorted(self._changes[base].items())]

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="watch")
        thread.start()
        try:
            yield
        finally:
            self._ends.set()
            thread.join()

    def take(self, status: Status, at: float, epoch: float) -> None:
        """`epoch`: seconds between the epoch and time.perf_counter()'s zero."""
        for replica in status.replicas:
            missed = replica.num_host_hits + replica.num_misses
            self._counts[replica.replica] = (replica.base, replica.num_pool_hits + missed, missed)
        for base in status.bases:
            scaling, pool_bytes = base.autoscaling, base.spec.fixed_pool_bytes
            said = _WORKING_SET.search(scaling.reason) if scaling else None
            unknown = 0.0 if base.target == 0 else nan
            counts = [(asked, missed) for name, asked, missed in self._counts.values() if name == base.base]
            look = Look(
                at,
                base.target,
                frozenset(replica.replica for replica in status.replicas if replica.base == base.base),
                num_adapters=float(said[2]) if said else unknown,
                pools=float(said[1]) * (1 << 20) / pool_bytes if said and pool_bytes else unknown,
                asked=sum(asked for asked, _ in counts),
                outside=sum(missed for _, missed in counts),
            )
            self.looks[base.base].append(look)
            for told in scaling.decisions if scaling else ():
                change = Change(told.time - epoch, told.from_replicas, told.to_replicas, told.reason)
                self._changes[base.base][told.time] = change

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=10) as http:
            while not self._ends.wait(1.0):
                try:
                    status = Status.model_validate_json(http.get("/status").raise_for_status().content)
                except (httpx.HTTPError, LorayError, ValueError):
                    self.num_lost += 1
                    continue
                at = time.perf_counter()
                self.take(status, at, time.time() - at)


@dataclass(frozen=True)
class Course:
    """Of one base. Times are seconds after the first request was due to be sent."""

    base: str
    seen: Sequence[Seen]
    looks: Sequence[Look]
    changes: Sequence[Change]

    def look(self, at: float) -> Look | None:
        """The last one by then."""
        index = bisect_right(self.looks, at, key=lambda look: look.at)
        return self.looks[index - 1] if index else None

    def num_replaced(self, begins: float, ends: float) -> int:
        """How many other sets of replicas answered in this time than at its begin."""
        first = self.look(begins)
        inside = {look.replicas for look in self.looks if begins <= look.at <= ends}
        return len(inside | ({first.replicas} if first else set())) - 1

    @property
    def num_turns(self) -> int:
        """How often the number of replicas that is wanted changed in the other direction than before."""
        ups = [change.after > change.before for change in self.changes if change.after != change.before]
        return sum(up != before for before, up in pairwise(ups))

    @property
    def spans(self) -> list[tuple[float, float]]:
        """From each start from zero, of the number that is wanted, to the return to it."""
        found: list[tuple[float, float]] = []
        begins = None
        for change in self.changes:
            begins = change.at if begins is None else begins
            if change.after == 0:
                found.append((begins, change.at))
                begins = None
        return found if begins is None else [*found, (begins, inf)]


class Row(NamedTuple):
    """Of one base, in the `ROW_S` that begin at `at`.

    p50_s, p99_s   from the due time to the first token, of the requests that were due; a failed one never has it
    outside        share of the requests that did not find their adapter in the pool
    target, running, num_adapters, pools   as of its end; see `Look`
    """

    at: float
    requests: int
    errors: int
    p50_s: float
    p99_s: float
    outside: float
    target: int
    running: int
    num_adapters: float
    pools: float


def rows(course: Course, seconds: float) -> list[Row]:
    found = []
    for at in np.arange(0.0, seconds, ROW_S).tolist():
        ends = min(at + ROW_S, seconds)
        due = [seen for seen in course.seen if at <= seen.at < ends]
        ttft = sorted(inf if seen.error else seen.ttft for seen in due)
        # Between a finite value and none lies none.
        p50, p99 = (ttft[round(q * (len(ttft) - 1))] if inf in ttft else quantile(ttft, q) for q in (0.5, 0.99))
        nothing = Look(at, 0, frozenset(), nan, nan, 0, 0)
        before, after = course.look(at) or nothing, course.look(ends) or nothing
        asked, missed = after.asked - before.asked, after.outside - before.outside
        share, errors = missed / asked if asked else nan, sum(bool(seen.error) for seen in due)
        state = (after.target, len(after.replicas), after.num_adapters, after.pools)
        found.append(Row(at, len(due), errors, p50, p99, share, *state))
    return found


def cells(a: Row, b: Row) -> list[Any]:
    def ms(seconds: float) -> float | str:
        return "failed" if isinf(seconds) else 1e3 * seconds

    of_a = [a.at, a.num_adapters, a.pools, a.target, a.running, ms(a.p50_s), ms(a.p99_s), a.outside]
    return [*of_a, b.num_adapters, b.pools, b.target, b.running, ms(b.p99_s)]


class Check(NamedTuple):
    text: str
    is_met: bool


def checks(a: Course, b: Course, of_a: Sequence[Row], slo_s: float, wakes_s: float) -> list[Check]:
    """What is asked of the run. `wakes_s`: when B is asked for the first time."""
    spans_a = [(a.changes[0].at, a.changes[-1].at)] if a.changes else []
    spans_b = [span for span in b.spans if span[1] >= wakes_s]
    seen = [*a.seen, *b.seen]
    num_failed = sum(bool(one.error) for one in seen)
    answered = f"{len(seen) - num_failed:,} of {len(seen):,} requests are answered"
    return [
        *_growth(a, of_a, slo_s),
        _wake(b, wakes_s),
        _untouched("A", a, "B", spans_b),
        _untouched("B", b, "A", spans_a),
        Check(answered, not num_failed),
    ]


def _growth(a: Course, of_a: Sequence[Row], slo_s: float) -> list[Check]:
    out = next((look.at for look in a.looks if look.at >= 0 and len(look.replicas) > 1), inf)
    left = [row.at for row in of_a if row.p99_s > slo_s]
    first = f"first in the row at {left[0]:.0f} s, in {len(left)} of {len(of_a)}" if left else "in no row"
    when = f"after {out:.0f} s" if out < inf else "never"
    most = max((len(look.replicas) for look in a.looks), default=0)
    last = a.looks[-1] if a.looks else None
    ends = f"{last.target} wanted, {len(last.replicas)} running" if last else "unknown"
    is_back = last is not None and most > 1 and last.target == len(last.replicas) == 1
    text = f"A's second replica runs {when}, before its p99 TTFT is above {slo_s:g} s: {first}"
    turns = f"A does not flap: {len(a.changes)} changes of the number, {a.num_turns} of direction"
    return [
        Check(text, out < min(left, default=inf)),
        Check(f"A shrinks back: at most {most} replicas, at the end {ends}", is_back),
        Check(turns, bool(a.num_turns <= 1 < most)),
    ]


def _wake(b: Course, wakes_s: float) -> Check:
    before = b.look(wakes_s)
    slept = before is not None and before.target == 0 and not before.replicas
    first = min(b.seen, key=lambda seen: seen.at)
    came = first.error or f"its first token came after {first.ttft:.1f} s"
    text = f"B is {'at zero' if slept else 'NOT at zero'} when it is asked for the first time; {came}"
    return Check(text, slept and not first.error)


def _untouched(name: str, course: Course, other: str, spans: Sequence[tuple[float, float]]) -> Check:
    """While one base's number changes, the other's does not."""
    num_changes = sum(begins <= change.at <= ends for begins, ends in spans for change in course.changes)
    num_replaced = sum(course.num_replaced(*span) for span in spans)
    times = ", ".join(f"{begins:.0f} to {ends:.0f} s" for begins, ends in spans) or "never"
    text = f"while {other}'s number changes ({times}) {name}'s is changed {num_changes} times, and its replicas "
    return Check(f"{text}{num_replaced} times", bool(spans) and not num_changes and not num_replaced)


def draw(title: str, courses: Sequence[Course], of: Sequence[Sequence[Row]], seconds: float, slo_s: float) -> str:
    """As SVG, a value a second; the p99 of a row stands at all of its seconds, NaN where a request failed."""
    from loray.cli.pictures import Chart, draw_charts

    at = np.arange(0.0, seconds + 1)

    def course(value: Callable[[Look], float]) -> list[Any]:
        return [np.array([nan if look is None else value(look) for look in map(c.look, at.tolist())]) for c in courses]

    p99 = [np.array([rows[min(int(s // ROW_S), len(rows) - 1)].p99_s for s in at.tolist()]) for rows in of]
    slo = [*(np.where(np.isinf(p), nan, p) for p in p99), np.full(len(at), slo_s)]
    charts = [
        Chart("replicas that run", course(lambda look: len(look.replicas))),
        Chart("replicas that the autoscaler wants", course(lambda look: look.target)),
        Chart("pools that the adapters in demand fill", course(lambda look: look.pools), has_gaps=True),
        Chart(f"p99 of the first token of each {ROW_S:g} s, s", slo, is_log=True, has_gaps=True),
    ]
    return draw_charts(title, [*(c.base for c in courses), f"SLO {slo_s:g} s"], at / 60, charts)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the cluster is ended
    plan = Plan(args.minutes, args.rate, most=args.replicas, seed=args.seed)
    machine, load = describe_machine(), load_average()
    click.echo(machine_line(machine, load=f"{load:.2f}"))
    fleet = plan.fleet(free_ports(1)[0])
    with started_cluster(plan.many, plan.most + MOST_B + 1, adapter_config(), base=A) as world:
        checkpoint = write_checkpoint(world.folder / "second", seed=1, max_position_embeddings=4096)
        base = add_base(str(checkpoint), home=world.settings.home, name=B)
        own = publish_copies(world.folder / "of-second", base, world.settings, [adapter_config()], plan.many_b, "b")
        a, b, num_lost = _run(world, fleet, plan, [*world.names, *own])
    of_a, of_b = rows(a, plan.seconds), rows(b, plan.seconds)
    found = checks(a, b, of_a, args.slo, plan.wakes_s)
    more = {
        "load": load,
        "plan": asdict(plan),
        "slo_s": args.slo,
        "fleet": fleet.to_args(),
        "changes": {c.base: [change._asdict() for change in c.changes] for c in (a, b)},
        "errors": [f"{s.at:.1f} s: {s.error}" for s in (*a.seen, *b.seen) if s.error],
        "looks_lost": num_lost,
        "checks": [check._asdict() for check in found],
    }
    lines = [cells(*pair) for pair in zip(of_a, of_b, strict=True)]
    report = Report(machine, COLUMNS, lines, shlex.join(sys.argv[1:]), more)
    click.echo(report.text())
    for c in (a, b):
        for change in c.changes:
            click.echo(f"{c.base} {change.at:5.0f} s: {change.before} → {change.after}: {change.reason}")
    click.echo("\n".join(f"{'met' if check.is_met else 'MISSED':<7}{check.text}" for check in found))
    report.write(args.json)
    if args.plot is not None:
        title = f"{plan.rate:g} requests a second for {plan.few} to {plan.many} adapters, and a base that sleeps"
        args.plot.write_text(draw(title, [a, b], [of_a, of_b], plan.seconds, args.slo), encoding="utf-8")
    return 0 if all(check.is_met for check in found) else 1


def _run(world: World, fleet: FleetSpec, plan: Plan, names: Sequence[str]) -> tuple[Course, Course, int]:
    """The courses of A and of B, and how many looks had no answer."""
    with world.deployed(fleet) as port:
        watch = Watch(port)
        until(lambda: bool(figures(port)), "a replica answers")
        with watch.running():
            send(port, names, plan.warm(), "warm")
            click.echo(f"{plan.minutes:g} minutes begin")
            began, seen = send(port, names, plan.requests(), "counted")
            time.sleep(max(0.0, began + plan.seconds - time.perf_counter()))

    def course(base: str) -> Course:
        own = [s for s in seen if (s.adapter < plan.many) == (base == A)]
        looks = [look._replace(at=look.at - began) for look in watch.looks[base]]
        return Course(base, own, looks, [change._replace(at=change.at - began) for change in watch.changes(base)])

    return course(A), course(B), watch.num_lost


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Plan()
    add("--minutes", type=float, default=default.minutes, help="at least 2 (default %(default)g)")
    add("--rate", type=float, default=default.rate, help="of A, requests a second (default %(default)g)")
    add("--replicas", type=one_or_more, default=default.most, help="A's at most; 1: without (default %(default)d)")
    add("--slo", type=float, default=0.5, help="seconds to the first token, p99 of 15 s (default %(default)g)")
    add("--seed", type=int, default=default.seed)
    add("--plot", type=Path, help="write a picture there, as SVG")
    add("--json", type=Path, help="write all figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
