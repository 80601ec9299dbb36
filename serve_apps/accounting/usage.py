"""Usage of requests: events in a write-ahead log on disk, and from there in the catalog.

`UsageLog` is the log of one process, which locks it. A log that nobody locks was left by a process that was killed: the
next writer of the home sends its events too. Events that were sent already count once, by their ids. While the catalog
is away, `StoredEvents` keeps them in a store that outlives this machine, too. `UsageWriter` does all this in threads.
"""

from __future__ import annotations

import fcntl
import os
import queue
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import NamedTuple

from loray.catalog import Catalog
from loray.errors import DataError, LorayError, NotFoundError, StoreError
from loray.locations import FileLocation, parse_location
from loray.settings import Settings
from loray.spec import UsageEvent
from loray.store import open_store
from loray.store.objects import ObjectStore
from loray.telemetry import get_logger

_log = get_logger(__name__)

FOLDER = "usage"  # in the home
MAX_BYTES = 256 << 20  # about a million events; the database is away for long
_OPEN = "open "
PREFIX = "usage"  # in the store
FLUSH_S = 1.0
LONGEST_PAUSE_S = 60.0  # between two attempts while the catalog takes nothing
STORE_AFTER_S = 10.0  # that the catalog has taken nothing, until events go to the store too
STORE_S = 5.0  # between two times that they do
REJECTED = "rejected.log"  # in the logs' folder: events that the catalog refuses, a JSON object a line
ABANDONED_S = 60.0  # between two looks for logs that other processes have left
_BATCH = 500
_STORED_BATCH = 5000  # about a megabyte
_MAX_QUEUED = 100_000
_RETENTION_CHECK_S = 3600.0


class UsageLog:
    """A file of events, a JSON object a line, which its owner's thread alone uses.

    A request that goes on has a line that begins with `open`: then the event that it is charged with where its process
    is killed. Of several lines of a request the last one counts.
    """

    def __init__(self, path: Path) -> None:
        """Open and lock the file. Raises BlockingIOError where another process has it."""
        self._fd = _locked(path)
        self.path = path

    @classmethod
    def create(cls, home: Path) -> UsageLog:
        folder = home / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(BlockingIOError):  # another process, which looks for abandoned ones, was faster
                return cls(folder / f"{os.getpid()}-{secrets.token_hex(4)}.jsonl")

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def append(self, events: Iterable[UsageEvent], unsettled: Iterable[UsageEvent] = ()) -> bool:
        """Append events; False: the log is full, and they are lost. The system has the lines, so a kill loses none.

        `unsettled` are of requests that go on. Where it raises OSError, as for a full disk, the log is as it was.
        """
        num_bytes = self.num_bytes
        if num_bytes >= MAX_BYTES:
            return False
        try:
            _write(self._fd, [*(event.to_json() for event in events), *map(_open_line, unsettled)])
        except OSError:
            os.ftruncate(self._fd, num_bytes)  # half a line would spoil the next one
            raise
        return True

    def read(self, limit: int, offset: int) -> tuple[list[UsageEvent], int]:
        """Read at most `limit` events from `offset` on, and the offset behind them. Lines without one are left out."""
        events: list[UsageEvent] = []
        for event, is_open, num_bytes in self._lines(offset):
            offset += num_bytes
            if event is not None and not is_open:
                events.append(event)
            if len(events) == limit:
                break
        return events, offset

    def unsettled(self) -> list[UsageEvent]:
        """Find what requests are charged with that have no event, as those of a process that was killed."""
        found: dict[str, UsageEvent] = {}
        for event, is_open, _ in self._lines(0):
            if event is not None:
                found.pop(event.request_id, None)
                if is_open:
                    found[event.request_id] = event
        return list(found.values())

    def _lines(self, offset: int) -> Iterator[tuple[UsageEvent | None, bool, int]]:
        """Yield each line's event from `offset` on, whether that is of an open request, and the line's length."""
        with os.fdopen(os.dup(self._fd), "rb") as f:
            f.seek(offset)
            for line in f:
                is_open = line.startswith(_OPEN.encode())
                try:
                    event = UsageEvent.from_json(line[len(_OPEN) :] if is_open else line)
                except ValueError:  # the last line of a process that was killed while it wrote
                    _log.warning("%s has a line that is no usage event; it is left out", self.path)
                    event = None
                yield event, is_open, len(line)

    def clear(self, unsettled: Iterable[UsageEvent] = ()) -> None:
        """Remove the events, which have been sent; lines of open requests stay. A kill leaves the log as it was, or as
        it is after this.
        """
        lines = list(map(_open_line, unsettled))
        if not lines:
            os.ftruncate(self._fd, 0)
            return
        self._new_path.unlink(missing_ok=True)
        new = _locked(self._new_path)
        try:
            _write(new, lines)
            os.replace(self._new_path, self.path)
            os.dup2(new, self._fd, inheritable=False)  # another thread may ask for the size meanwhile
        finally:
            os.close(new)

    @property
    def _new_path(self) -> Path:
        return self.path.with_suffix(".new")

    def close(self, *, delete: bool) -> None:
        if delete:
            self.path.unlink(missing_ok=True)
            self._new_path.unlink(missing_ok=True)
        os.close(self._fd)


