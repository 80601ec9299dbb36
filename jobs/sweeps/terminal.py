"""Shows a sweep's events: trials that have ended as lines, a bar of how many there are left, and a table at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from jobs.events.messages import decode, number
from jobs.events.schema import SweepEvent, TrialEvent
from jobs.events.terminal import RunView
from jobs.sweeps.trials import TrialRecord, ranked
from loray.cli.output import table

if TYPE_CHECKING:
    from jobs.submission.server import RayJobServer  # imports Ray


class SweepView(RunView):
    """Keeps the trials' records, and the event of the sweep's end in `ended`. `server` and `job`: where it runs."""

    def __init__(self, console: Console, server: RayJobServer, job: str) -> None:
        super().__init__(console)
        self.server, self.job = server, job
        self.ended: SweepEvent | None = None
        self._trials: dict[int, TrialRecord] = {}

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        return tuple(self._trials[trial] for trial in sorted(self._trials))

    @property
    def best(self) -> int | None:
        return None if self.ended is None else self.ended["best"]

    @property
    def keep_best(self) -> bool:
        return self.ended is None or self.ended["keep_best"]

    def feed(self, line: str) -> None:
        event = decode(line)
        if event is None:
            super().feed(line)
        elif event["event"] == "trial":
            self._trial(event)
        elif event["event"] == "sweep":
            self.ended = event
            self._print(event)
        else:
            super().feed(line)

    def table(self) -> Table:
        """All trials, the best first."""
        records = ranked(self.records, keep_best=self.keep_best)
        paths = list(records[0].values) if records else []
        rows = [
            (
                f"{record.trial} *" if record.trial == self.best else record.trial,
                *(record.values[path] for path in paths),
                record.status,
                f"{record.step}/{record.num_steps or '?'}",
                number(record.loss(keep_best=self.keep_best)) if record.losses else "–",
            )
            for record in records
        ]
        return table(("TRIAL", *paths, "STATUS", "STEP", "LOSS"), rows, right=("TRIAL", "STEP", "LOSS"))

    def _trial(self, event: TrialEvent) -> None:
        record = TrialRecord.model_validate({name: event[name] for name in TrialRecord.model_fields})  # type: ignore[literal-required]
        self._trials[record.trial] = record
        ended = sum(known.has_ended for known in self._trials.values())
        figures = f"trial {record.trial}: held out {number(record.losses[-1][1])}" if record.losses else ""
        self._progress.update(
            self._task, description="trials", total=event["num_trials"], completed=ended, figures=figures
        )
        if record.has_ended:
            self._print(event)
