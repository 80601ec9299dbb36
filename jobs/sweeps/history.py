"""The records of a sweep's trials, read without Ray."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NamedTuple

from pyarrow.fs import FileSelector

from jobs.runs.history import RunFinder
from jobs.sweeps.spec import PLAN, SweepPlan, TrialRecord, record_file
from loray.errors import StoreError
from loray.settings import Settings

MOST_READ = 200  # records that one look reads


class Trials(NamedTuple):
    """`records`: of all trials, in their order; one that was not read yet is as before its first step. `is_whole`: each
    that there is was read.
    """

    records: tuple[TrialRecord, ...]
    keep_best: bool
    is_whole: bool


class SweepTrials:
    """The trials of the sweep that one job began. Each look reads the records of those that run or have just ended, and
    of many a part.

    Not thread-safe.
    """

    def __init__(self, settings: Settings, name: str, job_id: str, began_at: datetime) -> None:
        self._name = name
        self._sweep = RunFinder(settings, name, job_id, began_at, "sweeps")
        self._plan: SweepPlan | None = None
        self._records: dict[int, TrialRecord] = {}  # by trial, the one that was read last at the end

    def read(self) -> Trials | None:
        """Returns None where no sweep of this job is found, or none yet. Raises StoreError."""
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
            except ValueError as e:  # and SpecError
                raise StoreError(f"{folder}/{PLAN} is no sweep's plan: {e}") from e
        files = {info.base_name for info in filesystem.get_file_info(FileSelector(folder))}
        order = {number: at for at, number in enumerate(self._records)}
        unended = [
            number
            for number in range(len(self._plan.trials))
            if record_file(number) in files and not (number in order and self._records[number].has_ended)
        ]
        unended.sort(key=lambda number: order.get(number, -1))  # what was read last comes last
        for number in unended[:MOST_READ]:
            name = record_file(number)
            try:
                record = TrialRecord.parse(json.loads(_content(filesystem, f"{folder}/{name}")), source=name)
            except ValueError:  # written in part
                continue
            self._records.pop(number, None)
            self._records[number] = record
        records = (
            self._records.get(number) or TrialRecord(trial=number, values=trial.values)
            for number, trial in enumerate(self._plan.trials)
        )
        is_whole = all(number in order for number in unended[MOST_READ:])
        return Trials(tuple(records), self._plan.recipe.evaluation.keep_best, is_whole)


def _content(filesystem: Any, path: str) -> bytes:
    """Returns nothing where there is no such file."""
    if not filesystem.get_file_info(path).is_file:
        return b""
    with filesystem.open_input_stream(path) as file:
        return bytes(file.read())
