"""The keys of one server process: a ring that follows the catalog, and the principal of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime

from loray.catalog import Catalog
from loray.catalog.identity.disk import KeysFile
from loray.errors import CatalogError, PermissionDenied, Unauthenticated
from loray.files import touch
from loray.locations import is_this_machine
from loray.serving.access import NO_KEY, Action, check
from loray.serving.key_ring import KeyRing
from loray.settings import Settings
from loray.spec import SCOPES, Principal
from loray.telemetry import get_logger
from serve_apps.access.browsers import refuse_strangers

_log = get_logger(__name__)

REFRESH_S = 1.0  # a revoked key is refused after that, and the time of one query
_DATABASE_TIMEOUT_S = 5.0
_KEEP_S = 60.0  # between two notes that the keys on disk are current
_USE_S = 60  # a key's last use is written once in that time
TENANT = "x-tenant-id"  # a tenant that a proxy acts for
_BEARER = "bearer "


class Access:
    """Who asks. Used from one event loop, and by all applications of a process.

    While nobody has made a key, a server on loopback needs none, and refuses what a web page may send.
    """

    def __init__(
        self,
        ring: KeyRing,
        open_catalog: Callable[[], Catalog],
        *,
        host: str,
        names: frozenset[str] = frozenset(),
        kept: KeysFile | None = None,
    ) -> None:
        """`host` is where the server listens; `names` are what the header Host may say beside loopback's names. `kept`:
        the file whose keys are used until the catalog can be read for the first time.
        """
        self.ring = self._empty = ring
        self._kept, self._kept_at = kept, float("-inf")
        self._rereads = False  # after an error: what answers then may be a backup that was restored
        self._is_local = is_this_machine(f"[{host}]" if ":" in host else host)
        self._names = names
        self._open_catalog = open_catalog
        self._catalog: Catalog | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self._reading: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._users = 0
        self._failure: str | None = None
        self._minutes: dict[str, int] = {}  # key id → the last period in which it was used
        self._used: dict[str, datetime] = {}  # not written yet
        self._wrote_at = time.monotonic()

    # -- the catalog --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reads the keys, and again from now on. Each application that uses this object calls it, and `stop`."""
        self._users += 1
        if self._watcher is None:
            await self.refresh()
            self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        self._users -= 1
        if self._users or self._watcher is None:
            return
        self._watcher.cancel()
        if self._used and self._failure is None:
            self._wrote_at = float("-inf")
            await self.refresh()
        self.close()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._catalog is not None:
            self._catalog.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Takes over what has changed. After an error of the database, the keys that are known go on."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self._thread, self._read)
        try:
            await asyncio.wait_for(asyncio.shield(self._reading), _DATABASE_TIMEOUT_S)
        except Exception as e:  # noqa: BLE001 - after any error of the database the known keys go on, for their time
            if self._failure is None:
                _log.warning("the catalog's keys cannot be read, those that are known go on: %r", e)
            self._failure = str(e) or type(e).__name__
            self._rereads = True
            if not self.ring.was_read:
                await asyncio.to_thread(self._read_kept)
        else:
            self._failure = None

    def _read(self) -> None:
        if self._catalog is None:
            self._catalog = self._open_catalog()
        read_at = time.monotonic()
        changed = False
        if not self._rereads and self._catalog.change_counter() == self.ring.counter:
            self.ring = self.ring.confirmed(read_at)
        else:
            before = self._empty if self._rereads else self.ring
            changes = self._catalog.key_changes(before.counter)
            self.ring, self._rereads = before.updated(changes, read_at), False
            changed = bool(changes.keys or changes.tenants)
        self._keep(read_at, changed=changed)
        if self._used and read_at - self._wrote_at >= _USE_S:
            self._wrote_at, used, self._used = read_at, self._used, {}
            with suppress(CatalogError):  # it is not worth a second try
                self._catalog.note_key_use(used)

    def _keep(self, read_at: float, *, changed: bool) -> None:
        if self._kept is None or not (changed or read_at - self._kept_at >= _KEEP_S):
            return
        self._kept_at = read_at
        if changed or not touch(self._kept.path):
            self._kept.write(self.ring.state)

    def _read_kept(self) -> None:
        found = None if self._kept is None else self._kept.read()
        if found is not None and not self.ring.was_read:
            _log.warning("requests are checked by the keys of %.0f s ago, kept on disk", found.age_s)
            self.ring = self._empty.updated(found.all, time.monotonic() - found.age_s)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def admit(self, method: str, action: Action, headers: Mapping[str, str]) -> Principal | None:
        """The principal of a request that may do `action`; None for what needs no key. `headers` has lower-case names.

        Raises Unauthenticated, PermissionDenied, and CatalogError where it is not known whether a key is good.
        """
        if action == "open":
            return None
        if self._watcher is None:
            await self.refresh()
        if self._is_local and not self.ring.needs_key:
            return self._local(method, headers)
        principal = self._of_key(headers)
        if principal.key_id == METRICS_KEY:
            if action != "observe":
                raise PermissionDenied("this key reads /metrics and /status, and nothing else")
            return principal
        if (tenant := headers.get(TENANT)) is not None:
            principal = self.ring.acting_for(principal, tenant)
        check(principal, action)
        return principal

    def _local(self, method: str, headers: Mapping[str, str]) -> Principal:
        """Of a request without keys. It acts for any tenant."""
        if not self.ring.was_read:
            raise CatalogError(f"the catalog could not be read yet, so it is not known who may ask ({self._failure})")
        refuse_strangers(method, headers, self._names)
        tenant = headers.get(TENANT)
        if tenant is None:
            return Principal()
        try:
            return Principal(tenant=tenant)
        except ValueError:
            raise PermissionDenied("X-Tenant-Id is not a tenant's name: letters, digits, '.', '_' and '-'") from None

    def _of_key(self, headers: Mapping[str, str]) -> Principal:
        given = headers.get("authorization")
        if given is None:
            raise Unauthenticated(NO_KEY)
        if given[: len(_BEARER)].lower() != _BEARER:
            raise Unauthenticated("the header Authorization must be `Bearer sk-lr-…`")
        now = time.time()
        principal = self.ring.principal(given[len(_BEARER) :].strip(), now=now, monotonic=time.monotonic())
        self._note(principal, now)
        return principal

    def _note(self, principal: Principal, now: float) -> None:
        key_id, period = principal.key_id, int(now) // _USE_S
        if key_id is not None and key_id not in STATIC_KEYS and self._minutes.get(key_id) != period:
            self._minutes[key_id] = period
            self._used[key_id] = datetime.fromtimestamp(period * _USE_S, UTC)


CATALOG_KEYS = "catalog-keys.json"  # in the home folder
STATIC_KEY, METRICS_KEY = "deployment", "metrics"  # ids of keys that the catalog does not have
STATIC_KEYS = frozenset({STATIC_KEY, METRICS_KEY})


def open_access(settings: Settings, host: str) -> Access:
    """Of a server that listens at `host`, with the deployment's own keys and those of its catalog."""
    admin = Principal(scopes=frozenset(SCOPES), key_id=STATIC_KEY, actor=STATIC_KEY)
    metrics = Principal(scopes=frozenset(), key_id=METRICS_KEY, actor=METRICS_KEY)
    static = {bytes.fromhex(sha256): metrics for sha256 in settings.metrics_key_hashes}
    static |= {bytes.fromhex(sha256): admin for sha256 in settings.static_key_hashes}
    ring = KeyRing(static=static, max_age_s=settings.key_max_age_s)
    kept = KeysFile(settings.home / CATALOG_KEYS, settings.catalog)
    return Access(ring, lambda: Catalog(settings.catalog), host=host, kept=kept)
