"""What is reported of an outcome: quantiles, costs, and their course over the run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loray.errors import SpecError
from loray.simulation.simulator import Outcome
from loray.simulation.workload.requests import Floats, Requests


class Summary(NamedTuple):
    """Of one policy over one run or several, without the warm-up. Times in seconds, without probes; means over the runs
    where they are quantiles.

    max_replicas  the most at a time, of those there when the first of these requests came and later
    tokens_per_s  generated, from the first arrival to the last token
    """

    p50_ttft_s: float
    p99_ttft_s: float
    mean_ttft_s: float
    mean_latency_s: float
    cold_loads: float
    cold_share: float
    evictions: float
    replica_hours: float
    max_replicas: float
    tokens_per_s: float

    def to_json(self) -> dict[str, Any]:
        return {name: round(value, 6) for name, value in self._asdict().items()}


def summary(outcome: Outcome, requests: Requests) -> Summary:
    counted = slice(outcome.num_warming, None)
    ttft_R, end_R = outcome.ttft_R[counted], outcome.end_R[counted]
    at_R, output_R = requests.at_R[counted], requests.output_R[counted]
    timed_R = np.ones(len(ttft_R), bool) if requests.probe_R is None else ~requests.probe_R[counted]
    if not timed_R.any():
        raise SpecError("all requests after the warm-up are probes")
    p50, p99 = np.quantile(ttft_R[timed_R], (0.5, 0.99))
    times = [at for at, _ in outcome.replicas]
    first = max(0, bisect_right(times, at_R[0]) - 1) if outcome.num_warming else 0
    return Summary(
        p50_ttft_s=float(p50),
        p99_ttft_s=float(p99),
        mean_ttft_s=float(ttft_R[timed_R].mean()),
        mean_latency_s=float(end_R[timed_R].mean()),
        cold_loads=outcome.cold_loads,
        cold_share=outcome.cold_loads / len(ttft_R),
        evictions=outcome.evictions,
        replica_hours=outcome.replica_hours,
        max_replicas=max((number for _, number in outcome.replicas[first:]), default=0),
        tokens_per_s=float(output_R.sum() / ((at_R + end_R).max() - at_R[0])),
    )


def mean(summaries: Sequence[Summary]) -> Summary:
    return Summary(*(sum(column) / len(summaries) for column in zip(*summaries, strict=True)))


class Course(NamedTuple):
    """Of one policy, by time: `at_B` are the ends of B equal parts of the run, in seconds.

    p50_B, p99_B   seconds to the first token, of the requests that came in the part; NaN without one
    loads_B        cold loads in the part
    replicas_B     replicas at its end
    """

    policy: str
    at_B: Floats
    p50_B: Floats
    p99_B: Floats
    loads_B: Floats
    replicas_B: Floats


def course(outcome: Outcome, requests: Requests, num_parts: int = 60) -> Course:
    edges = np.linspace(0.0, requests.seconds, num_parts + 1)
    part_R = np.clip(np.searchsorted(edges, requests.at_R, side="right") - 1, 0, num_parts - 1)
    starts = np.searchsorted(part_R, np.arange(num_parts + 1))
    quantiles = np.full((2, num_parts), np.nan)
    for part in range(num_parts):
        ttft = outcome.ttft_R[starts[part] : starts[part + 1]]
        if len(ttft):
            quantiles[:, part] = np.quantile(ttft, (0.5, 0.99))
    times, replicas = np.array(outcome.replicas).T
    loads = np.interp(edges, *np.array(outcome.loads, float).T)
    at = np.clip(np.searchsorted(times, edges[1:], side="right") - 1, 0, None)
    return Course(outcome.policy, edges[1:], quantiles[0], quantiles[1], np.diff(loads), replicas[at])
