"""What else worked on the machine while a request waited, as the simulator's clock counts it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster.client import Seen

Floats = NDArray[np.float64]


class Crowd:
    """Requests are on their way until a replica has accepted them; a replica works while it has one or more."""

    def __init__(self, seen: Sequence[Seen]) -> None:
        self._ways = np.array([(s.at, s.routed) for s in seen], np.float64).reshape(-1, 2)
        self._busy = {part[0].replica: _union([(s.routed, s.last) for s in part]) for part in by_replica(seen)}

    def beside(self, s: Seen, start: float, end: float) -> float:
        """The mean number of those that worked from `start` to `end` beside the request: others on their way, and
        replicas, of which its own counts until it has the request.
        """
        ways = _overlap(self._ways, start, end) - _overlap(np.array([[s.at, s.routed]]), start, end)
        replicas = sum(
            _overlap(busy, start, min(end, s.routed) if name == s.replica else end) for name, busy in self._busy.items()
        )
        return (ways + replicas) / (end - start)


def by_replica(seen: Sequence[Seen]) -> list[list[Seen]]:
    """In the order in which each accepted them."""
    found: dict[str, list[Seen]] = {}
    for s in sorted(seen, key=lambda s: s.routed):
        found.setdefault(s.replica, []).append(s)
    return list(found.values())


def _overlap(spans: Floats, start: float, end: float) -> float:
    """Seconds of all spans (N, 2) between the two."""
    return float(np.clip(np.minimum(spans[:, 1], end) - np.maximum(spans[:, 0], start), 0.0, None).sum())


def _union(spans: Sequence[tuple[float, float]]) -> Floats:
    """Spans that do not overlap and cover the same."""
    found: list[list[float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return np.array(found, np.float64)
