"""What changes from step to step of a run, of which an evenly thinned part is kept, and lines of it as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Line = Mapping[int, float]  # by step


class Curve(NamedTuple):
    """Two lists in JSON. `labels`: of x and of each line. `points`: the steps, and a list of values for each line, with
    null where a step has none.
    """

    labels: str
    points: str


def curve_of(lines: Mapping[str, Line]) -> Curve | None:
    """None where no line has a point."""
    steps = sorted(set().union(*lines.values()))
    if not steps:
        return None
    points = [steps, *([line.get(step) for step in steps] for line in lines.values())]
    return Curve(json.dumps(["step", *lines]), json.dumps(points))


class Series(Generic[T]):
    """Values by ascending step: every `stride`-th, of which fewer than `most` are kept, and the last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[int, T] = {}
        self._last: tuple[int, T] | None = None
        self._num_seen, self._stride = 0, 1

    def add(self, step: int, value: T) -> None:
        """A step before the last one begins the rest of the series anew."""
        if self._last is not None and step == self._last[0]:
            self._last = (step, value)
            self._kept |= {step: value} if step in self._kept else {}
            return
        if self._last is not None and step < self._last[0]:
            self._kept = {earlier: kept for earlier, kept in self._kept.items() if earlier < step}
        self._last = (step, value)
        if self._num_seen % self._stride == 0:
            self._kept[step] = value
            if len(self._kept) >= self._most:
                self._kept = dict(list(self._kept.items())[::2])
                self._stride *= 2
        self._num_seen += 1

    def values(self) -> dict[int, T]:
        return dict(self._kept) if self._last is None else self._kept | dict([self._last])
