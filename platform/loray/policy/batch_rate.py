"""How many lines of batches a base answers at once: additive increase, multiplicative decrease (AIMD, Chiu and Jain
1989), so that people notice nothing of batches and what is free is used.
"""

from __future__ import annotations

from dataclasses import dataclass

START = 4  # lines at once
GROW_S = 5.0  # between two lines more
SOON_S, LATE_S = 0.1, 0.5  # what a request may wait before there is no line more, and before there are fewer
FULL = 0.8  # share of the pool with keys and values, from which there is no line more
PAUSE_S = 30.0  # without lines
_SETTLE_S = 1.0  # after fewer lines, until it shows


@dataclass
class BatchRate:
    """The lines at once of one base. `now`: seconds of any clock."""

    limit: int = START
    _changed_at: float = float("-inf")
    _paused_until: float = float("-inf")

    def observe(self, now: float, *, wait_s: float, pool_use: float) -> None:
        """Take what the base's engines say: how long the request waits that waits longest, and how full they are."""
        if not self.limit:
            if now >= self._paused_until:
                self.limit, self._changed_at = 1, now
        elif wait_s > LATE_S:
            self.yield_to_others(now)
        elif wait_s <= SOON_S and pool_use < FULL and now - self._changed_at >= GROW_S:
            self.limit, self._changed_at = self.limit + 1, now

    def yield_to_others(self, now: float) -> None:
        """Halve the lines, since a request waits too long or a line was refused; of one, none is left for a time."""
        if now - self._changed_at < _SETTLE_S:
            return
        self.limit //= 2
        self._changed_at = now
        if not self.limit:
            self._paused_until = now + PAUSE_S

    def begin(self, now: float) -> None:
        """Begin anew with a base that has just woken up: what its requests waited meanwhile says nothing."""
        self.limit, self._changed_at = max(1, self.limit), now
