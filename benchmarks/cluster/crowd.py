"""What else worked on the machine while a request waited, as the simulator's clock counts it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster.client import Seen
from loray.simulation.cluster import Slowdown

Floats = NDArray[np.float64]


class Crowd:
    """Requests are on their way until a replica has accepted them; a replica works while it has one or more."""

    def __init__(self, seen: Sequence[Seen], processors: float) -> None:
        spans = [(s.at, s.routed) for s in seen]
        for part in by_replica(seen):
            spans += _union([(s.routed, s.last) for s in part])
        starts, ends = np.array(spans, np.float64).reshape(-1, 2).T
        changes = np.concatenate([np.ones(len(spans), np.int64), -np.ones(len(spans), np.int64)])
        order = np.argsort(times := np.concatenate([starts, ends]), kind="stable")
        self._times = times[order]
        slowdowns = np.array([Slowdown.of(num, processors) for num in np.cumsum(changes[order])[:-1].tolist()])
        passed = np.diff(self._times)[:, None] * slowdowns.reshape(-1, 2)
        self._sums = np.concatenate([np.zeros((1, 2)), np.cumsum(passed, axis=0)])  # until each of the times

    def slowdown(self, start: float, end: float) -> Slowdown:
        """The mean from `start` to `end` of what a request was slowed by that was at work, on its way or on its
        replica.
        """
        until = [[np.interp(at, self._times, column) for column in self._sums.T] for at in (start, end)]
        return Slowdown(*(float(b - a) / (end - start) for a, b in zip(*until, strict=True)))


def by_replica(seen: Sequence[Seen]) -> list[list[Seen]]:
    """In the order in which each accepted them."""
    found: dict[str, list[Seen]] = {}
    for s in sorted(seen, key=lambda s: s.routed):
        found.setdefault(s.replica, []).append(s)
    return list(found.values())


def _union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that do not overlap and cover the same."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found
