"""A run by time: rows of 15 s, and what is asked of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, nan
from typing import Any, NamedTuple

from benchmarks.cluster.client import Seen
from benchmarks.cluster.growth.watch import Change, Look
from benchmarks.serving.figures.rows import quantile

ROW_S = 15.0


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

    def replicas_in(self, begins: float, ends: float) -> set[frozenset[str]]:
        """The sets of replicas that answered in this time."""
        inside = [look for look in self.looks if begins <= look.at <= ends]
        first = self.look(begins)
        return {look.replicas for look in ([first] if first else []) + inside}

    def changes_in(self, begins: float, ends: float) -> list[Change]:
        return [change for change in self.changes if begins <= change.at <= ends]

    @property
    def turns(self) -> int:
        """How often the number of replicas that is wanted changed in the other direction than before."""
        ups = [change.after > change.before for change in self.changes if change.after != change.before]
        return sum(up != before for before, up in pairwise(ups))


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

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: a time that never comes is null, as one of no request."""
        return {name: None if value == inf else value for name, value in self._asdict().items()}


def rows(course: Course, seconds: float) -> list[Row]:
    found, at = [], 0.0
    while at < seconds:
        ends = min(at + ROW_S, seconds)
        due = [seen for seen in course.seen if at <= seen.at < ends]
        ttft = sorted(inf if seen.error else seen.ttft for seen in due)
        before, after = course.look(at), course.look(ends)
        asked = after.asked - (before.asked if before else 0) if after else 0
        missed = after.outside - (before.outside if before else 0) if after else 0
        found.append(
            Row(
                at=at,
                requests=len(due),
                errors=sum(bool(seen.error) for seen in due),
                p50_s=_quantile(ttft, 0.5),
                p99_s=_quantile(ttft, 0.99),
                outside=missed / asked if asked else nan,
                target=after.target if after else 0,
                running=len(after.replicas) if after else 0,
                num_adapters=after.num_adapters if after else nan,
                pools=after.pools if after else nan,
            )
        )
        at += ROW_S
    return found


def _quantile(ascending: Sequence[float], q: float) -> float:
    """Between a finite value and none lies none."""
    if ascending and ascending[-1] == inf:
        return ascending[round(q * (len(ascending) - 1))]
    return quantile(ascending, q)


_HEADER = (
    f"{'s':>5}  {'A: adapters':>11} {'pools':>6} {'wanted':>6} {'run':>4} {'p50 TTFT':>10} {'p99 TTFT':>10} "
    f"{'not in pool':>11}  {'B: adapters':>11} {'pools':>6} {'wanted':>6} {'run':>4} {'p99 TTFT':>10}"
)


def table(a: Sequence[Row], b: Sequence[Row]) -> list[str]:
    lines = [_HEADER]
    for ours, theirs in zip(a, b, strict=True):
        lines.append(
            f"{ours.at:>5.0f}  {_or(ours.num_adapters, '.0f'):>11} {_or(ours.pools, '.2f'):>6} {ours.target:>6} "
            f"{ours.running:>4} {_ms(ours.p50_s):>10} {_ms(ours.p99_s):>10} {_or(ours.outside, '.1%'):>11}  "
            f"{_or(theirs.num_adapters, '.0f'):>11} {_or(theirs.pools, '.2f'):>6} {theirs.target:>6} "
            f"{theirs.running:>4} {_ms(theirs.p99_s):>10}"
        )
    return lines


def _or(value: float, form: str) -> str:
    return "–" if value != value else format(value, form)


def _ms(seconds: float) -> str:
    return "–" if seconds != seconds else "failed" if seconds == inf else f"{1e3 * seconds:.1f} ms"


class Verdict(NamedTuple):
    text: str
    is_reached: bool


def verdicts(a: Course, b: Course, of_a: Sequence[Row], slo_s: float, wakes_s: float) -> list[Verdict]:
    """What is asked of the run. `wakes_s`: when B is asked for the first time."""
    return [
        *_growth(a, of_a, slo_s),
        _wake(b, wakes_s),
        *_apart(a, b, wakes_s),
        _answered((*a.seen, *b.seen)),
    ]


def _growth(a: Course, of_a: Sequence[Row], slo_s: float) -> list[Verdict]:
    out = next((look.at for look in a.looks if look.at >= 0 and len(look.replicas) > 1), inf)
    left = [row.at for row in of_a if row.p99_s > slo_s]
    first = f"first in the row at {left[0]:.0f} s, in {len(left)} of {len(of_a)}" if left else "in no row"
    when = f"after {out:.0f} s" if out < inf else "never"
    text = f"A's second replica runs {when}, before its p99 TTFT is above {slo_s:g} s: {first}"
    most = max((len(look.replicas) for look in a.looks), default=0)
    last = a.looks[-1] if a.looks else None
    ends = f"{last.target} wanted, {len(last.replicas)} running" if last else "unknown"
    is_back = last is not None and most > 1 and last.target == len(last.replicas) == 1
    return [
        Verdict(text, out < min(left, default=inf)),
        Verdict(f"A shrinks back: at most {most} replicas, at the end {ends}", is_back),
        Verdict(
            f"A does not flap: {len(a.changes)} changes of the number, {a.turns} of direction",
            bool(a.turns <= 1 < most),
        ),
    ]


def _wake(b: Course, wakes_s: float) -> Verdict:
    before = b.look(wakes_s)
    slept = before is not None and before.target == 0 and not before.replicas
    first = min(b.seen, key=lambda seen: seen.at)
    came = first.error or f"its first token came after {first.ttft:.1f} s"
    text = f"B is {'at zero' if slept else 'NOT at zero'} when it is asked for the first time; {came}"
    return Verdict(text, slept and not first.error)


def _apart(a: Course, b: Course, wakes_s: float) -> list[Verdict]:
    """While one base's number changes, the other's does not."""
    of_a = [change.at for change in a.changes]
    spans_a = [(min(of_a), max(of_a))] if of_a else []
    return [
        _untouched("A", a, "B", _spans([change for change in b.changes if change.at >= wakes_s])),
        _untouched("B", b, "A", spans_a),
    ]


def _spans(changes: Sequence[Change]) -> list[tuple[float, float]]:
    """From each start from zero to the return to it."""
    found: list[tuple[float, float]] = []
    begins = None
    for change in changes:
        begins = change.at if begins is None else begins
        if change.after == 0:
            found.append((begins, change.at))
            begins = None
    return found if begins is None else [*found, (begins, inf)]


def _untouched(name: str, course: Course, other: str, spans: Sequence[tuple[float, float]]) -> Verdict:
    num_changes = sum(len(course.changes_in(*span)) for span in spans)
    num_replaced = sum(len(course.replicas_in(*span)) - 1 for span in spans)
    times = ", ".join(f"{begins:.0f} to {ends:.0f} s" for begins, ends in spans) or "never"
    text = (
        f"while {other}'s number changes ({times}) {name}'s is changed {num_changes} times, and its replicas "
        f"{num_replaced} times"
    )
    return Verdict(text, bool(spans) and not num_changes and not num_replaced)


def _answered(seen: Iterable[Seen]) -> Verdict:
    found = list(seen)
    errors = [one.error for one in found if one.error]
    return Verdict(f"{len(found) - len(errors):,} of {len(found):,} requests are answered", not errors)
