"""One connection that follows the catalog for all readers of a process, and the copies that they keep on disk.

Readers keep something of the catalog each: a gateway its names, an authenticator its keys. While a reader reads, which
may take seconds, looks go on, and the other readers with them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

from loray.catalog import Catalog
from loray.catalog.snapshot_file import SnapshotStore, StoredSnapshot
from loray.errors import CatalogError
from loray.files import touch
from loray.telemetry import get_logger

_log = get_logger(__name__)

S = TypeVar("S")
T = TypeVar("T")

KEEP_S = 60.0  # between two notes that a copy on disk is current
SPREAD_S = 10.0  # over which processes read all again when the database is back
_DATABASE_TIMEOUT_S = 5.0
_NUM_THREADS = 5  # for a look, two readers, what one of them has to write, and a question


class Reader(Protocol[S]):
    """Keeps something of the catalog. Everything but `read` and `read_kept` is called in the event loop.

    what     that is, for messages
    look_s   the longest time between two looks
    counter  the change counter of what is known; -1: nothing is known
    """

    @property
    def what(self) -> str: ...

    @property
    def look_s(self) -> float: ...

    @property
    def counter(self) -> int: ...

    def read(self, catalog: Catalog, *, whole: bool) -> S:
        """Read in a thread what is to be known now. `whole`: nothing known may be relied on, since the database may
        be another copy of the catalog, a backup that was restored.
        """

    def read_kept(self) -> StoredSnapshot[S] | None:
        """Read in a thread what was kept on disk."""

    def take(self, state: S, at: float) -> None:
        """Take what is known from now on. It was current at `at`, of the monotonic clock."""

    def confirm(self, at: float) -> None:
        """Confirm that what is known is the database's, and was current at `at`."""


class _Followed:
    """A reader that is followed.

    rereads   nothing was read yet, or an error came since: what answers then may be another copy
    whole_at  when all is read again, though something is known, of the monotonic clock; None: not decided yet
    """

    def __init__(self, reader: Reader[Any]) -> None:
        self.reader = reader
        self.rereads = True
        self.whole_at: float | None = None
        self.tried_kept = False
        self.reading: asyncio.Task[None] | None = None
        self.began_at = 0.0


