"""When refused requests may come again: each at a time of its own."""

from __future__ import annotations

import math

LONGEST_S = 60.0  # OpenAI's clients take no longer wait from a server


class ReturnTimes:
    """Times for the requests that one rule refuses. If all were told the same time, they would come back together.

    Each refusal gets the next time: the first at which there may be room, and then one after another as fast as the
    rule is expected to admit them. Times more than LONGEST_S ahead are not given; they begin again at the first one.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = -math.inf

    def next_s(self, now: float, first_s: float, spacing_s: float) -> float:
        """Seconds from `now`; takes the turn. `first_s`: until there may be room; `spacing_s`: between two turns."""
        first = now + first_s
        turn = max(first, self._last + spacing_s)
        if turn > max(first, now + LONGEST_S):
            turn = first
        self._last = turn
        return turn - now
