"""The largest burst that is remembered: what the replicas that run must be able to take.

A replica that is added takes requests after `startup_s`. What comes meanwhile, those that run compute. So the tokens
that come within such a time are measured all the time, and the most of them is remembered for `burst_memory_s`. Until
the load has been watched for so long, a burst is expected to bring `burst_factor` times the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

_NUM_MARKS = 60  # in the memory: a burst is forgotten by a sixtieth of it too late


@dataclass(frozen=True, slots=True)
class Bursts:
    """Immutable, since it is part of the state between two decisions.

    since   when the load was first seen; None: not yet
    marks   (time, tokens) of the largest bursts: each is larger than all that came after it
    """

    since: float | None = None
    marks: tuple[tuple[float, float], ...] = ()

    def noted(self, tokens: float, now: float, memory_s: float) -> Bursts:
        """With the tokens that came within the time of a start, until now."""
        each = memory_s / _NUM_MARKS
        at = each * ceil(now / each)
        kept = tuple(m for m in self.marks if m[0] > now - memory_s and m[1] > tokens)
        if kept and kept[-1][0] >= at:  # a larger one of the same time
            return Bursts(self.since, kept)
        return Bursts(now if self.since is None else self.since, (*kept, (at, tokens)))

    def largest(self, expected: float, now: float, memory_s: float) -> float:
        """Tokens. `expected`: those of a burst as long as the load is new."""
        seen = self.marks[0][1] if self.marks else 0.0
        is_new = self.since is None or now - self.since < memory_s
        return max(seen, expected) if is_new else seen
