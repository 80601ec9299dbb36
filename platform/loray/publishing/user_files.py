"""The files of `/v1/files`: rows in the catalog, and bytes in the store, in parts of which a process holds few.

    files/TENANT/ID/NUMBER   a part; all but the last one have PART_BYTES

A file exists once all its parts do. One that was begun and not finished, was deleted or has expired is removed by
`remove_unneeded`: first its parts, then its row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import TracebackType

from loray.catalog import Catalog
from loray.catalog.files import OutputFile, Purpose, UserFile
from loray.errors import DataError, IntegrityError, NotFoundError
from loray.store.objects import ObjectStore

FILES = "files"
PART_BYTES = 8 << 20
MAX_LINE_BYTES = 16 << 20
_READ_BYTES = 1 << 20


class FileWriter:
    """Writes one file, part by part; used from one thread at a time. At the end of its block, it gives up a file that
    does not exist.

    num_bytes  that have come
    """

    def __init__(self, catalog: Catalog, store: ObjectStore, *, is_limited: bool = True) -> None:
        """`is_limited`: the file counts against the tenant's `max_stored_bytes` before it is stored."""
        self._catalog, self._store, self._is_limited = catalog, store, is_limited
        self._pending, self._hash, self._num_parts = bytearray(), hashlib.sha256(), 0
        self.num_bytes = 0
        self.id = catalog.files.begin()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.give_up()

    @property
    def is_due(self) -> bool:
        """A whole part waits, which `send` stores."""
        return len(self._pending) >= PART_BYTES

    def take(self, data: bytes) -> None:
        """Take bytes into memory. `send` follows where `is_due`."""
        self._hash.update(data)
        self._pending += data
        self.num_bytes += len(data)

    def send(self) -> None:
        """Store the whole parts. Raises LimitExceeded, StoreError."""
        while self.is_due:
            self._put(PART_BYTES)

    def write(self, data: bytes) -> None:
        """Take bytes, and store what has become a part."""
        self.take(data)
        self.send()

    def finish(self, filename: str, purpose: Purpose, *, expires_after_s: int | None = None) -> UserFile:
        """Store what is left. The file exists from now on."""
        return self._catalog.files.finish(self.end(filename, purpose, expires_after_s=expires_after_s))

    def end(self, filename: str, purpose: Purpose, *, expires_after_s: int | None = None) -> OutputFile:
        """Store what is left, and return what makes the file exist."""
        self.send()
        if self._pending:
            self._put(len(self._pending))
        return OutputFile(self.id, filename, purpose, self._hash.hexdigest(), expires_after_s)

    def give_up(self) -> None:
        """Forget the file, unless it is finished."""
        self._catalog.files.give_up(self.id)

    def _put(self, num_bytes: int) -> None:
        with memoryview(self._pending) as pending:
            part = bytes(pending[:num_bytes])
        del self._pending[:num_bytes]
        self._catalog.files.grow(self.id, num_bytes, is_limited=self._is_limited)
        self._store.put_if_absent(_part(self._catalog.own_tenant, self.id, self._num_parts), part)
        self._num_parts += 1


def read_file(store: ObjectStore, file: UserFile, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield bytes [start, stop) of a file, a megabyte at a time. Raises IntegrityError where the store lacks some."""
    stop = file.bytes if stop is None else min(stop, file.bytes)
    while start < stop:
        number, at = divmod(start, PART_BYTES)
        wanted = min(_READ_BYTES, stop - start, PART_BYTES - at)
        try:
            piece = store.get_range(_part(file.tenant, file.id, number), at, at + wanted)
        except NotFoundError:
            piece = b""
        if len(piece) < wanted:
            raise IntegrityError(f"file {file.id} is not whole in the store: upload it again")
        yield piece
        start += wanted


def read_lines(store: ObjectStore, file: UserFile) -> Iterator[bytes]:
    """Yield the file's lines without their ends. Raises DataError for one that is longer than MAX_LINE_BYTES."""
    rest, num_lines = b"", 0
    for piece in read_file(store, file):
        first, *others = piece.split(b"\n")
        if len(rest) + len(first) > MAX_LINE_BYTES:
            raise DataError(f"line {num_lines + 1} is longer than {MAX_LINE_BYTES >> 20} MiB")
        if not others:
            rest += first
            continue
        yield rest + first
        yield from others[:-1]
        rest, num_lines = others[-1], num_lines + len(others)
    if rest:
        yield rest


def remove_unneeded(catalog: Catalog, store: ObjectStore) -> int:
    """Remove the bytes, then the rows, of files that nobody can read any more. Returns how many that were."""
    unneeded = catalog.files.unneeded()
    for file in unneeded:
        for key in list(store.list(f"{FILES}/{file.tenant}/{file.id}/")):
            store.delete(key)
        catalog.files.forget(file.id)
    return len(unneeded)


def _part(tenant: str, file_id: str, number: int) -> str:
    return f"{FILES}/{tenant}/{file_id}/{number:05d}"
