"""The losses in a run's events, as a picture needs them."""

from __future__ import annotations

from collections.abc import Iterable

from jobs.events.schema import Event
from loray.spec import Subject
from serve_apps.console.live.series import Line, Series

TRAINING, HELD_OUT = "training", "held out, adapter"
_MOST, _MOST_OF_BASELINE = 470, 20
_BASELINES: tuple[Subject, ...] = ("parent", "base_scaled", "base")
MOST_POINTS = 2 * _MOST + len(_BASELINES) * _MOST_OF_BASELINE


class Losses:
    """Collects losses from events, of each line an evenly thinned part: one of training, and one of held-out rows for
    each model that they were measured of.
    """

    def __init__(self) -> None:
        self._training, self._adapter = Series[float](_MOST), Series[float](_MOST)
        self._baselines: dict[str, Series[float]] = {subject: Series(_MOST_OF_BASELINE) for subject in _BASELINES}

    def take(self, events: Iterable[Event]) -> None:
        """A step before the last one begins the rest of its series anew.

        Held-out losses are those of evaluations: the event of a checkpoint repeats one, and may come late. Those of
        models that this version does not know are passed over.
        """
        for event in events:
            if not isinstance(step := event.get("step"), int):
                continue
            if isinstance(loss := event.get("loss"), float):
                self._training.add(step, loss)
            if event.get("event") == "eval" and isinstance(loss := event.get("eval_loss"), float):
                subject = str(event.get("subject", "adapter"))
                series = self._adapter if subject == "adapter" else self._baselines.get(subject)
                if series is not None:
                    series.add(step, loss)

    def lines(self) -> dict[str, Line]:
        """Training and the adapter, then the baselines that were measured; nothing without any loss.

        A baseline is measured before training, which does not change it, so its line goes on to the last step.
        """
        lines: dict[str, Line] = {TRAINING: self._training.values(), HELD_OUT: self._adapter.values()}
        baselines = {s: values for s, series in self._baselines.items() if (values := series.values())}
        steps = set().union(*lines.values(), *baselines.values())
        if not steps:
            return {}
        for subject, values in baselines.items():
            lines[f"held out, {subject.replace('_', ' ')}"] = values | {max(steps): values[max(values)]}
        return lines
