"""The keys of one server process: a ring that follows the catalog, and the principal of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

from loray.catalog import Catalog
from loray.catalog.audit_chain import origin
from loray.catalog.identity import Refusals, Refused
from loray.catalog.identity.disk import KeysFile
from loray.catalog.snapshots.kept import Kept
from loray.errors import CatalogError, LorayError, PermissionDenied, Unauthenticated
from loray.locations import is_on_loopback
from loray.serving.access import NO_KEY, Action, check
from loray.serving.key_ring import KeyRing
from loray.settings import Settings
from loray.spec import SCOPES, KeyChanges, Principal
from serve_apps.access import browsers
from serve_apps.following import CatalogFollower, Keeper

REFRESH_S = 1.0  # a revoked key is refused after that, and the time of one query
_USE_S = 60  # a key's last use is written once in that time
TENANT = "x-tenant-id"  # a tenant that a proxy acts for
HEADERS = browsers.HEADERS | {"authorization", TENANT}  # those of a request that are read
_MOST_REFUSED = 100  # kinds of refused requests that the audit log tells apart in a minute
_BEARER = "bearer "


class Access:
    """Who asks. Used from one event loop, and by all applications of a process. `follower` reads the catalog's keys.

    While nobody has made a key, a server on loopback needs none, and refuses what a web page may send.

    is_limited  is set while a key or a tenant of the catalog has a limit that is counted
    """

    what, look_s = "keys", REFRESH_S

    def __init__(
        self,
        ring: KeyRing,
        follower: CatalogFollower,
        *,
        host: str,
        names: frozenset[str] = frozenset(),
        kept: KeysFile | None = None,
    ) -> None:
        """`host` is where the server listens; `names` are what the header Host may say beside loopback's names. `kept`:
        the file whose keys are used until the catalog can be read for the first time.
        """
        self.ring = self._empty = ring
        self.follower = follower
        self.is_limited = asyncio.Event()
        self._kept = kept
        self._keeper: Keeper[KeyChanges] = Keeper(kept, delay_s=0.0)
        self._num_changes = 0  # of keys and tenants, since the start
        self._is_local = is_on_loopback(host)
        self._names = names
        self._num_users = 0
        self._minutes: dict[str, int] = {}  # key id → the last period in which it was used
        self._used: dict[str, datetime] = {}  # not written yet
        self._asking: dict[str, set[asyncio.Future[None]]] = {}  # key id → its requests that are answered now
        self._refused: dict[Refused, Refusals] = {}  # not written yet
        self._wrote_at = time.monotonic()
        follower.add(self)

    # -- the catalog --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reads the keys, and again from now on. Each application that uses this object calls it, and `stop`."""
        self._num_users += 1
        await self.follower.start()

    async def stop(self) -> None:
        self._num_users -= 1
        if not self._num_users and self.follower.failure is None:
            self._write_uses()
        await self.follower.stop()

    def close(self) -> None:
        self.follower.close()

    async def refresh(self) -> None:
        """Takes over what has changed. After an error of the database, the keys that are known go on."""
        await self.follower.refresh()

    @property
    def counter(self) -> int:
        return self.ring.counter

    @property
    def needs_key(self) -> bool:
        """Whether requests need one: a server on loopback needs none while nobody has made a key."""
        return not self._is_local or self.ring.needs_key

    @property
    def age_s(self) -> float:
        """Seconds since the keys were last known to be current; infinite before the first time."""
        return time.monotonic() - self.ring.read_at

    def read(self, catalog: Catalog, *, whole: bool) -> KeyRing:
        before = self._empty if whole else self.ring
        return before.updated(catalog.key_changes(before.counter), time.monotonic())

    def read_kept(self) -> Kept[KeyRing] | None:
        found = None if self._kept is None else self._kept.read()
        return found and Kept(self._empty.updated(found.state, float("-inf")), found.age_s)

    def take(self, state: KeyRing, at: float) -> None:
        if not state.has_same_keys(self.ring):
            self._num_changes += 1
            self._end(self._asking.keys() - state.good_ids())
        self.ring = state.confirmed(at)
        if state.has_limits:
            self.is_limited.set()
        else:
            self.is_limited.clear()

    def confirm(self, at: float) -> None:
        self.ring = ring = self.ring.confirmed(at)
        self._keeper.keep(lambda: ring.state, self._num_changes)
        if at - self._wrote_at >= _USE_S:
            self._write_uses()

    def _end(self, key_ids: Iterable[str]) -> None:
        for key_id in key_ids:
            for revoked in self._asking[key_id]:
                if not revoked.done():
                    revoked.set_result(None)

    def _write_uses(self) -> None:
        self._wrote_at = time.monotonic()
        if self._used:
            used, self._used = self._used, {}
            self.follower.soon(lambda catalog: catalog.note_key_use(used))
        if self._refused:
            refused, self._refused = self._refused, {}
            self.follower.soon(lambda catalog: catalog.note_refused(refused))

    def _note_refused(self, action: Action, headers: Mapping[str, str]) -> None:
        address, request_id = origin()
        try:
            principal = self._of_key(headers)
            who = Refused(principal.actor, principal.tenant, address, action)
        except LorayError:  # of no tenant: only administrators read of it
            who = Refused("unknown", "", address, action)
        if who not in self._refused and len(self._refused) >= _MOST_REFUSED:
            who = Refused("others", "", None, action)
        known = self._refused.get(who, Refusals(0, request_id))
        self._refused[who] = known._replace(num_requests=known.num_requests + 1)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def admit(self, method: str, action: Action, headers: Mapping[str, str]) -> Principal | None:
        """The principal of a request that may do `action`; None for what needs no key. `headers`: those of HEADERS.

        The audit log has those that are refused. Raises Unauthenticated, PermissionDenied, and CatalogError where it is
        not known whether a key is good.
        """
        if action == "open":
            return None
        if not self.follower.is_running:
            await self.refresh()
        try:
            return self._admit(method, action, headers)
        except (Unauthenticated, PermissionDenied):
            self._note_refused(action, headers)
            raise

    def _admit(self, method: str, action: Action, headers: Mapping[str, str]) -> Principal:
        if not self.needs_key:
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

    @contextmanager
    def until_revoked(self, principal: Principal | None) -> Iterator[asyncio.Future[None]]:
        """While a request of this principal is answered: done as soon as its key is revoked or blocked."""
        revoked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        key_id = None if principal is None else principal.key_id
        if key_id is None or key_id in STATIC_KEYS:
            yield revoked
            return
        asking = self._asking.setdefault(key_id, set())
        asking.add(revoked)
        try:
            yield revoked
        finally:
            asking.discard(revoked)
            if not asking:
                self._asking.pop(key_id, None)

    def _local(self, method: str, headers: Mapping[str, str]) -> Principal:
        """Of a request without keys. It acts for any tenant."""
        if not self.ring.was_read:
            raise CatalogError(
                f"the catalog could not be read yet, so it is not known who may ask ({self.follower.failure})"
            )
        browsers.refuse_strangers(method, headers, self._names)
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


CATALOG_KEYS = "catalog-keys.jsonl"  # in the home folder
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
    return Access(ring, CatalogFollower(lambda: Catalog(settings.catalog)), host=host, kept=kept)
