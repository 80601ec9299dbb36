"""The run as SVG: replicas, working sets and times to the first token of both bases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nan

import numpy as np

from benchmarks.cluster.growth.course import ROW_S, Course, Row
from benchmarks.cluster.growth.watch import Look
from loray.cli.pictures import Chart, draw_charts
from loray.simulation.workload import Floats


def draw(title: str, courses: Sequence[Course], rows: Sequence[Sequence[Row]], seconds: float, slo_s: float) -> str:
    """A value a second; the p99 of a row stands at all of its seconds, and where a request failed there is none."""
    at = np.arange(0.0, seconds + 1)

    def course(value: Callable[[Look], float]) -> list[Floats]:
        return [np.array([nan if look is None else value(look) for look in map(c.look, at.tolist())]) for c in courses]

    p99 = [np.array([_finite(of[min(int(s // ROW_S), len(of) - 1)].p99_s) for s in at.tolist()]) for of in rows]
    charts = [
        Chart("replicas that run", course(lambda look: len(look.replicas))),
        Chart("replicas that the autoscaler wants", course(lambda look: look.target)),
        Chart("pools that the adapters in demand fill", course(lambda look: look.pools), has_gaps=True),
        Chart(
            f"p99 of the first token of each {ROW_S:g} s, s",
            [*p99, np.full(len(at), slo_s)],
            is_log=True,
            has_gaps=True,
        ),
    ]
    return draw_charts(title, [*(c.base for c in courses), f"SLO {slo_s:g} s"], at / 60, charts)


def _finite(value: float) -> float:
    return nan if value == inf else value
