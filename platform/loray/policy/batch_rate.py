"""How many lines of batches a base is asked at once: additive increase, multiplicative decrease (AIMD, Chiu and Jain
1989). The engine sees to it that people notice nothing of lines; this keeps its queue for them, and uses what is free.
"""

from __future__ import annotations

from dataclasses import dataclass

START = 4  # lines at once
GROW_S = 5.0  # between two lines more
SOON_S, LATE_S = 0.1, 0.5  # what a request may wait before there is no line more, and before there are fewer
_SETTLE_S = 1.0  # after fewer lines, until it shows


@dataclass
class BatchRate:
    """The lines at once of one base, at least one. `now`: seconds of any clock."""

    limit: int = START
    _changed_at: float = float("-inf")

    def observe(self, now: float, wait_s: float) -> None:
        """Take what the base's engines say: how long the request waits that waits longest."""
        if wait_s > LATE_S:
            self.shrink(now)
        elif wait_s <= SOON_S and now - self._changed_at >= GROW_S:
            self.limit, self._changed_at = self.limit + 1, now

    def shrink(self, now: float) -> None:
        """Halve the lines, since a request waits too long or a line was refused."""
        if now - self._changed_at >= _SETTLE_S:
            self.limit, self._changed_at = max(1, self.limit // 2), now
