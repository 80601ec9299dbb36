"""Resolves model names from a snapshot of the catalog, without a database call for a request with a known name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor

from loray.bases.registry import BaseModel
from loray.catalog import AdapterEntry, Catalog, CatalogSnapshot
from loray.catalog.snapshots import BaseTotals
from loray.catalog.snapshots.disk import SnapshotFile
from loray.errors import AdapterNotFound, CatalogError, shown
from loray.files import touch
from loray.serving.access import check_model, may_ask
from loray.spec import AdapterRef, Principal
from loray.telemetry import get_logger

_log = get_logger(__name__)

REFRESH_S = 0.2  # the time after which a promotion or a rollback takes effect
LOOK_AGAIN_S = 0.05
KEEP_S = 60.0  # between two copies of the snapshot on disk
_DATABASE_TIMEOUT_S = 5.0


class ModelDirectory:
    """The base and the adapters of one deployment. Used from one event loop.

    The first refresh that reaches the database opens the catalog. If the database cannot be reached later, the last
    snapshot is used; if it cannot be reached at first, the snapshot `kept` on disk.

    A thread reads what changed and makes the next snapshot. The event loop sees it by one assignment, complete.
    """

    def __init__(self, base: BaseModel, open_catalog: Callable[[], Catalog], kept: SnapshotFile | None = None) -> None:
        self.base = base
        self.failure: str | None = None  # of the last refresh
        self._prefix = f"{base.name}:"
        self._open_catalog = open_catalog
        self._catalog: Catalog | None = None
        self._snapshot: CatalogSnapshot | None = None
        self._follows = False  # the snapshot is the database's: nothing failed since it was read
        self._refreshing = asyncio.Lock()
        self._looking = asyncio.Lock()
        self._refreshed_at = float("-inf")  # when the last refresh began, whether or not it succeeded
        self._read_at = float("-inf")  # when the last successful refresh began
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="catalog")
        self._reading: asyncio.Future[None] | None = None
        self._kept = kept
        self._keeping: asyncio.Future[None] | None = None
        self._kept_at, self._kept_counter = float("-inf"), -1

    @property
    def num_adapters(self) -> int:
        return self._totals.num_adapters

    @property
    def longest_context(self) -> int:
        """Of the base and all its adapters."""
        return max(self.base.config.max_position_embeddings, self._totals.longest_context)

    @property
    def age_s(self) -> float:
        """Seconds since the snapshot was last known to be current; infinite before the first one."""
        return time.monotonic() - self._read_at

    @property
    def _totals(self) -> BaseTotals:
        totals = {} if self._snapshot is None else self._snapshot.totals
        return totals.get(self.base.fingerprint, BaseTotals())

    async def labels(self, digests: Collection[str]) -> dict[str, str]:
        """Digest → `name@version` of those that the catalog has. A thread looks through all versions."""
        snapshot, wanted = self._snapshot, frozenset(digests)
        if snapshot is None or not wanted:
            return {}
        refs = (ref for entry in snapshot.models() for ref in entry.refs)
        return await asyncio.to_thread(lambda: {ref.digest: ref.label for ref in refs if ref.digest in wanted})

    async def watch(self) -> None:
        """Refreshes the snapshot until cancelled, and keeps a copy on disk."""
        while True:
            await self.refresh()
            self._keep()
            await asyncio.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Takes a new snapshot if the catalog has changed. Concurrent calls share one read of the database."""
        called_at = time.monotonic()
        async with self._refreshing:
            if self._refreshed_at >= called_at:
                return
            self._refreshed_at = time.monotonic()
            try:
                await asyncio.wait_for(asyncio.shield(self._read_in_thread()), _DATABASE_TIMEOUT_S)
            except Exception as e:  # noqa: BLE001 - after any error of the database the last snapshot is used
                if self.failure is None:
                    _log.warning("the catalog cannot be read, serving goes on with what is known of it: %r", e)
                self.failure = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
            else:
                if self.failure is not None:
                    _log.info("the catalog can be read again")
                self.failure = None
                self._read_at = self._refreshed_at

    async def _look_again(self) -> None:
        """Returns after a refresh that began later than this call. Such refreshes are LOOK_AGAIN_S apart at least, so
        that a flood of unknown names does not become one of reads.
        """
        called_at = time.monotonic()
        async with self._looking:
            if self._refreshed_at < called_at:
                await asyncio.sleep(self._refreshed_at + LOOK_AGAIN_S - time.monotonic())
                await self.refresh()

    async def resolve(self, model: str, principal: Principal) -> AdapterRef | None:
        """The adapter that a name means for this caller; None for the base. `base:name` is accepted as `name`.

        The database is read again for a name that the snapshot lacks, or that does not exist for the caller. Raises
        AdapterNotFound, PermissionDenied for a model that the caller's key is not for, BaseMismatch for an adapter of
        another base, and CatalogError before the first snapshot.
        """
        model = model.removeprefix(self._prefix)
        check_model(principal, model)
        if model == self.base.name:
            return None
        ref = None if self._snapshot is None else self._snapshot.find(model, principal)
        if ref is None:
            await self._look_again()
            ref = self._lookup(model, principal)
        ref.check_base(self.base.name, self.base.fingerprint)
        return ref

    def template(self, adapter: AdapterRef | None) -> str | None:
        """The chat template of an adapter that has its own; None: the base's is used."""
        if adapter is None or adapter.chat_template is None:
            return None
        assert self._snapshot is not None
        return self._snapshot.templates[adapter.chat_template]

    def entries(self, principal: Principal, after: str | None = None) -> Iterator[AdapterEntry | None]:
        """The catalog's adapters of this moment by name, those after the name `after`; None for each that is not
        served here, or not to this caller.
        """
        if self._snapshot is None:
            return
        for entry in self._snapshot.adapters.after(after):
            is_served = entry.default.base_fingerprint == self.base.fingerprint and entry.exists_for(principal)
            yield entry if is_served and may_ask(principal, entry.name) else None

    def entry(self, ref: AdapterRef) -> AdapterEntry:
        """The entry of an adapter that `resolve` has just found."""
        assert self._snapshot is not None
        return self._snapshot.adapters[ref.name]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._catalog is not None:
            self._catalog.close()

    def _lookup(self, model: str, principal: Principal) -> AdapterRef:
        if self._snapshot is None:
            raise CatalogError(
                f"the model {shown(model)} cannot be looked up: the catalog could not be read yet ({self.failure}); "
                "try again"
            )
        try:
            return self._snapshot.resolve(model, principal)
        except AdapterNotFound as e:
            raise AdapterNotFound(f"the model {shown(model)} does not exist: {e}") from e

    def _read_in_thread(self) -> asyncio.Future[None]:
        """Reads the database in a thread, once at a time: while a read hangs, the next call waits for it."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self._thread, self._read)
        return self._reading

    def _read(self) -> None:
        follows, self._follows = self._follows, False
        try:
            if self._catalog is None:
                self._catalog = self._open_catalog()
            before = self._snapshot
            if before is None or not follows:  # after an error, the database may be another copy of the catalog
                self._snapshot = self._catalog.snapshot(before, whole=True)
            elif self._catalog.change_counter() != before.counter:
                self._snapshot = self._catalog.snapshot(before)
        except Exception:
            if self._snapshot is None and self._kept is not None:
                self._use(self._kept)
            raise
        self._follows = True

    def _use(self, kept: SnapshotFile) -> None:
        found = kept.read()
        if found is not None:
            self._snapshot = found.snapshot
            self._read_at = time.monotonic() - found.age_s
            _log.warning("serving with the catalog's names of %.0f s ago, kept on disk", found.age_s)

    def _keep(self) -> None:
        """Brings the copy on disk up to date, in a thread, if the last one is old enough."""
        snapshot, now = self._snapshot, time.monotonic()
        if self._kept is None or snapshot is None or self.failure is not None or now - self._kept_at < KEEP_S:
            return
        self._kept_at = now
        self._keeping = asyncio.get_running_loop().run_in_executor(None, self._write, self._kept, snapshot)

    def _write(self, kept: SnapshotFile, snapshot: CatalogSnapshot) -> None:
        if snapshot.counter != self._kept_counter or not touch(kept.path):
            self._kept_counter = snapshot.counter if kept.write(snapshot) else -1
