"""Two clocks: seconds that pass, and seconds of work, which pass more slowly while processors are shared."""

from __future__ import annotations


class Clock:
    """Each one of `crowd` that works beside another makes all of them slower by the same factor, 1 + `contention` for
    each beyond the first. So all work has one time of its own: what takes s seconds alone ends s seconds of work later,
    whatever comes and goes meanwhile. Without contention both times are equal.
    """

    def __init__(self, contention: float = 0.0) -> None:
        self._contention = contention
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
        if not num:
            return
        self._crowd += num
        factor = 1.0 + self._contention * max(0, self._crowd - 1)
        self._offset = self.seconds(work) - work * factor
        self._factor = factor
