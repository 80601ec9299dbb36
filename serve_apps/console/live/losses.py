"""The losses in a run's events, as a picture needs them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from jobs.events.messages import decode
from loray.spec import Subject

_MOST, _MOST_OF_BASELINE = 470, 20
_BASELINES: tuple[Subject, ...] = ("parent", "base_scaled", "base")
MOST_POINTS = 2 * _MOST + len(_BASELINES) * _MOST_OF_BASELINE


class Curve(NamedTuple):
    """Two lists in JSON. `labels`: of x and of each line. `points`: the steps, and a list of losses for each line, with
    null where a step has none.
    """

    labels: str
    points: str


class Losses:
    """Collects losses from events, of each line an evenly thinned part: one of training, and one of held-out rows for
    each model that they were measured of.
    """

    def __init__(self) -> None:
        self._training, self._adapter = _Series(_MOST), _Series(_MOST)
        self._baselines: dict[str, _Series] = {subject: _Series(_MOST_OF_BASELINE) for subject in _BASELINES}

    def take(self, lines: Iterable[str]) -> None:
        """Lines that are no events are passed over. A step before the last one begins the rest of its series anew.

        Held-out losses are those of evaluations: the event of a checkpoint repeats one, and may come late. Those of
        models that this version does not know are passed over.
        """
        for line in lines:
            event = decode(line)
            if event is None or not isinstance(step := event.get("step"), int):
                continue
            if isinstance(loss := event.get("loss"), float):
                self._training.add(step, loss)
            if event.get("event") == "eval" and isinstance(loss := event.get("eval_loss"), float):
                subject = str(event.get("subject", "adapter"))
                series = self._adapter if subject == "adapter" else self._baselines.get(subject)
                if series is not None:
                    series.add(step, loss)

    def curve(self) -> Curve | None:
        """Training and the adapter, then the baselines that were measured; None without any loss.

        A baseline is measured before training, which does not change it, so its line goes on to the last step.
        """
        lines = {"training": self._training.values(), "held out, adapter": self._adapter.values()}
        baselines = {s: values for s, series in self._baselines.items() if (values := series.values())}
        steps = sorted(set().union(*lines.values(), *baselines.values()))
        if not steps:
            return None
        for subject, values in baselines.items():
            lines[f"held out, {subject.replace('_', ' ')}"] = values | {steps[-1]: values[max(values)]}
        points = [steps, *([values.get(step) for step in steps] for values in lines.values())]
        return Curve(json.dumps(["step", *lines]), json.dumps(points))


class _Series:
    """Values by ascending step: every `stride`-th, of which fewer than `most` are kept, and the last."""

    def __init__(self, most: int) -> None:
        self._most = most
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
            if len(self._kept) >= self._most:
                self._kept = dict(list(self._kept.items())[::2])
                self._stride *= 2
        self._num_seen += 1

    def values(self) -> dict[int, float]:
        return self._kept if self._last is None else self._kept | dict([self._last])