class CatalogWatcher:
    """Follows the catalog from one event loop, for its readers. The first look that reaches the database opens it.

    failure    why the catalog cannot be read now; None: it can
    looked_at  when the last look began, whether or not it succeeded
    """

    def __init__(self, open_catalog: Callable[[], Catalog]) -> None:
        self.failure: str | None = None
        self.looked_at = float("-inf")
        self._open_catalog, self._opening = open_catalog, Lock()
        self._catalog: Catalog | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._followed: list[_Followed] = []
        self._looking = asyncio.Lock()
        self._counting: asyncio.Future[int] | None = None
        self._works: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._num_users = 0

    @property
    def is_running(self) -> bool:
        return self._watcher is not None

    def add(self, reader: Reader[Any]) -> None:
        self._followed.append(_Followed(reader))

    async def start(self) -> None:
        """Look now, and again from now on. Each application that uses this object calls it, and `stop`."""
        self._num_users += 1
        if self._watcher is None:
            await self.refresh()
            self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        self._num_users -= 1
        if self._num_users or self._watcher is None:
            return
        reading = [followed.reading for followed in self._followed if followed.reading is not None]
        for task in (self._watcher, *reading):
            task.cancel()
        await asyncio.gather(self._watcher, *reading, return_exceptions=True)
        if self._works:
            await asyncio.wait(self._works, timeout=_DATABASE_TIMEOUT_S)
        self._watcher, self._looking = None, asyncio.Lock()
        self.close()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if self._catalog is not None:
            self._catalog.close()
        self._threads = self._catalog = self._counting = None

    async def refresh(self, since: float | None = None) -> None:
        """Return when all readers know what the catalog had at `since` (None: now), or an error prevents it."""
        since = time.monotonic() if since is None else since
        await self._settle()  # what is being read may have begun before
        await self._look(since)
        await self._settle()

    async def ask(self, question: Callable[[Catalog], T]) -> T:
        """Ask the catalog in a thread. Raises what it raises."""
        return await self._in_thread(question)

    def soon(self, work: Callable[[Catalog], object]) -> None:
        """Do work in a thread that is not worth a second try: errors of the catalog are forgotten."""

        async def attempt() -> None:
            try:
                await self._in_thread(work)
            except CatalogError as e:
                _log.debug("not written: %s", e)

        task = asyncio.create_task(attempt())
        self._works.add(task)
        task.add_done_callback(self._works.discard)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(followed.reader.look_s for followed in self._followed))
            try:
                await self._look(time.monotonic())
            except Exception:  # noqa: BLE001 - whatever it is, revoked keys must be seen
                _log.exception("the catalog is looked at again, after an error that is not the database's")

    async def _look(self, since: float) -> None:
        """Make readers read what has changed, if no look has begun since then. Does not wait for them."""
        async with self._looking:
            if self.looked_at >= since:
                return
            self.looked_at = began_at = time.monotonic()
            if self._counting is None or self._counting.done():  # while a look hangs, the next one waits for it
                self._counting = asyncio.ensure_future(self._in_thread(lambda catalog: catalog.change_counter()))
            try:
                async with asyncio.timeout(_DATABASE_TIMEOUT_S):  # wait_for may forget that this task is cancelled
                    counter = await asyncio.shield(self._counting)
            except Exception as e:  # noqa: BLE001 - after any error of the database, what is known goes on
                for followed in self._followed:
                    followed.rereads, followed.whole_at = True, None
                await self._failed(e)
                return
            for followed in self._followed:
                self._follow(followed, counter, began_at)
            if any(f.reading is not None and began_at - f.began_at > _DATABASE_TIMEOUT_S for f in self._followed):
                await self._failed(TimeoutError("reading it takes long"))
            self._note_success()

    def _follow(self, followed: _Followed, counter: int, at: float) -> None:
        if followed.reading is not None:
            return
        known = followed.reader.counter
        whole = followed.rereads and (known < 0 or counter < known or self._is_due(followed, at))
        if known == counter and not whole:
            followed.reader.confirm(at)
            return
        followed.began_at = at
        followed.reading = asyncio.create_task(self._read(followed, at, whole))

    def _is_due(self, followed: _Followed, at: float) -> bool:
        """When the database is back after an error, all processes know what has changed at once. That it is no other
        copy, for which each reads all, they find out one after another.
        """
        if followed.whole_at is None:
            followed.whole_at = at + random.uniform(0, SPREAD_S)
        return at >= followed.whole_at

    async def _read(self, followed: _Followed, at: float, whole: bool) -> None:
        reader = followed.reader
        if whole:
            followed.rereads, followed.whole_at = False, None
        try:
            state = await self._in_thread(lambda catalog: reader.read(catalog, whole=whole))
        except Exception as e:  # noqa: BLE001 - as in a look
            followed.rereads, followed.whole_at = True, None
            await self._failed(e)
        else:
            reader.take(state, at)
            reader.confirm(at)
        finally:
            followed.reading = None
        self._note_success()

    async def _settle(self) -> None:
        reading = [followed.reading for followed in self._followed if followed.reading is not None]
        if reading:
            _, late = await asyncio.wait(reading, timeout=_DATABASE_TIMEOUT_S)
            if late:
                await self._failed(TimeoutError("reading it takes long"))

    async def _failed(self, error: Exception) -> None:
        if self.failure is None:
            _log.warning("the catalog cannot be read, what is known of it goes on: %r", error)
        self.failure = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        for followed in self._followed:
            if followed.reader.counter < 0 and not followed.tried_kept:
                followed.tried_kept = True
                await self._use_kept(followed)

    async def _use_kept(self, followed: _Followed) -> None:
        reader = followed.reader
        kept = await asyncio.get_running_loop().run_in_executor(self._pool(), reader.read_kept)
        if kept is not None and reader.counter < 0:
            reader.take(kept.state, time.monotonic() - kept.age_s)
            _log.warning("the catalog's %s of %.0f s ago are used, which were kept on disk", reader.what, kept.age_s)

    def _note_success(self) -> None:
        """Note that a look or a reading has succeeded."""
        if self.failure is not None and not any(
            (f.rereads and f.whole_at is None) or f.reading is not None for f in self._followed
        ):
            self.failure = None
            _log.info("the catalog can be read again")

    async def _in_thread(self, work: Callable[[Catalog], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool(), lambda: work(self._known()))

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="catalog")
        return self._threads

    def _known(self) -> Catalog:
        with self._opening:
            if self._catalog is None:
                self._catalog = self._open_catalog()
            return self._catalog


class SnapshotWriter(Generic[S]):
    """Keeps a copy on disk up to date, from a thread. `delay_s`: the least time between two copies."""

    def __init__(self, file: SnapshotStore[S] | None, delay_s: float = KEEP_S) -> None:
        self._file, self._delay_s = file, delay_s
        self._writing: asyncio.Future[bool] | None = None
        self._written_at = float("-inf")
        self._version: int | None = None

    def keep(self, state: Callable[[], S], version: int) -> None:
        """Keep a state that is known to be current. One of the same version needs no other copy."""
        if self._file is None or (self._writing is not None and not self._writing.done()):
            return
        is_written = version == self._version and self._writing is not None and self._writing.result()
        now = time.monotonic()
        if now - self._written_at >= (KEEP_S if version == self._version else self._delay_s):
            self._written_at, self._version = now, version
            self._writing = asyncio.get_running_loop().run_in_executor(None, _write, self._file, state, is_written)


def _write(file: SnapshotStore[S], state: Callable[[], S], is_written: bool) -> bool:
    return (is_written and touch(file.path)) or file.write(state())
