"""Resolves model names from a snapshot of the catalog, without a database call for a request with a known name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from loray.api.openai import Model, ModelList
from loray.bases.registry import BaseModel
from loray.catalog import AdapterEntry, Catalog, CatalogSnapshot
from loray.errors import AdapterNotFound, shown
from loray.spec import AdapterRef
from loray.telemetry import get_logger

_log = get_logger(__name__)

REFRESH_S = 0.2  # the time after which a promotion or a rollback takes effect
LOOK_AGAIN_S = 0.05
_DATABASE_TIMEOUT_S = 5.0
_OWNER = "loray"


class ModelDirectory:
    """The base and the adapters of one deployment. Used from one event loop.

    The first refresh that reaches the database opens the catalog. If the database cannot be reached later, the last
    snapshot is used.
    """

    def __init__(self, base: BaseModel, open_catalog: Callable[[], Catalog]) -> None:
        self.base = base
        self.failure: str | None = None  # of the last refresh
        self.longest_context = base.config.max_position_embeddings  # of the base and all its adapters
        self._open_catalog = open_catalog
        self._catalog: Catalog | None = None
        self._snapshot: CatalogSnapshot | None = None
        self._created = int(time.time())
        self._refreshing = asyncio.Lock()
        self._looking = asyncio.Lock()
        self._refreshed_at = float("-inf")  # when the last refresh began, whether or not it succeeded
        self._read_at = float("-inf")  # when the last successful refresh began
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="catalog")
        self._reading: asyncio.Future[None] | None = None

    @property
    def num_adapters(self) -> int:
        return len(self._entries())

    @property
    def age_s(self) -> float:
        """Seconds since the snapshot was last known to be current; infinite before the first one."""
        return time.monotonic() - self._read_at

    def labels(self) -> dict[str, str]:
        """Digest → `name@version` of all versions."""
        entries = () if self._snapshot is None else self._snapshot.models()
        return {ref.digest: ref.label for entry in entries for ref in entry.versions.values()}

    async def watch(self) -> None:
        """Refreshes the snapshot until cancelled."""
        while True:
            await self.refresh()
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

    async def resolve(self, model: str) -> AdapterRef | None:
        """The adapter of a name; None for the base. The database is read again for a name that the snapshot lacks.

        Raises AdapterNotFound, or BaseMismatch for an adapter of another base.
        """
        if model == self.base.name:
            return None
        try:
            ref = self._lookup(model)
        except AdapterNotFound:
            await self._look_again()
            ref = self._lookup(model)
        ref.check_base(self.base.name, self.base.fingerprint)
        return ref

    def template(self, adapter: AdapterRef | None) -> str | None:
        """The chat template of an adapter that has its own; None: the base's is used."""
        if adapter is None or adapter.chat_template is None:
            return None
        assert self._snapshot is not None
        return self._snapshot.templates[adapter.chat_template]

    def models(self, limit: Callable[[int], int]) -> ModelList:
        """The base, then adapters by name. `limit` maps a model's context length to the one that is served."""
        base = Model(
            id=self.base.name,
            object="model",
            created=self._created,
            owned_by=_OWNER,
            root=self.base.name,
            parent=None,
            max_model_len=limit(self.base.config.max_position_embeddings),
        )
        return ModelList(
            object="list", data=[base, *(self._card(e.name, e, e.default, limit) for e in self._entries())]
        )

    async def model(self, model: str, limit: Callable[[int], int]) -> Model:
        """One model, by any name that `resolve` accepts. Raises what `resolve` raises."""
        ref = await self.resolve(model)
        if ref is None:
            return self.models(limit).data[0]
        assert self._snapshot is not None
        return self._card(model, self._snapshot.adapters[ref.name], ref, limit)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._catalog is not None:
            self._catalog.close()

    def _card(self, model: str, entry: AdapterEntry, ref: AdapterRef, limit: Callable[[int], int]) -> Model:
        return Model(
            id=model,
            object="model",
            created=int(entry.created_at.timestamp()),
            owned_by=_OWNER,
            root=ref.label,
            parent=self.base.name,
            max_model_len=limit(ref.context_length),
            method=ref.method,
            digest=ref.digest,
            aliases=dict(entry.aliases),
            versions=sorted(entry.versions, reverse=True),
        )

    def _entries(self) -> tuple[AdapterEntry, ...]:
        return () if self._snapshot is None else self._snapshot.models(self.base.fingerprint)

    def _lookup(self, model: str) -> AdapterRef:
        if self._snapshot is None:
            raise AdapterNotFound(f"no adapter {shown(model)}: the catalog could not be read yet ({self.failure})")
        try:
            return self._snapshot.resolve(model)
        except AdapterNotFound as e:
            raise AdapterNotFound(f"the model {shown(model)} does not exist: {e}") from e

    def _read_in_thread(self) -> asyncio.Future[None]:
        """Reads the database in a thread, once at a time: while a read hangs, the next call waits for it."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self._thread, self._read)
        return self._reading

    def _read(self) -> None:
        if self._catalog is None:
            self._catalog = self._open_catalog()
        if self._snapshot is None or self._catalog.change_counter() != self._snapshot.counter:
            self._snapshot = self._catalog.snapshot(self._snapshot)
            self.longest_context = max(
                [self.base.config.max_position_embeddings]
                + [ref.context_length for entry in self._entries() for ref in entry.versions.values()]
            )
