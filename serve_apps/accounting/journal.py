"""Usage events on their way to the catalog: first into a file, then in batches into the database.

A process has a journal of its own, which it locks. A journal that nobody locks was left by a process that was killed:
the next writer of the home sends its events too. Events that were sent already count once, by their ids.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from loray.spec import UsageEvent
from loray.telemetry import get_logger

_log = get_logger(__name__)

FOLDER = "usage"  # in the home
MAX_BYTES = 256 << 20  # about a million events; the database is away for long


class Journal:
    """One file of events, a JSON object a line. Its owner's thread alone uses it."""

    def __init__(self, path: Path) -> None:
        """Opens and locks it. Raises BlockingIOError where another process has it."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise
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

    def append(self, events: list[UsageEvent]) -> bool:
        """False: it is full, and the events are lost. The lines are with the system, so a kill does not lose them.

        Where it raises OSError, as for a full disk, the journal is as it was.
        """
        num_bytes = self.num_bytes
        if num_bytes >= MAX_BYTES:
            return False
        left = memoryview("".join(f"{event.to_json()}\n" for event in events).encode())
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            os.ftruncate(self._fd, num_bytes)  # half a line would spoil the next one
            raise
        return True

    def read(self, limit: int, offset: int) -> tuple[list[UsageEvent], int]:
        """At most `limit` events from `offset` on, and the offset behind them. What is no event is left out."""
        events: list[UsageEvent] = []
        with os.fdopen(os.dup(self._fd), "rb") as f:
            f.seek(offset)
            for line in f:
                offset += len(line)
                try:
                    events.append(UsageEvent.from_json(line))
                except ValueError:  # the last line of a process that was killed while it wrote
                    _log.warning("%s has a line that is no usage event; it is left out", self.path)
                if len(events) == limit:
                    break
        return events, offset

    def clear(self) -> None:
        """All events have been sent."""
        os.ftruncate(self._fd, 0)

    def close(self, *, delete: bool) -> None:
        if delete:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)


def abandoned(home: Path) -> Iterator[Journal]:
    """Journals of processes that are gone, locked. The caller closes each."""
    for path in sorted((home / FOLDER).glob("*.jsonl")):
        try:
            yield Journal(path)
        except BlockingIOError:
            continue
