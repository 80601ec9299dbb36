"""Object stores: what the others use of one, and a folder as one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from loray.errors import NotFoundError, StoreError

TEMPORARY = ".tmp"  # first part of the names of a store's temporary objects


class ObjectEntry(NamedTuple):
    """`written_at` is the time at which the object was written, in seconds since 1970, by the store's clock. `etag` is
    S3's name of the content, empty elsewhere.
    """

    key: str
    num_bytes: int
    written_at: float
    etag: str = ""


def check_key(key: str) -> str:
    """`key` itself. Raises ValueError where it leads out of the store or to its temporary objects."""
    parts = PurePosixPath(key).parts
    if not parts or key != "/".join(parts) or ".." in parts or parts[0] == TEMPORARY:
        raise ValueError(f"{key!r} is not a valid key")
    return key


class ObjectStore(Protocol):
    """Bytes by their keys, which are relative POSIX paths. Implementations are safe to use from several threads and
    processes.
    """

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        """Store bytes, or those of a file. Exactly one of several writers of a key gets True. Durable on return."""
        ...

    def get(self, key: str) -> bytes:
        """The bytes of the object. Raises NotFoundError where there is no such key."""
        ...

    def get_to(self, key: str, path: Path) -> None:
        """Write the object to `path`. Raises NotFoundError where there is no such key."""
        ...

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer where the object is shorter. Raises NotFoundError where there is no such key."""
        ...

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `start` on, and return their number. Raises NotFoundError as above."""
        ...

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """Bytes of the object. Raises NotFoundError where there is no such key."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with `prefix`, sorted."""
        ...

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        """The objects whose keys start with `prefix`, with size and age, in no order."""
        ...

    def delete(self, key: str) -> None:
        """Delete the object. A missing key is no error."""
        ...

    def presigned(self, key: str, expires_s: int) -> str | None:
        """A URL by which whoever has it may read the object for so long; None where the store has no such URLs. Sends
        nothing, so the object may be missing.
        """
        ...

    def check(self) -> None:
        """Raise StoreError or UnsupportedError where nothing could be stored. Called before long work."""
        ...


class LocalStore:
    """A folder as an ObjectStore. Readers never see a partial object: a complete file is linked into place."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        path = self._path(key)
        if path.exists():
            return False
        with self._temporary() as temporary:
            with temporary.open("wb") as f:
                if isinstance(data, bytes):
                    f.write(data)
                else:
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, f, 1 << 20)
                f.flush()
                os.fsync(f.fileno())
            temporary.chmod(0o444)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, path)  # unlike rename, fails where the name is taken
            except FileExistsError:
                return False
        _sync_folder(path.parent)
        return True

    def get(self, key: str) -> bytes:
        with self._opened(key) as f:
            return f.read()

    def get_to(self, key: str, path: Path) -> None:
        with self._opened(key) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        with self._opened(key) as f:
            return os.pread(f.fileno(), stop - start, start)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        with self._opened(key) as f:
            return os.preadv(f.fileno(), [buffer], start)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self, key: str) -> int:
        with self._opened(key) as f:
            return os.fstat(f.fileno()).st_size

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        for key in self.list(prefix):
            try:
                found = self._path(key).stat()
            except FileNotFoundError:  # deleted meanwhile
                continue
            yield ObjectEntry(key, found.st_size, found.st_mtime)

    def list(self, prefix: str = "") -> Iterator[str]:
        below = self.root / prefix.rpartition("/")[0]
        keys = (p.relative_to(self.root).as_posix() for p in below.rglob("*") if p.is_file())
        yield from sorted(key for key in keys if key.startswith(prefix) and not key.startswith(f"{TEMPORARY}/"))

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def presigned(self, key: str, expires_s: int) -> None:
        return None

    def check(self) -> None:
        try:
            with self._temporary():
                pass
        except OSError as e:
            raise StoreError(f"the store at {self.root} cannot be written to: {e.strerror}") from e

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextmanager
    def _opened(self, key: str) -> Iterator[FileIO]:
        try:
            f = self._path(key).open("rb", buffering=0)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
            raise NotFoundError(f"the store at {self.root} has no object {key!r}") from e
        with f:
            yield f

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A file on the same filesystem, removed after the block."""
        folder = self.root / TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
