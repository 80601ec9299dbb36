"""Journals of runs: a file in a run's folder, or numbered objects in its bucket."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from jobs.runs.folders import RunFolder, SharedRunFolder
from loray.errors import ConflictError, StoreError
from loray.files import replacing
from loray.store import ObjectStore
from loray.train.journal import Entry, Journal, Log

_JOURNAL = "journal"


def open_journal(run: RunFolder) -> Journal:
    """Open a run's journal, which is empty at first. Whoever writes to it holds the run's lock."""
    if isinstance(run, SharedRunFolder):
        return Journal(ObjectLog(run.objects, f"{run.key}/{_JOURNAL}/"))
    log: Log = FileLog(Path(run.path, _JOURNAL))
    return Journal(log)


class FileLog:
    """A file to which entries are appended, each on disk before `append` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        self._end = 0

    def append(self, number: int, data: bytes) -> None:
        """Write behind the last entry that was written whole: one that failed is overwritten."""
        try:
            if self._handle is None:
                self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
                self._end = os.fstat(self._handle).st_size
                _sync(self._path.parent)
            done = 0
            while done < len(data):
                done += os.pwrite(self._handle, memoryview(data)[done:], self._end + done)
            os.fdatasync(self._handle)
        except OSError as e:
            raise StoreError(f"the journal {self._path} cannot be written: {e.strerror}; free space there") from e
        self._end += len(data)

    def read(self) -> Iterator[bytes]:
        """Yield what the file has."""
        if self._path.is_file():
            yield self._path.read_bytes()

    def keep(self, entries: Collection[Entry]) -> None:
        """Write these entries beside the file, and put them in its place."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        try:
            with replacing(self._path) as file:
                for entry in entries:
                    file.write(entry.to_bytes())
        except OSError as e:
            raise StoreError(f"the journal {self._path} cannot be written: {e.strerror}; free space there") from e


class ObjectLog:
    """An object for each entry, by its number, which one process alone can write."""

    def __init__(self, objects: ObjectStore, prefix: str) -> None:
        self._objects, self._prefix = objects, prefix

    def append(self, number: int, data: bytes) -> None:
        """Put an object. An equal one that is there was put by an earlier attempt."""
        key = self._key(number)
        if not self._objects.put_if_absent(key, data) and self._objects.get(key) != data:
            raise ConflictError(f"another process has written entry {number} of the journal {self._prefix}; end one")

    def read(self) -> Iterator[bytes]:
        """Yield the objects, which are whole, by their numbers."""
        for key in self._objects.list(self._prefix):
            yield self._objects.get(key)

    def keep(self, entries: Collection[Entry]) -> None:
        """Delete the other objects."""
        kept = {self._key(entry.number) for entry in entries}
        for key in list(self._objects.list(self._prefix)):
            if key not in kept:
                self._objects.delete(key)

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:012}"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