def _locked(path: Path) -> int:
    """Open the file that has this path once it is locked. Raises BlockingIOError where another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_same = os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        is_same = False
    except BaseException:
        os.close(fd)
        raise
    if not is_same:
        os.close(fd)
        raise BlockingIOError(f"another process has replaced {path}")
    return fd


def _open_line(event: UsageEvent) -> str:
    return f"{_OPEN}{event.to_json()}"


def _write(fd: int, lines: Iterable[str]) -> None:
    left = memoryview("".join(f"{line}\n" for line in lines).encode())
    while left:
        left = left[os.write(fd, left) :]


def abandoned(home: Path) -> Iterator[UsageLog]:
    """Lock the logs of processes that are gone. The caller closes each."""
    for path in sorted((home / FOLDER).glob("*.jsonl")):
        try:
            yield UsageLog(path)
        except BlockingIOError:
            continue


class StoredEvents:
    """Events in the store: those of one log are put, those of all are taken. Used from one thread.

        usage/LOG/N.jsonl   some events of a log, a JSON object a line

    The log has them too, and whoever finds the catalog first sends them: an event that comes twice counts once.
    """

    def __init__(self, open_objects: Callable[[], ObjectStore], log_name: str) -> None:
        self._open, self._log_name = open_objects, log_name
        self._objects: ObjectStore | None = None
        self._num_put = 0

    def put(self, events: Sequence[UsageEvent]) -> None:
        """Store events. Raises StoreError."""
        data = "".join(f"{event.to_json()}\n" for event in events).encode()
        self._known().put_if_absent(f"{PREFIX}/{self._log_name}/{self._num_put:06}.jsonl", data)
        self._num_put += 1

    def all(self) -> Iterator[tuple[str, list[UsageEvent]]]:
        """Read (key, events) of each object. Raises StoreError."""
        for key in self._known().list(f"{PREFIX}/"):
            try:
                lines = self._known().get(key).splitlines()
            except NotFoundError:  # another process has sent them
                continue
            events = []
            for line in lines:
                try:
                    events.append(UsageEvent.from_json(line))
                except ValueError:
                    _log.warning("%s in the store has a line that is no usage event; it is left out", key)
            yield key, events

    def delete(self, key: str) -> None:
        """Delete what has been sent. Raises StoreError."""
        self._known().delete(key)

    def _known(self) -> ObjectStore:
        if self._objects is None:
            self._objects = self._open()
        return self._objects


class UsageStatus(NamedTuple):
    """Events are written (`is_alive`); so many bytes wait, the oldest of them for so long, and so many events were lost
    or refused.
    """

    is_alive: bool
    num_bytes: int
    oldest_s: float
    num_lost: int


class _Entry(NamedTuple):
    """`is_open`: the request goes on, and is charged with this event only where this process is killed."""

    event: UsageEvent
    is_open: bool


class UsageWriter:
    """Brings events to the log within milliseconds and to the catalog within seconds, or when it can be reached again.

    open_catalog    its catalog is closed with the writer
    retention_days  older events are deleted; 0: never
    open_objects    a store that outlives this machine, where events are kept too while the catalog takes none; None:
                    there is none
    """

    def __init__(
        self,
        open_catalog: Callable[[], Catalog],
        home: Path,
        retention_days: int = 0,
        open_objects: Callable[[], ObjectStore] | None = None,
    ) -> None:
        self._open, self._home = open_catalog, home
        self._retention_days = retention_days
        self._queue: queue.Queue[_Entry | None] = queue.Queue(_MAX_QUEUED)
        self._catalog: Catalog | None = None
        self._wal = UsageLog.create(home)
        self._stored = None if open_objects is None else StoredEvents(open_objects, self._wal.path.stem)
        self._stored_bytes = 0  # of the log, which the store has
        self._failing_since: float | None = None  # of the monotonic clock
        self._wal_lock = Lock()  # of appending and clearing
        self._unsettled: dict[str, UsageEvent] = {}  # of open requests that the log has
        self._stopped = Event()
        self._is_due = Event()  # there is something to send
        self._num_failures = 0  # in sequence
        self._num_lost = 0
        self._waits_since: float | None = None  # of the monotonic clock; None: the log is empty
        self._threads = [
            Thread(target=self._append_all, name="usage-journal", daemon=True),
            Thread(target=self._send_all, name="usage-catalog", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def of(cls, settings: Settings) -> UsageWriter:
        """Open the writer of a process with these settings."""
        url = settings.store
        # A folder is on the disk that has the log.
        open_objects = None if isinstance(parse_location(url), FileLocation) else partial(open_store, url)
        return cls(partial(Catalog, settings.catalog), settings.home, settings.usage_days, open_objects)

    def add(self, event: UsageEvent) -> None:
        """Take an event at once. Where the disk has not kept up for very long, it is lost, and the log says so."""
        try:
            self._queue.put_nowait(_Entry(event, False))
        except queue.Full:
            self._lose(1)

    def note_open(self, event: UsageEvent) -> None:
        """Take an event at once. With the last of these the request is charged where this process is killed."""
        with suppress(queue.Full):
            self._queue.put_nowait(_Entry(event, True))

    @property
    def status(self) -> UsageStatus:
        """The state of a writer that is open."""
        since = self._waits_since
        num_bytes, oldest_s = (0, 0.0) if since is None else (self._wal.num_bytes, time.monotonic() - since)
        is_alive = all(thread.is_alive() for thread in self._threads)
        return UsageStatus(is_alive, num_bytes, oldest_s, self._num_lost)

    def close(self) -> None:
        """Send what is left. What the catalog does not take stays in the log, for the next writer."""
        self._queue.put(None)
        self._threads[0].join()
        self._stopped.set()
        self._is_due.set()
        self._threads[1].join()
        self._wal.close(delete=self._wal.num_bytes == 0)
        if self._catalog is not None:
            self._catalog.close()

    # -- the log's thread ----------------------------------------------------------------------------------------------

    def _append_all(self) -> None:
        running = True
        while running:
            batch = [self._queue.get()]
            with suppress(queue.Empty):
                while len(batch) < _BATCH:
                    batch.append(self._queue.get_nowait())
            running = None not in batch
            last = {entry.event.request_id: entry for entry in batch if entry is not None}  # of each request
            events = [entry.event for entry in last.values() if not entry.is_open]
            unsettled = {id: entry.event for id, entry in last.items() if entry.is_open}
            with self._wal_lock:
                try:
                    kept = self._wal.append(events, unsettled.values())
                except Exception:  # noqa: BLE001 - the next ones may come through
                    _log.exception("usage events cannot be written to %s", self._wal.path)
                    kept = False
                if kept:
                    self._settle(events, unsettled)
            if not kept:
                self._lose(len(events))
            elif events:
                self._is_due.set()

    def _settle(self, events: Sequence[UsageEvent], unsettled: Mapping[str, UsageEvent]) -> None:
        """Remember that the log has `events` and `unsettled` since just now."""
        self._unsettled |= unsettled
        for event in events:
            self._unsettled.pop(event.request_id, None)
        if events and self._waits_since is None:
            self._waits_since = time.monotonic()

    def _lose(self, number: int) -> None:
        self._num_lost += number
        _log.error("%d usage events are lost so far: the catalog or the disk takes them not", self._num_lost)

    # -- the catalog's thread -----------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        """Sleep while no usage arrives, but for looks for what others have left. No error ends this."""
        looked_at = forgotten_at = float("-inf")
        self._is_due.set()
        while True:
            is_due = self._is_due.wait(ABANDONED_S)
            self._is_due.clear()
            longest_s = LONGEST_PAUSE_S if self._stored is None else STORE_S
            last = self._stopped.wait(min(FLUSH_S * 2**self._num_failures, longest_s) if is_due else 0.0)
            try:
                self._send(self._wal)
                if last or time.monotonic() - looked_at >= ABANDONED_S:
                    self._send_abandoned()
                    looked_at = time.monotonic()
                if self._retention_days and time.monotonic() - forgotten_at > _RETENTION_CHECK_S:
                    forgotten_at = time.monotonic()
                    self._known().usage.forget(datetime.now(UTC) - timedelta(days=self._retention_days))
                self._num_failures, self._failing_since = 0, None
            except Exception as e:  # noqa: BLE001 - whatever it is, what is used must be recorded
                if not self._num_failures:
                    is_known = isinstance(e, (LorayError, OSError))
                    _log.warning(
                        "usage events wait in %s until the catalog takes them: %s",
                        self._wal.path,
                        e,
                        exc_info=not is_known,
                    )
                self._num_failures = min(self._num_failures + 1, 16)
                self._is_due.set()  # once more, after a while
                self._store_new(last)
            if last:
                return

    def _send(self, wal: UsageLog) -> None:
        offset = 0
        while True:
            with self._wal_lock:  # never half a line
                events, offset = wal.read(_BATCH, offset)
            if events:
                self._record(events)
                continue
            with self._wal_lock:
                if wal.num_bytes != offset:
                    continue
                if wal is self._wal:
                    wal.clear(self._unsettled.values())
                    self._waits_since, self._stored_bytes = None, 0
                else:
                    wal.clear()
                return

    def _record(self, events: Sequence[UsageEvent]) -> None:
        """Record events. One that the catalog refuses is put aside, so that it does not stop the others."""
        try:
            self._known().usage.record(events)
        except DataError as e:
            if len(events) > 1:
                for event in events:
                    self._record([event])
                return
            path = self._home / FOLDER / REJECTED
            with path.open("a", encoding="utf-8") as f:
                f.write(f"{events[0].to_json()}\n")
            self._num_lost += 1
            _log.error("%s; it is in %s", e, path)

    def _send_abandoned(self) -> None:
        for wal in abandoned(self._home):
            try:
                if unsettled := wal.unsettled():
                    self._record(unsettled)
                self._send(wal)
                wal.close(delete=True)
            except BaseException:
                wal.close(delete=False)
                raise
        if self._stored is None:
            return
        try:
            for key, events in self._stored.all():
                self._record(events)
                self._stored.delete(key)
        except StoreError as e:
            _log.warning("usage events that others have left in the store are not sent: %s", e)

    def _store_new(self, last: bool) -> None:
        """Put what has come since into the store, after a while or before the process ends."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if self._stored is None or (now - self._failing_since < STORE_AFTER_S and not last):
            return
        try:
            while True:
                with self._wal_lock:
                    events, offset = self._wal.read(_STORED_BATCH, self._stored_bytes)
                if not events:
                    return
                self._stored.put(events)
                self._stored_bytes = offset
        except Exception as e:  # noqa: BLE001 - the log on disk has them
            _log.warning("usage events cannot be kept in the store: %s", e)

    def _known(self) -> Catalog:
        if self._catalog is None:
            self._catalog = self._open()
        return self._catalog
