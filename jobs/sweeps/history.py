"""The records of a sweep's trials, read without Ray."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NamedTuple

from pyarrow.fs import FileSelector

from jobs.runs.history import RunFinder
from jobs.sweeps.spec import PLAN, SweepPlan, TrialRecord, record_file
from loray.errors import SpecError, StoreError
from loray.settings import Settings

_Mark = tuple[int | None, int | None]  # a file's size, and when it was written
MOST_READ = 200  # records that one look reads


class Trials(NamedTuple):
    """`records`: of all trials, in their order; one that was not read yet is as before its first step. `is_whole`: what
    has changed was read.
    """

    records: tuple[TrialRecord, ...]
    keep_best: bool
    is_whole: bool


class SweepTrials:
    """The trials of the sweep that one job began. Each look reads the records that have changed, and of many a part.

    Not thread-safe.
    """

    def __init__(self, settings: Settings, name: str, job_id: str, began_at: datetime) -> None:
        self._name = name
        self._sweep = RunFinder(settings, name, job_id, began_at, "sweeps")
        self._plan: SweepPlan | None = None
        self._records: dict[int, TrialRecord] = {}
        self._marks: dict[int, tuple[_Mark, bool]] = {}  # of what was read last, and whether it was read twice

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
            except (ValueError, SpecError) as e:
                raise StoreError(f"{folder}/{PLAN} is no sweep's plan: {e}") from e
        changed = self._changed(filesystem, folder)
        for number, mark in list(changed.items())[:MOST_READ]:
            self._read_record(filesystem, folder, number, mark)
        records = (
            self._records.get(number) or TrialRecord(trial=number, values=trial.values)
            for number, trial in enumerate(self._plan.trials)
        )
        is_whole = len(changed) <= MOST_READ
        return Trials(tuple(records), self._plan.recipe.evaluation.keep_best, is_whole)

    def _changed(self, filesystem: Any, folder: str) -> dict[int, _Mark]:
        """Finds, by one listing, the records of trials that have not ended whose files are others than those read last;
        first those that were never read. A file is read twice: a bucket's times are whole seconds, and a record that
        is written twice in one may be as long as before.
        """
        assert self._plan is not None
        files = {info.base_name: (info.size, info.mtime_ns) for info in filesystem.get_file_info(FileSelector(folder))}
        changed: dict[int, _Mark] = {}
        for number in range(len(self._plan.trials)):
            mark, known = files.get(record_file(number)), self._records.get(number)
            if mark is None or (known is not None and known.has_ended) or self._marks.get(number) == (mark, True):
                continue
            changed[number] = mark
        return dict(sorted(changed.items(), key=lambda item: item[0] in self._marks))

    def _read_record(self, filesystem: Any, folder: str, number: int, mark: _Mark) -> None:
        name, before = record_file(number), self._marks.get(number)
        try:
            record = TrialRecord.parse(json.loads(_content(filesystem, f"{folder}/{name}")), source=name)
        except (ValueError, SpecError):  # written in part
            return
        self._records[number] = record
        self._marks[number] = mark, before is not None and before[0] == mark


def _content(filesystem: Any, path: str) -> bytes:
    """Returns nothing where there is no such file."""
    if not filesystem.get_file_info(path).is_file:
        return b""
    with filesystem.open_input_stream(path) as file:
        return bytes(file.read())
