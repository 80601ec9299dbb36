"""What a sweep wrote of its trials, read without Ray."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NamedTuple

from jobs.runs.history import RunFinder
from jobs.sweeps.trials import PLAN, SweepPlan, TrialRecord, record_file
from loray.errors import SpecError, StoreError
from loray.settings import Settings

MOST_TRIALS = 200  # whose records are read


class Trials(NamedTuple):
    """`records`: of the first trials, in their order. `num_trials`: of all."""

    records: tuple[TrialRecord, ...]
    num_trials: int
    keep_best: bool


class SweepTrials:
    """The trials of the sweep that one job began. A record of a trial that has ended is read once. Not thread-safe."""

    def __init__(self, settings: Settings, name: str, job_id: str, began_at: datetime) -> None:
        self._name = name
        self._sweep = RunFinder(settings, name, job_id, began_at, "sweeps")
        self._plan: SweepPlan | None = None
        self._ended: dict[int, TrialRecord] = {}

    def read(self) -> Trials | None:
        """None where no sweep of this job is found, or none yet. Raises StoreError."""
        try:
            folder = self._sweep.find()
            if folder is None:
                return None
            filesystem, root = self._sweep.places[-1]
            return self._read(filesystem, f"{root}/{folder}")
        except OSError as e:
            raise StoreError(f"the sweeps of {self._name!r} cannot be read: {e}") from e

    def _read(self, filesystem: Any, folder: str) -> Trials | None:
        if self._plan is None:
            data = _content(filesystem, f"{folder}/{PLAN}")
            if not data:
                return None
            try:
                self._plan = SweepPlan.parse(json.loads(data), source=PLAN)
            except (ValueError, SpecError) as e:
                raise StoreError(f"{folder}/{PLAN} is no sweep's plan: {e}") from e
        records = []
        for number, trial in enumerate(self._plan.trials[:MOST_TRIALS]):
            record = self._ended.get(number) or self._record(filesystem, folder, number, trial.values)
            if record.has_ended:
                self._ended[number] = record
            records.append(record)
        return Trials(tuple(records), len(self._plan.trials), self._plan.recipe.evaluation.keep_best)

    def _record(self, filesystem: Any, folder: str, number: int, values: dict[str, str]) -> TrialRecord:
        name = record_file(number)
        try:
            return TrialRecord.parse(json.loads(_content(filesystem, f"{folder}/{name}")), source=name)
        except (ValueError, SpecError):  # not written yet, or in part
            return TrialRecord(trial=number, values=values)


def _content(filesystem: Any, path: str) -> bytes:
    """Empty where there is no such file."""
    if not filesystem.get_file_info(path).is_file:
        return b""
    with filesystem.open_input_stream(path) as file:
        return bytes(file.read())
