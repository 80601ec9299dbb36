"""Lateness of what a replica sends."""

from __future__ import annotations

import math

_WINDOW_S = 60.0


class RecentLeast:
    """Keeps the least value of the last one to two minutes. `now`: seconds of one clock."""

    def __init__(self) -> None:
        self._least = self._least_before = math.inf
        self._window_ends = -math.inf

    def add(self, value: float, now: float) -> float:
        """Add a value, and return the least."""
        if now >= self._window_ends:
            self._least_before, self._least = self._least, math.inf
            self._window_ends = now + _WINDOW_S
        self._least = min(self._least, value)
        return self.value

    @property
    def value(self) -> float:
        """The least value; inf: there was none."""
        return min(self._least, self._least_before)


class Lateness:
    """Tells by how much longer than usual the messages of one connection are under way.

    The clocks of both sides differ by an unknown time, which drifts slowly. So the shortest way of late counts as usual
    (one-way delay over base delay: LEDBAT, RFC 6817).
    """

    def __init__(self) -> None:
        self._shortest = RecentLeast()

    def of(self, sent_at: float, now: float) -> float:
        """Return the lateness of the message that came `now`. Seconds, each of its side's clock."""
        return now - sent_at - self._shortest.add(now - sent_at, now)
