"""Usage events on their way to the catalog: first into a file, then in batches into the database.

A process has a journal of its own, which it locks. A journal that nobody locks was left by a process that was killed:
the next writer of the home sends its events too. Events that were sent already count once, by their ids.

A request that goes on has a line that begins with `open`: then the event that it is charged with where its process is
killed. Of several lines of a request the last one counts.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from loray.spec import UsageEvent
from loray.telemetry import get_logger

_log = get_logger(__name__)

FOLDER = "usage"  # in the home
MAX_BYTES = 256 << 20  # about a million events; the database is away for long
_OPEN = "open "


class Journal:
    """One file of events, a JSON object a line. Its owner's thread alone uses it."""

    def __init__(self, path: Path) -> None:
        """Opens and locks it. Raises BlockingIOError where another process has it."""
        self._fd = _locked(path)
        self.path = path

    @classmethod
    def create(cls, home: Path) -> Journal:
        folder = home / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(BlockingIOError):  # another process, which looks for abandoned ones, was faster
                return cls(folder / f"{os.getpid()}-{secrets.token_hex(4)}.jsonl")

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def append(self, events: Iterable[UsageEvent], unsettled: Iterable[UsageEvent] = ()) -> bool:
        """False: it is full, and the events are lost. The lines are with the system, so a kill does not lose them.

        `unsettled` are of requests that go on. Where it raises OSError, as for a full disk, the journal is as it was.
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
        """At most `limit` events from `offset` on, and the offset behind them. What is no event is left out."""
        events: list[UsageEvent] = []
        for event, is_open, num_bytes in self._lines(offset):
            offset += num_bytes
            if event is not None and not is_open:
                events.append(event)
            if len(events) == limit:
                break
        return events, offset

    def unsettled(self) -> list[UsageEvent]:
        """What requests are charged with that have no event, as those of a process that was killed."""
        found: dict[str, UsageEvent] = {}
        for event, is_open, _ in self._lines(0):
            if event is not None:
                found.pop(event.request_id, None)
                if is_open:
                    found[event.request_id] = event
        return list(found.values())

    def _lines(self, offset: int) -> Iterator[tuple[UsageEvent | None, bool, int]]:
        """For each line from `offset` on its event, whether that is of an open request, and its number of bytes."""
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
        """All events have been sent; lines of open requests stay. A kill leaves the journal as it was, or as it is
        after this.
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
    """Of the file that has this path once it is locked. Raises BlockingIOError where another process has it."""
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


def abandoned(home: Path) -> Iterator[Journal]:
    """Journals of processes that are gone, locked. The caller closes each."""
    for path in sorted((home / FOLDER).glob("*.jsonl")):
        try:
            yield Journal(path)
        except BlockingIOError:
            continue
