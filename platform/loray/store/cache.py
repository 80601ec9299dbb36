"""A node's copies of adapters: fetched once, verified, bounded in bytes, shared by the processes of the node."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from loray.adapters.manifest import verify_folder
from loray.errors import IntegrityError
from loray.store.adapters import AdapterStore, check_digest
from loray.telemetry import get_logger

log = get_logger(__name__)

_LOOK_S = 60.0
_STALE_S = 3600.0

Fetch = Callable[[str, Path], object]  # (digest, a folder that appears only when it is whole)


class CacheEntry(NamedTuple):
    """Not `present`: `folder` does not exist, and is to appear when it is whole."""

    folder: Path
    present: bool


class _Entry(NamedTuple):
    used_at: int
    nbytes: int
    digest: str


class AdapterCache:
    """Least recently used adapters go first; one that is pinned, by any process of the node, stays.

    One lock file per adapter (`locks/DIGEST`, flock): shared while pinned, exclusive to fetch or evict. So a
    hundred requests for one cold adapter are one fetch, whether they come from threads or from processes, and a
    process that dies releases what it held.
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
        self._added = self._room = 0  # bytes since the last look at all entries, and what was free then
        self._look_by = 0.0
        self._entries.mkdir(parents=True, exist_ok=True)
        self._locks.mkdir(parents=True, exist_ok=True)
        for left in self._entries.glob(".*"):  # of fetches and evictions that died
            with suppress(FileNotFoundError):  # another process's fetch, that ended meanwhile
                if time.time() - left.stat().st_mtime > _STALE_S:
                    shutil.rmtree(left, ignore_errors=True)

    def get(self, digest: str) -> Path:
        """The folder of the adapter, fetched where it is not here. It may be evicted later: pin it to read it.

        Raises NotFoundError and IntegrityError as the store does.
        """
        with self.pinned(digest) as path:
            return path

    @contextmanager
    def pinned(
        self, digest: str, *, fetch: Fetch | None = None, is_good: Callable[[Path], bool] | None = None
    ) -> Iterator[Path]:
        """As `get`; the folder stays until the block ends.

        `fetch` makes the folder in the store's place, once for all who wait for it. `is_good` says of a folder that an
        earlier process left whether it is to be trusted, in place of hashing the adapter's files.
        """
        while True:
            with self.entry(digest, is_good=is_good) as entry:
                if entry.present:
                    yield entry.folder
                    return
                (fetch or self._store.fetch)(digest, entry.folder)

    @contextmanager
    def entry(self, digest: str, *, is_good: Callable[[Path], bool] | None = None) -> Iterator[CacheEntry]:
        """The adapter's place until the block ends: pinned where it is present, else the caller's alone, to fill.

        Who fills it has verified what it puts there. The block may end in another thread than it began in.
        """
        path = self._entries / check_digest(digest)
        while True:
            with self._lock(digest, fcntl.LOCK_SH) as handle:
                if self._is_good(digest, path, is_good):
                    used_at = time.time_ns()  # finer than the clock that utime takes by itself
                    os.utime(handle, ns=(used_at, used_at))
                    yield CacheEntry(path, present=True)
                    return
            with self._lock(digest, fcntl.LOCK_EX):
                if self._is_good(digest, path, is_good):
                    continue
                self._remove(path)
                try:
                    yield CacheEntry(path, present=False)
                finally:
                    if path.is_dir():
                        self._trust(digest)
                        self._evict(keep=digest)
                    else:
                        (self._locks / digest).unlink(missing_ok=True)  # held: nobody else is at it
                return

    def trim(self, keep: str) -> None:
        """After `keep`, which is pinned, has grown."""
        self._evict(keep=keep)

    def _is_good(self, digest: str, path: Path, is_good: Callable[[Path], bool] | None) -> bool:
        """Present, and hashed once by this process: what an earlier one left may be torn."""
        if not path.is_dir():
            return False
        with self._mutex:
            if digest in self._trusted:
                return True
        try:
            if is_good is None or not is_good(path):
                verify_folder(path)
        except IntegrityError as e:
            log.warning("cached adapter is damaged and is fetched again: %s", e)
            return False
        self._trust(digest)
        return True

    def _trust(self, digest: str) -> None:
        with self._mutex:
            self._trusted.add(digest)

    def _evict(self, *, keep: str) -> None:
        """Remove the least recently used entries until all fit; `keep` and pinned ones stay.

        All are looked at only where they might be too many: what this process has added since the last look is more
        than half of the room that there was, or the look is old, since others add as well.
        """
        with self._mutex:
            self._added += _folder_bytes(self._entries / keep)
            if 2 * self._added <= self._room and time.monotonic() < self._look_by:
                return
        entries = sorted(self._scan())
        total = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if total <= self._max_bytes:
                break
            if entry.digest != keep and self._evict_one(entry.digest):
                total -= entry.nbytes
        with self._mutex:
            self._added, self._room = 0, self._max_bytes - total
            self._look_by = time.monotonic() + _LOOK_S

    def _evict_one(self, digest: str) -> bool:
        try:
            with self._lock(digest, fcntl.LOCK_EX | fcntl.LOCK_NB):
                with self._mutex:
                    self._trusted.discard(digest)
                self._remove(self._entries / digest)
                (self._locks / digest).unlink(missing_ok=True)
        except BlockingIOError:
            return False  # pinned
        return True

    def _scan(self) -> Iterator[_Entry]:
        for path in self._entries.iterdir():
            if path.name.startswith("."):
                continue
            try:
                yield _Entry((self._locks / path.name).stat().st_mtime_ns, _folder_bytes(path), path.name)
            except FileNotFoundError:
                continue  # evicted by another process meanwhile

    def _remove(self, path: Path) -> None:
        """Out of sight first, in one step: a process that dies in between leaves no half adapter."""
        if path.exists():
            trash = path.with_name(f".evicted-{path.name}-{os.getpid()}-{threading.get_ident()}")
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    @contextmanager
    def _lock(self, digest: str, mode: int) -> Iterator[int]:
        """flock on the adapter's lock file. Raises BlockingIOError where `mode` has LOCK_NB and others hold it."""
        path = self._locks / digest
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, mode)
                # An eviction may have unlinked the file that we waited for: then it locks nothing.
                if _same_file(handle, path):
                    yield handle
                    return
            finally:
                os.close(handle)


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
