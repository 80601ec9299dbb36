"""Two clocks: seconds that pass, and seconds of work, which pass more slowly while processors are shared."""

from __future__ import annotations

import math
from typing import NamedTuple


class Slowdown(NamedTuple):
    """What is at work takes `shared` + contention · `beside` times as long as alone."""

    shared: float
    beside: float

    @classmethod
    def of(cls, num: int, processors: float) -> Slowdown:
        """Of `num` at work. As long as each has a processor, it makes every other slower by the contention; more of
        them have equal parts of the processors.
        """
        num = max(1, num)
        shared = max(1.0, num / processors)
        return cls(shared, (min(num, processors) - 1) * shared)


class Clock:
    """All that are at work become slower by the same factor, see `Slowdown`. So all work has one time of its own: what
    takes s seconds alone ends s seconds of work later, whatever comes and goes meanwhile. Without contention, and with
    a processor for each, both times are equal.
    """

    def __init__(self, contention: float = 0.0, processors: float = math.inf) -> None:
        self._contention, self._processors = contention, processors
        self._is_shared = contention > 0 or processors < math.inf
        self._factor, self._offset = 1.0, 0.0
        self._crowd = 0

    def seconds(self, work: float) -> float:
        """When that time of work comes, if the crowd stays as it is."""
        return work * self._factor + self._offset

    def work(self, seconds: float) -> float:
        """The time of work at a time that is not before the last change of the crowd."""
        return (seconds - self._offset) / self._factor

    def joined(self, num: int, work: float) -> None:
        """So many more work from that time of work on; fewer where it is negative."""
        if not num or not self._is_shared:
            return
        self._crowd += num
        slowdown = Slowdown.of(self._crowd, self._processors)
        factor = slowdown.shared + self._contention * slowdown.beside
        self._offset = self.seconds(work) - work * factor
        self._factor = factor
