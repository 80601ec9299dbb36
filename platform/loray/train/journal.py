"""Journals: what was accepted, entry after entry, so that a process that dies does it again and nothing twice.

An entry is accepted when `Journal.append` returns. A snapshot of the state makes older entries needless; recovery is
the last snapshot, and then the entries that it does not contain. One process at a time writes a journal.

As bytes, an entry is its payload's length, a CRC-32 of all that follows, its kind, its number, and the payload:

    length u32 | crc u32 | kind u8 | number u64 | payload
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, Protocol

from loray.errors import IntegrityError

_HEADER = struct.Struct("<IIBQ")
_CHECKED_FROM = 8  # what the CRC is of

_REPLAY_S = 60.0
_NBYTES = 256 << 20
_AGE_S = 15 * 60.0


class Entry(NamedTuple):
    """`kind` and `number` are the writer's; numbers need no order, but one is used once."""

    kind: int
    number: int
    payload: bytes

    def to_bytes(self) -> bytes:
        """Write the entry, with its length and check sum."""
        data = bytearray(_HEADER.pack(len(self.payload), 0, self.kind, self.number) + self.payload)
        struct.pack_into("<I", data, 4, zlib.crc32(memoryview(data)[_CHECKED_FROM:]))
        return bytes(data)


class Log(Protocol):
    """Where a journal's bytes are."""

    def append(self, number: int, data: bytes) -> None:
        """Add an entry's bytes, which are durable on return. Raises StoreError, and ConflictError where another process
        has written in the meantime.
        """

    def read(self) -> Iterator[bytes]:
        """Yield all bytes, in any pieces that begin and end with an entry; the last one may be torn. Entries come in
        the order in which they were accepted, or in that of their numbers.
        """
        ...

    def keep(self, entries: Collection[Entry]) -> None:
        """Remove everything but these entries, which have the log's order. They are there at any time."""


class Journal:
    """The entries of a log."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def append(self, kind: int, number: int, payload: bytes) -> int:
        """Accept an entry, and return its bytes' length. Raises as the log."""
        data = Entry(kind, number, payload).to_bytes()
        self._log.append(number, data)
        return len(data)

    def entries(self) -> Iterator[Entry]:
        """Yield what was accepted. A last entry that is torn was not accepted, and is left out. Raises
        IntegrityError where an entry before the last is damaged.
        """
        pieces = self._log.read()
        piece = next(pieces, None)
        while piece is not None:
            following = next(pieces, None)
            yield from _parsed(piece, is_last=following is None)
            piece = following

    def recover(self) -> list[Entry]:
        """Read all entries, as whoever goes on with a journal does first: a torn one is removed, so that the next comes
        in its place. Raises IntegrityError.
        """
        entries = list(self.entries())
        self._log.keep(entries)
        return entries

    def cut(self, contains: Callable[[Entry], bool]) -> None:
        """Remove the entries that a snapshot `contains`."""
        self._log.keep([entry for entry in self.entries() if not contains(entry)])


def _parsed(data: bytes, *, is_last: bool) -> Iterator[Entry]:
    at = 0
    while at < len(data):
        entry, end = _entry_at(data, at)
        if entry is None:
            if is_last and (end >= len(data) or _is_zero(data, at)):
                return
            raise IntegrityError(f"the journal is damaged at byte {at:,} of {len(data):,}: entries after it are lost")
        yield entry
        at = end


def _entry_at(data: bytes, at: int) -> tuple[Entry | None, int]:
    """Read the entry at `at`, None where it is torn or damaged, and where it ends by its own length."""
    if len(data) - at < _HEADER.size:
        return None, len(data)
    length, crc, kind, number = _HEADER.unpack_from(data, at)
    end = at + _HEADER.size + length
    if end > len(data) or zlib.crc32(memoryview(data)[at + _CHECKED_FROM : end]) != crc:
        return None, end
    return Entry(kind, number, data[at + _HEADER.size : end]), end


def _is_zero(data: bytes, at: int) -> bool:
    """A file may have grown before its bytes were written: then they are 0."""
    return not any(memoryview(data)[at:])


class SnapshotClock:
    """Says when a snapshot is due: where to replay what came since the last one would take more than a minute, by the
    seconds that it took, or it has 256 MB, or is 15 minutes old.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self.taken()

    def taken(self) -> None:
        """Begin anew, as after a snapshot."""
        self._since: float | None = None
        self._seconds, self._nbytes = 0.0, 0

    def accepted(self, nbytes: int) -> None:
        """Count an entry's bytes."""
        self._nbytes += nbytes
        self._since = self._now() if self._since is None else self._since

    def computed(self, seconds: float) -> None:
        """Count the seconds that entries took."""
        self._seconds += seconds

    @property
    def is_due(self) -> bool:
        """Whether it is time for a snapshot; never where nothing was accepted since the last one."""
        if self._since is None:
            return False
        return self._seconds > _REPLAY_S or self._nbytes >= _NBYTES or self._now() - self._since >= _AGE_S
