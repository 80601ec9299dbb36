"""A node's cache of adapters: fetched once, verified, limited in bytes, shared by the processes of the node."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from loray.adapters.manifest import verify_folder
from loray.errors import IntegrityError
from loray.files import boot_id
from loray.store.adapters import AdapterStore, check_digest
from loray.telemetry import get_logger

log = get_logger(__name__)

NODE_CACHE_BYTES = 16 << 30  # of disk
_SCAN_INTERVAL_S = 60.0
_STALE_S = 3600.0
_MOST_SEAL = 4096  # bytes


class CacheEntry(NamedTuple):
    """An adapter's place in a cache. Where it is not `present`, `folder` does not exist, and must appear complete."""

    folder: Path
    present: bool


class _CachedAdapter(NamedTuple):
    used_at: int
    nbytes: int
    digest: str


class AdapterCache:
    """A cache that evicts the least recently used adapters, but none that a process of the node has pinned.

    Each adapter has a lock file (`locks/DIGEST`, flock), shared while the adapter is pinned, exclusive while it is
    fetched or evicted. So many requests for one adapter, of threads or processes, cause one fetch, and a process that
    dies releases its locks.
    """

    def __init__(self, store: AdapterStore, folder: Path, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, not {max_bytes}")
        self._store = store
        self._entries = folder / "adapters"
        self._locks = folder / "locks"
        self._max_bytes = max_bytes
        self._trusted: set[str] = set()  # verified by this process; guarded by _mutex
        self._mutex = threading.Lock()
        self._added = self._room = 0  # bytes added since the last scan of all entries, and bytes free at that time
        self._next_scan = 0.0
        self._entries.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(parents=True, exist_ok=True)
        for left in self._entries.glob(".*"):  # of fetches and evictions whose process died
            with suppress(FileNotFoundError):  # another process's fetch has just ended
                if time.time() - left.stat().st_mtime > _STALE_S:
                    shutil.rmtree(left, ignore_errors=True)

    def put(self, digest: str, files: Mapping[str, bytes]) -> None:
        """Add an adapter of these files, which the caller has hashed, so that other processes need not; nothing happens
        where it is present.
        """
        with self.entry(digest) as entry:
            if not entry.present:
                write_entry(entry.folder, files)
                (self._locks / digest).write_bytes(_seal(entry.folder))

    def get(self, digest: str) -> Path:
        """The adapter's folder, fetched where the cache lacks it. It may be evicted at any time unless it is pinned.

        Raises NotFoundError and IntegrityError as the store does.
        """
        with self.pinned(digest) as path:
            return path

    @contextmanager
    def pinned(self, digest: str) -> Iterator[Path]:
        """The adapter's folder, fetched where the cache lacks it, which is not evicted before the block ends."""
        while True:
            with self.entry(digest) as entry:
                if entry.present:
                    yield entry.folder
                    return
                self._store.fetch(digest, entry.folder)

    @contextmanager
    def entry(self, digest: str, *, is_good: Callable[[Path], bool] | None = None) -> Iterator[CacheEntry]:
        """The adapter's entry until the block ends: pinned where it is present, else locked for the caller to fill.

        `is_good` checks a folder that an earlier process left, instead of hashing its files. The caller verifies the
        files before it creates the folder. The block may end in another thread than it began.
        """
        path = self._entries / check_digest(digest)
        while True:
            with self._lock(digest, fcntl.LOCK_SH) as handle:
                if self._is_good(digest, path, handle, is_good):
                    _note_use(handle)
                    yield CacheEntry(path, present=True)
                    return
            with self._lock(digest, fcntl.LOCK_EX) as handle:
                if self._is_good(digest, path, handle, is_good):
                    continue
                self._remove(path)
                try:
                    yield CacheEntry(path, present=False)
                finally:
                    if path.is_dir():
                        self._trust(digest)
                        self.trim(keep=digest)
                    else:
                        (self._locks / digest).unlink(missing_ok=True)  # while this process holds the lock
                return

    def trim(self, keep: str) -> None:
        """Remove the least recently used entries until the rest fits, but neither `keep`, which has grown, nor pinned
        ones.

        The entries are scanned only where they may be too many: this process has added more than half of the bytes that
        were free at the last scan, or that scan is old, since other processes add entries as well.
        """
        with self._mutex:
            self._added += _folder_bytes(self._entries / keep)
            if 2 * self._added <= self._room and time.monotonic() < self._next_scan:
                return
        entries = sorted(self._scan())
        total = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if total <= self._max_bytes:
                break
            if entry.digest != keep and self.remove(entry.digest):
                total -= entry.nbytes
        with self._mutex:
            self._added, self._room = 0, self._max_bytes - total
            self._next_scan = time.monotonic() + _SCAN_INTERVAL_S

    def _is_good(self, digest: str, path: Path, handle: int, is_good: Callable[[Path], bool] | None) -> bool:
        """The entry is present, and was verified once by this process: one of an earlier process may be damaged, unless
        it is as `put` has written it. `handle`: of its lock.
        """
        if not path.is_dir():
            return False
        with self._mutex:
            if digest in self._trusted:
                return True
        try:
            seal = os.pread(handle, _MOST_SEAL, 0)
            if not (seal and seal == _seal(path)) and (is_good is None or not is_good(path)):
                verify_folder(path)
        except IntegrityError as e:
            log.warning("cached adapter is damaged and is fetched again: %s", e)
            return False
        self._trust(digest)
        return True

    def _trust(self, digest: str) -> None:
        with self._mutex:
            self._trusted.add(digest)

    def remove(self, digest: str) -> bool:
        """Remove an adapter, without waiting; False where it is pinned, or is being written."""
        try:
            with self._lock(digest, fcntl.LOCK_EX | fcntl.LOCK_NB):
                with self._mutex:
                    self._trusted.discard(digest)
                self._remove(self._entries / digest)
                (self._locks / digest).unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True

    def _scan(self) -> Iterator[_CachedAdapter]:
        for path in self._entries.iterdir():
            if path.name.startswith("."):
                continue
            try:
                yield _CachedAdapter((self._locks / path.name).stat().st_mtime_ns, _folder_bytes(path), path.name)
            except FileNotFoundError:
                continue  # another process has just evicted it

    def _remove(self, path: Path) -> None:
        """Rename first, then remove: a process that dies in between leaves no incomplete entry."""
        if path.exists():
            trash = path.with_name(f".evicted-{path.name}-{os.getpid()}-{threading.get_ident()}")
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    @contextmanager
    def _lock(self, digest: str, mode: int) -> Iterator[int]:
        """flock on the adapter's lock file. Raises BlockingIOError where `mode` has LOCK_NB and it is locked."""
        path = self._locks / digest
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, mode)
                # An eviction may have unlinked the file in the meantime: then this lock protects nothing.
                if _same_file(handle, path):
                    yield handle
                    return
            finally:
                os.close(handle)


def write_entry(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write an entry that is not present, see `AdapterCache.entry`: `folder` appears when it is complete. It need not
    outlive a crash of the machine, so nothing is synced.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder.parent))
    try:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _seal(folder: Path) -> bytes:
    """Return names, sizes and times of an entry's files behind the name of this boot: what was not synced may be
    damaged after a crash. Empty where the system does not say it, or a file is being written.
    """
    try:
        files = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
        return "\n".join([boot_id(), *(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in files)]).encode()
    except OSError:
        return b""


def _note_use(handle: int) -> None:
    used_at = time.time_ns()  # of a higher resolution than utime's own clock
    os.utime(handle, ns=(used_at, used_at))


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
