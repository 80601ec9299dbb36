"""What was read of training jobs that somebody looks at, so that each look reads only what is new."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import NamedTuple

from jobs.events.messages import decode, describe
from jobs.runs.history import RunEvents
from jobs.sweeps.history import SweepTrials, Trials
from loray.catalog import Job
from loray.errors import ClusterError, LogsGone, StoreError
from loray.settings import Settings
from loray.spec import qualified_name, split_qualified
from loray.telemetry import get_logger
from serve_apps.console.live.losses import Losses
from serve_apps.console.live.progress import Progress, Step
from serve_apps.console.live.series import Curve, Line, curve_of

_log = get_logger(__name__)

MOST_JOBS = 64  # the one that nobody looked at for longest is read from its beginning again
LOG_LINES = 200
CURVE_LINES = 2000  # of Ray's log, where a curve is made of it


class Seen(NamedTuple):
    """`lines`: its losses, by what they are of. `steps`: some, evenly spread, and the last one. `log`: its last lines.
    `problem`: why something is not there; may be empty. `trials`: of a sweep; None where the job is none.
    """

    lines: Mapping[str, Line]
    steps: tuple[Step, ...]
    log: str
    problem: str
    trials: Trials | None = None

    @property
    def curve(self) -> Curve | None:
        """Of the losses; None without any."""
        return curve_of(self.lines)


class History:
    """What was read of one job. Thread-safe.

    Losses and lines are those of the run's own events, which outlive Ray's cluster. Of a run that has none yet, and
    where its events are elsewhere, both are those of the end of Ray's log; of a job that failed or was stopped, the
    lines are. A sweep has the records of its trials instead of events.
    """

    def __init__(self, events: RunEvents, trials: SweepTrials) -> None:
        self._events, self._trials, self._lock = events, trials, Lock()
        self._losses, self._progress, self._lines = Losses(), Progress(), deque[str](maxlen=LOG_LINES)
        self._has_events = False

    def look(self, job: Job, tail: Callable[[str, int], str]) -> Seen:
        """`tail`: the last lines of the log that Ray has of the job of this id."""
        with self._lock:
            problem, has_events = self._read_events(), self._has_events
            trials = None if has_events else self._read_trials()
        log: list[str] = []
        if not has_events or job.status in ("failed", "stopped"):
            try:  # Ray may be slow to answer: others look meanwhile
                log = tail(job.id, LOG_LINES if has_events else CURVE_LINES).splitlines()
            except (LogsGone, ClusterError) as e:
                problem = problem or str(e)
        with self._lock:
            lines = [_described(line) for line in log[-LOG_LINES:]] or list(self._lines)
            if not self._has_events:
                self._take(log)
            return Seen(self._losses.lines(), self._progress.steps(), "\n".join(lines), problem, trials)

    def _take(self, lines: Sequence[str]) -> None:
        """Lines that are no events are passed over."""
        events = [event for line in lines if (event := decode(line)) is not None]
        self._losses.take(events)
        self._progress.take(events)

    def _read_events(self) -> str:
        """Returns why they cannot be read; empty where they can."""
        try:
            found = self._events.read()
        except StoreError as e:
            return str(e)
        if found.is_anew:
            self._losses, self._progress = Losses(), Progress()
            self._lines.clear()
        self._has_events |= bool(found.lines)
        self._take(found.lines)
        self._lines.extend(_described(line) for line in found.lines[-LOG_LINES:])
        return ""

    def _read_trials(self) -> Trials | None:
        try:
            return self._trials.read()
        except StoreError as e:
            _log.warning("%s", e)
            return None


class Histories:
    """The histories of the jobs that were looked at last. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_job: OrderedDict[str, History] = OrderedDict()

    def of(self, job: Job, settings: Settings) -> History:
        with self._lock:
            found = self._by_job.pop(job.id, None)
            if found is None:
                name = qualified_name(job.tenant, split_qualified(job.name).name)
                whose = (settings, name, job.id, job.created_at)
                found = History(RunEvents(*whose), SweepTrials(*whose))
                if len(self._by_job) >= MOST_JOBS:
                    self._by_job.popitem(last=False)
            self._by_job[job.id] = found
            return found


def _described(line: str) -> str:
    """An event of another version as it is."""
    event = decode(line)
    try:
        return line if event is None else describe(event)
    except (KeyError, TypeError, ValueError):
        return line
