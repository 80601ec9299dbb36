"""Which model a name means, from a snapshot of the catalog: no database call for a request whose name is known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from loray.api.openai import Model, ModelList
from loray.bases.registry import BaseModel
from loray.catalog import AdapterEntry, Catalog, CatalogSnapshot
from loray.errors import AdapterNotFound, BaseMismatch
from loray.spec import AdapterRef
from loray.telemetry import get_logger

_log = get_logger(__name__)

REFRESH_S = 0.2  # how long promote and roll back take to be seen
_DATABASE_TIMEOUT_S = 5.0
_OWNER = "loray"


class ModelDirectory:
    """The base and the adapters of one deployment. Used from one event loop.

    The catalog is opened by the first refresh that reaches it, and when the database goes away the last snapshot
    goes on answering.
    """

    def __init__(self, base: BaseModel, open_catalog: Callable[[], Catalog]) -> None:
        self.base = base
        self.failure: str | None = None  # of the last refresh
        self._open_catalog = open_catalog
        self._catalog: Catalog | None = None
        self._snapshot: CatalogSnapshot | None = None
        self._created = int(time.time())
        self._refreshing = asyncio.Lock()
        self._refreshed_at = float("-inf")  # when the last refresh began, well or badly ended
        self._read_at = float("-inf")  # when the last one that ended well began
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="catalog")
        self._looking: asyncio.Future[None] | None = None

    @property
    def num_adapters(self) -> int:
        return len(self._entries())

    @property
    def age_s(self) -> float:
        """Since the catalog was last seen to be as the snapshot says; infinite before the first time."""
        return time.monotonic() - self._read_at

    def labels(self) -> dict[str, str]:
        """Digest → `name@version` of all versions."""
        entries = () if self._snapshot is None else self._snapshot.models()
        return {ref.digest: ref.label for entry in entries for ref in entry.versions.values()}

    async def watch(self) -> None:
        """Follow the catalog until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Take a new snapshot if the catalog has changed. Calls that wait for each other share one look at it."""
        asked_at = time.monotonic()
        async with self._refreshing:
            if self._refreshed_at >= asked_at:
                return
            self._refreshed_at = time.monotonic()
            try:
                await asyncio.wait_for(asyncio.shield(self._look_in_thread()), _DATABASE_TIMEOUT_S)
            except Exception as e:  # noqa: BLE001 - whatever the database says, the last snapshot goes on answering
                if self.failure is None:
                    _log.warning("the catalog cannot be read, serving goes on with what is known of it: %r", e)
                self.failure = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
            else:
                if self.failure is not None:
                    _log.info("the catalog can be read again")
                self.failure = None
                self._read_at = self._refreshed_at

    async def resolve(self, model: str) -> AdapterRef | None:
        """None for the base. A name that is not known yet is looked up once in the database.

        Raises AdapterNotFound, or BaseMismatch for an adapter of another base.
        """
        if model == self.base.name:
            return None
        try:
            ref = self._lookup(model)
        except AdapterNotFound:
            await self.refresh()
            ref = self._lookup(model)
        if ref.base_fingerprint != self.base.fingerprint:
            raise BaseMismatch(
                f"adapter {ref.label} was trained on another base than {self.base.name!r}, which is served here "
                f"(fingerprints {ref.base_fingerprint[:12]} and {self.base.fingerprint[:12]})"
            )
        return ref

    def models(self, limit: Callable[[int], int]) -> ModelList:
        """The base, then adapters by name; `limit` cuts a context length to what is served."""
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
        """By any name that `resolve` knows. Raises what it raises."""
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
            raise AdapterNotFound(f"no adapter {model!r}: the catalog could not be read yet ({self.failure})")
        try:
            return self._snapshot.resolve(model)
        except AdapterNotFound as e:
            raise AdapterNotFound(f"the model {model!r} does not exist: {e}") from e

    def _look_in_thread(self) -> asyncio.Future[None]:
        """One look at a time, even where the database hangs: the next waits for the one that hangs."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().run_in_executor(self._thread, self._look)
        return self._looking

    def _look(self) -> None:
        if self._catalog is None:
            self._catalog = self._open_catalog()
        if self._snapshot is None or self._catalog.change_counter() != self._snapshot.counter:
            self._snapshot = self._catalog.snapshot()
