"""What was read of training jobs that somebody looks at, so that each look reads only what is new."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

from jobs.events.messages import decode, describe
from jobs.runs.history import RunEvents
from loray.catalog import Job
from loray.errors import ClusterError, LogsGone, StoreError
from loray.settings import Settings
from loray.spec import qualified_name, split_qualified
from serve_apps.console.live.losses import Curve, Losses

MOST_JOBS = 64  # the one that nobody looked at for longest is read from its beginning again
LOG_LINES = 200
CURVE_LINES = 2000  # of Ray's log, where a curve is made of it


class Seen(NamedTuple):
    """`curve`: of its losses; None without any. `log`: its last lines. `problem`: why something is not there; may be
    empty.
    """

    curve: Curve | None
    log: str
    problem: str


class History:
    """What was read of one job. Thread-safe.

    Losses and lines are those of the run's own events, which outlive Ray's cluster. Of a run that has none yet, and
    where its events are elsewhere, both are those of the end of Ray's log; of a job that failed or was stopped, the
    lines are.
    """

    def __init__(self, events: RunEvents) -> None:
        self._events, self._lock = events, Lock()
        self._losses, self._lines = Losses(), deque[str](maxlen=LOG_LINES)
        self._has_events = False

    def look(self, job: Job, tail: Callable[[str, int], str]) -> Seen:
        """`tail`: the last lines of the log that Ray has of the job of this id."""
        with self._lock:
            problem, has_events = self._read_events(), self._has_events
        log: list[str] = []
        if not has_events or job.status in ("failed", "stopped"):
            try:  # Ray may be slow to answer: others look meanwhile
                log = tail(job.id, LOG_LINES if has_events else CURVE_LINES).splitlines()
            except (LogsGone, ClusterError) as e:
                problem = problem or str(e)
        with self._lock:
            lines = log[-LOG_LINES:] or list(self._lines)
            if not self._has_events:
                self._losses.take(log)
            return Seen(self._losses.curve(), "\n".join(lines), problem)

    def _read_events(self) -> str:
        """Returns why they cannot be read; empty where they can."""
        try:
            found = self._events.read()
        except StoreError as e:
            return str(e)
        if found.is_anew:
            self._losses = Losses()
            self._lines.clear()
        self._has_events |= bool(found.lines)
        self._losses.take(found.lines)
        self._lines.extend(_described(line) for line in found.lines[-LOG_LINES:])
        return ""


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
                found = History(RunEvents(settings, name, job.id, job.created_at))
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
