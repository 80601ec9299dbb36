"""Writes usage events into the catalog from a thread; a request's end only puts its event into a queue."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Lock, Thread

from loray.catalog import Catalog
from loray.errors import LorayError
from loray.spec import UsageEvent
from loray.telemetry import get_logger
from serve_apps.accounting.journal import Journal, abandoned

_log = get_logger(__name__)

FLUSH_S = 1.0
ABANDONED_S = 60.0  # between two looks for journals that other processes have left
_BATCH = 500
_MAX_QUEUED = 100_000
_RETENTION_CHECK_S = 3600.0


class UsageWriter:
    """Events reach the journal within milliseconds and the catalog within seconds, or when it can be reached again.

    open_catalog    its catalog is closed with the writer
    retention_days  older events are deleted; 0: never
    """

    def __init__(self, open_catalog: Callable[[], Catalog], home: Path, retention_days: int = 0) -> None:
        self._open, self._home = open_catalog, home
        self._retention_days = retention_days
        self._queue: queue.Queue[UsageEvent | None] = queue.Queue(_MAX_QUEUED)
        self._catalog: Catalog | None = None
        self._journal = Journal.create(home)
        self._journal_lock = Lock()  # of appending and clearing
        self._stopped = Event()
        self._is_due = Event()  # there is something to send
        self._is_failing = False
        self._num_lost = 0
        self._threads = [
            Thread(target=self._append_all, name="usage-journal", daemon=True),
            Thread(target=self._send_all, name="usage-catalog", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def add(self, event: UsageEvent) -> None:
        """Returns at once. Where the disk has not kept up for very long, the event is lost, and the log says so."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._lose(1)

    def close(self) -> None:
        """Sends what is left. What the catalog does not take stays in the journal, for the next writer."""
        self._queue.put(None)
        self._threads[0].join()
        self._stopped.set()
        self._is_due.set()
        self._threads[1].join()
        self._journal.close(delete=self._journal.num_bytes == 0)
        if self._catalog is not None:
            self._catalog.close()

    # -- the journal's thread -----------------------------------------------------------------------------------------

    def _append_all(self) -> None:
        running = True
        while running:
            batch = [self._queue.get()]
            with suppress(queue.Empty):
                while len(batch) < _BATCH:
                    batch.append(self._queue.get_nowait())
            events = [event for event in batch if event is not None]
            running = len(events) == len(batch)
            with self._journal_lock:
                try:
                    kept = self._journal.append(events)
                except OSError as e:
                    _log.error("usage events cannot be written to %s: %s", self._journal.path, e)
                    kept = False
            if kept:
                self._is_due.set()
            else:
                self._lose(len(events))

    def _lose(self, number: int) -> None:
        self._num_lost += number
        _log.error("%d usage events are lost so far: the catalog or the disk takes none", self._num_lost)

    # -- the catalog's thread -----------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        """Sleeps while no usage arrives, but for looks for what others have left."""
        looked_at = forgotten_at = float("-inf")
        self._is_due.set()
        while True:
            is_due = self._is_due.wait(ABANDONED_S)
            self._is_due.clear()
            last = self._stopped.wait(FLUSH_S if is_due else 0.0)
            try:
                if last or time.monotonic() - looked_at >= ABANDONED_S:
                    self._send_abandoned()
                    looked_at = time.monotonic()
                self._send(self._journal)
                if self._retention_days and time.monotonic() - forgotten_at > _RETENTION_CHECK_S:
                    forgotten_at = time.monotonic()
                    self._known().forget_usage(datetime.now(UTC) - timedelta(days=self._retention_days))
                self._is_failing = False
            except (LorayError, OSError) as e:
                if not self._is_failing:
                    _log.warning("usage events wait in %s until the catalog takes them: %s", self._journal.path, e)
                self._is_failing = True
                self._is_due.set()  # once more, after a while
            if last:
                return

    def _send(self, journal: Journal) -> None:
        offset = 0
        while True:
            with self._journal_lock:  # never half a line
                events, offset = journal.read(_BATCH, offset)
            if events:
                self._known().record_usage(events)
                continue
            with self._journal_lock:
                if journal.num_bytes == offset:
                    journal.clear()
                    return

    def _send_abandoned(self) -> None:
        for journal in abandoned(self._home):
            try:
                self._send(journal)
                journal.close(delete=True)
            except BaseException:
                journal.close(delete=False)
                raise

    def _known(self) -> Catalog:
        if self._catalog is None:
            self._catalog = self._open()
        return self._catalog
