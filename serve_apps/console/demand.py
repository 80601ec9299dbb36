"""Demand over time: the server's state whenever somebody looked."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from loray.schemas.status import Status

_BETWEEN_S = 1.0
_WINDOW_S = 60.0
_KEPT_S = 1800.0
MOST_POINTS = 400


class DemandMoment(NamedTuple):
    """Requests, adapters and replicas at `at`, seconds of a monotonic clock, and the tokens generated until then."""

    at: float
    num_running: int
    num_waiting: int
    num_loading: int
    num_replicas: int
    num_output_tokens: int


class DemandRow(NamedTuple):
    """A line of the table: `ago_s` before the last look; tokens a second since the row before, None in the first."""

    ago_s: float
    num_running: int
    num_waiting: int
    num_loading: int
    num_replicas: int
    tokens_per_s: float | None


class Demand:
    """The moments of half an hour in which somebody looked, at most one a second. Used from one event loop.

    Tokens are the sum of what each replica generated from one look to the next, a new one from its start on: the sum
    never falls when replicas go.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._moments: deque[DemandMoment] = deque()
        self._num_tokens = 0
        self._counted: dict[tuple[str, int], tuple[float, int]] = {}  # by name and pid: when, and what it said then

    def note(self, status: Status) -> None:
        now, totals = self._clock(), status.totals
        if self._moments and now - self._moments[-1].at < _BETWEEN_S:
            return
        for replica in status.replicas:
            key, num_tokens = (replica.replica, replica.pid), replica.num_output_tokens
            _, before = self._counted.get(key, (now, 0))
            self._num_tokens += num_tokens - before if num_tokens >= before else num_tokens
            self._counted[key] = (now, num_tokens)
        self._counted = {key: known for key, known in self._counted.items() if now - known[0] <= _KEPT_S}
        moment = DemandMoment(
            now,
            totals.num_running,
            totals.num_waiting,
            totals.num_loading,
            len(status.replicas),
            self._num_tokens,
        )
        self._moments.append(moment)
        while now - self._moments[0].at > _KEPT_S:
            self._moments.popleft()

    def tokens_per_s(self) -> float | None:
        """Return output tokens a second over the last minute in which somebody looked; None before the second look."""
        if not self._moments:
            return None
        first = last = self._moments[-1]
        for earlier in islice(reversed(self._moments), 1, None):
            if last.at - earlier.at > _WINDOW_S and first is not last:
                break
            first = earlier
        return None if first is last else _pace(first, last)

    def curve(self) -> str:
        """Return JSON of [seconds before the last look, negative, running, waiting]; empty before two looks."""
        shown = self._thinned(MOST_POINTS)
        if len(shown) < 2:
            return ""
        end = shown[-1].at
        return json.dumps(
            [
                [round(moment.at - end, 1) for moment in shown],
                [moment.num_running for moment in shown],
                [moment.num_waiting for moment in shown],
            ]
        )

    def rows(self, most: int) -> list[DemandRow]:
        """Return at most so many of the same moments, evenly spread, the last one first."""
        shown = self._thinned(most)
        before = [None, *shown[:-1]] if shown else []
        return [
            DemandRow(
                shown[-1].at - moment.at,
                moment.num_running,
                moment.num_waiting,
                moment.num_loading,
                moment.num_replicas,
                None if earlier is None else _pace(earlier, moment),
            )
            for earlier, moment in zip(reversed(before), reversed(shown), strict=True)
        ]

    def _thinned(self, most: int) -> list[DemandMoment]:
        moments = list(self._moments)
        stride = -(-len(moments) // most) or 1
        return moments[::-1][::stride][::-1]


def _pace(earlier: DemandMoment, later: DemandMoment) -> float:
    """Return tokens a second."""
    return (later.num_output_tokens - earlier.num_output_tokens) / (later.at - earlier.at)
