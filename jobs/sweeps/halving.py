"""Which trials of a sweep are stopped early, by the losses of all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from jobs.events import Event
from jobs.sweeps.spec import TrialRecord

_RUNGS = (1 / 3, 1 / 9)  # parts of a trial's steps, the later one first
_BEST_PERCENT = 100 / 3  # of the trials that reach a rung, which go on


def name_of_trial(trial: int) -> str:
    """Names a trial in its cohort, where all have other names."""
    return f"trial-{trial:04}"


def trial_of(name: str) -> int:
    return int(name.removeprefix("trial-"))


class Halving:
    """Asynchronous successive halving (ASHA, Li et al., 2020) by the losses of all trials, which it keeps up to date.

    At its first evaluation after a ninth of its steps, and again after a third, a trial goes on if it is among the best
    third of those that have come so far; of trials that come there in one round, by the losses of all of them.
    """

    def __init__(self, records: Iterable[TrialRecord], *, stops_early: bool) -> None:
        self._records = {name_of_trial(record.trial): record for record in records}
        self._stops_early = stops_early

    def ended_by(self, events: Sequence[tuple[str, Event]]) -> Collection[str]:
        """Returns the trials that are to end."""
        for name, event in events:
            self._records[name] = told(self._records[name], event)
        measured = {name for name, event in events if event["event"] == "eval" and event["subject"] == "adapter"}
        everybody = list(self._records.values())
        return {name for name in measured if self._stops_early and falls_behind(self._records[name], everybody)}


def told(record: TrialRecord, event: Event) -> TrialRecord:
    """Adds what an event of a trial's run says."""
    match event["event"]:
        case "start":
            return record.model_copy(update={"num_steps": event["num_steps"]})
        case "eval" if event["subject"] == "adapter" and event["eval_loss"] is not None and record.num_steps:
            return record.with_loss(event["step"], event["eval_loss"], record.num_steps)
        case "end":
            status = "completed" if event["status"] == "succeeded" else event["status"]
            message = "" if event["status"] == "stopped" else event["message"] or ""
            return record.model_copy(update={"status": status, "message": message})
    return record


def falls_behind(record: TrialRecord, records: Iterable[TrialRecord]) -> bool:
    """Says whether the last evaluation of `record` is its first one of a rung, and worse than those of most others."""
    for rung in _RUNGS:
        own = record.losses_from(rung)
        if own:
            others = [losses[0] for r in records if r.trial != record.trial and (losses := r.losses_from(rung))]
            return len(own) == 1 and bool(others) and own[0] > float(np.percentile(others, _BEST_PERCENT))
    return False
