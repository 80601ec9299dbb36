"""The losses in a run's events, as a picture needs them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from jobs.events.messages import decode

MOST_POINTS = 1000


class Losses:
    """Collects the losses of training and of held-out rows from events, of each an evenly thinned part."""

    def __init__(self) -> None:
        self._training, self._held_out = _Series(), _Series()

    def take(self, lines: Iterable[str]) -> None:
        """Lines that are no events are passed over. A step before the last one begins the rest of its series anew.

        Held-out losses are those of evaluations: the event of a checkpoint repeats one, and may come late.
        """
        for line in lines:
            event = decode(line)
            if event is None or not isinstance(step := event.get("step"), int):
                continue
            if isinstance(loss := event.get("loss"), float):
                self._training.add(step, loss)
            if event.get("event") == "eval" and isinstance(loss := event.get("eval_loss"), float):
                self._held_out.add(step, loss)

    def as_json(self) -> str:
        """[steps, losses, held-out losses], with null where a step has none. Empty without any loss."""
        training, held_out = self._training.values(), self._held_out.values()
        steps = sorted(training.keys() | held_out.keys())
        if not steps:
            return ""
        return json.dumps([steps, [training.get(step) for step in steps], [held_out.get(step) for step in steps]])


class _Series:
    """Values by ascending step: every `stride`-th, of which at most half of `MOST_POINTS` are kept, and the last."""

    def __init__(self) -> None:
        self._kept: dict[int, float] = {}
        self._last: tuple[int, float] | None = None
        self._num_seen, self._stride = 0, 1

    def add(self, step: int, value: float) -> None:
        if self._last is not None and step == self._last[0]:
            self._last = (step, value)
            self._kept |= {step: value} if step in self._kept else {}
            return
        if self._last is not None and step < self._last[0]:
            self._kept = {earlier: loss for earlier, loss in self._kept.items() if earlier < step}
        self._last = (step, value)
        if self._num_seen % self._stride == 0:
            self._kept[step] = value
            if len(self._kept) >= MOST_POINTS // 2:
                self._kept = dict(list(self._kept.items())[::2])
                self._stride *= 2
        self._num_seen += 1

    def values(self) -> dict[int, float]:
        return self._kept if self._last is None else self._kept | dict([self._last])
