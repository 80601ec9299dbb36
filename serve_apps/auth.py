"""Authentication and permissions: who asks, and what each route permits.

`Authenticator` knows the keys, `Authenticate` is the middleware that asks it before a body is read, and `may(...)` says
at a route which permission it takes. `RateLimits` bind how often keys and tenants ask the catalog API.

A page of another site may send forms and plain text here, with the visitor's network but without reading the answer;
and with a name that it makes point at 127.0.0.1, it may read answers too (DNS rebinding). So a server without keys
refuses what a web page may send. Pages of the origins that settings name may ask the gateway, with a key.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path as FilePath
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.catalog import Catalog
from loray.catalog.audit_chain import Origin, coming_from, origin
from loray.catalog.identity import Refusals, Refused
from loray.catalog.snapshot_file import KeysFile, StoredSnapshot
from loray.errors import CatalogError, LorayError, NotFoundError, PermissionDenied, RateLimited, Unauthenticated, shown
from loray.locations import is_on_loopback, is_this_machine
from loray.policy.auth import NO_KEY, Action, KeyRing, check
from loray.settings import Settings
from loray.spec import SCOPES, KeyChanges, Principal
from serve_apps.catalog_watch import CatalogWatcher, SnapshotWriter

_ACTION = "loray_action"
_DOCUMENT = "/openapi.json"  # FastAPI's own route
E = TypeVar("E", bound=Callable[..., object])


def may(action: Action) -> Callable[[E], E]:
    """Permit the endpoint, below its route's decorator, to those alone who may do `action`."""

    def say(endpoint: E) -> E:
        setattr(endpoint, _ACTION, action)
        return endpoint

    return say


def action_of(route: BaseRoute) -> Action:
    """Return who may call the route. Raises TypeError for one that does not say it, and for what is no plain route."""
    action = getattr(route.endpoint, _ACTION, None) if isinstance(route, Route) else None
    if action is None and isinstance(route, Route) and not isinstance(route, APIRoute) and route.path == _DOCUMENT:
        return "open"
    if action is None:
        raise TypeError(f"{route} does not say who may call it: write @may(ACTION) over its endpoint")
    found: Action = action
    return found


class Permissions:
    """The actions of one application's routes, which is not made where one of them says none."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        """Raises TypeError as `action_of` does."""
        self._routes = [(route, action_of(route)) for route in routes]

    def action(self, scope: Scope) -> Action | None:
        """Return the action of the request's route, found as the application finds it; None: there is no route."""
        for route, action in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return action
        return None

    def paths(self, action: Action) -> frozenset[str]:
        """Return the paths of the routes with this action."""
        return frozenset(route.path for route, its in self._routes if its == action and isinstance(route, Route))

    def named(self, method: str, path: str) -> Action:
        """Return the action of the route with this path, as the OpenAPI document spells it."""
        for route, action in self._routes:
            if isinstance(route, Route) and route.path_format == path and method in (route.methods or ()):
                return action
        raise KeyError(f"{method} {path}")


# -- What web pages send --

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
_NO_FORM_SENDS = frozenset({"authorization", "idempotency-key", "if-match", "x-requested-with"})
# What proxies add: who asks is elsewhere then, though the connection comes from this machine.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via")
# By which a server without keys knows what a web page may have sent.
_BROWSER_HEADERS = _NO_FORM_SENDS | {"content-type", "host", "origin", "sec-fetch-site", *_FORWARDED}
_MAKE_A_KEY = "or make a key, `loray keys create --scope admin`, and send it"


def refuse_strangers(method: str, headers: Mapping[str, str], names: frozenset[str]) -> None:
    """Raise PermissionDenied for what a web page may send. `names`: what Host may say beside loopback's."""
    for name in _FORWARDED:
        if name in headers:
            raise PermissionDenied(
                f"the header {name} says that a proxy has sent this on, and without keys this server answers to this "
                f"machine alone: ask it directly, {_MAKE_A_KEY}"
            )
    host = headers.get("host")
    if host is not None and not _is_ours(host, names):
        raise PermissionDenied(
            f"the header Host says {shown(host)}, and without keys this server answers to localhost alone: ask it by "
            f"that name, {_MAKE_A_KEY}"
        )
    if method in _READS:
        return
    refuse_cross_site(headers)
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = (media_type in _FORMS or not media_type) and not _NO_FORM_SENDS & headers.keys()
    if method == "POST" and is_form:
        raise PermissionDenied(
            f"a form of any web page may send {media_type or 'a request without a type'}: send the header "
            f"Content-Type: application/json, {_MAKE_A_KEY}"
        )


def refuse_cross_site(headers: Mapping[str, str]) -> None:
    """Raise PermissionDenied where a browser says that a page of another site sends this."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise PermissionDenied(f"a page of another site ({shown(origin)}) may not do this")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise PermissionDenied("a page of another site may not do this")


def _is_ours(host: str, names: frozenset[str]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and "@" not in host and (name in names or is_this_machine(host))


# -- Keys --

REFRESH_S = 1.0  # a revoked key is refused after that, and the time of one query
_USE_S = 60  # a key's last use is written once in that time
TENANT = "x-tenant-id"  # a tenant that a proxy acts for
_ANTHROPIC_KEY = "x-api-key"  # in which clients of Anthropic's API and of Tinker's may send a key
HEADERS = _BROWSER_HEADERS | {"authorization", _ANTHROPIC_KEY, TENANT}  # those of a request that are read
_MOST_REFUSED = 100  # kinds of refused requests that the audit log tells apart in a minute
_BEARER = "bearer "


class Authenticator:
    """Finds who asks. Used from one event loop, by all applications of a process. `follower` reads the catalog's keys.

    While nobody has made a key, a server on loopback needs none, and refuses what a web page may send.

    is_limited  is set while a key or a tenant of the catalog has a limit that is counted
    """

    what, look_s = "keys", REFRESH_S

    def __init__(
        self,
        ring: KeyRing,
        follower: CatalogWatcher,
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
        self._keeper: SnapshotWriter[KeyChanges] = SnapshotWriter(kept, delay_s=0.0)
        self._num_changes = 0  # of keys and tenants, since the start
        self._is_local = is_on_loopback(host)
        self._names = names
        self._num_users = 0
        self._minutes: dict[str, int] = {}  # key id → the last period in which it was used
        self._used: dict[str, datetime] = {}  # not written yet
        self._asking: dict[str, set[asyncio.Future[None]]] = {}  # key id → its requests that are answered now
        self._refused: dict[Refused, Refusals] = {}  # not written yet
        self._wrote_at = time.monotonic()
        self._accounts: dict[tuple[str, str], tuple[float, Principal]] = {}  # of batches; until when it is known
        follower.add(self)

    # -- the catalog --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the keys, and again from now on. Each application that uses this object calls it, and `stop`."""
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
        """Take over what has changed. After an error of the database, the keys that are known go on."""
        await self.follower.refresh()

    @property
    def counter(self) -> int:
        return self.ring.counter

    @property
    def needs_key(self) -> bool:
        """Tell whether requests need a key: a server on loopback needs none while nobody has made one."""
        return not self._is_local or self.ring.needs_key

    @property
    def age_s(self) -> float:
        """The seconds since the keys were last known to be current; infinite before the first time."""
        return time.monotonic() - self.ring.read_at

    def read(self, catalog: Catalog, *, whole: bool) -> KeyRing:
        before = self._empty if whole else self.ring
        return before.updated(catalog.keys.changes(before.counter), time.monotonic())

    def read_kept(self) -> StoredSnapshot[KeyRing] | None:
        found = None if self._kept is None else self._kept.read()
        return found and StoredSnapshot(self._empty.updated(found.state, float("-inf")), found.age_s)

    def take(self, state: KeyRing, at: float) -> None:
        if not state.has_same_keys(self.ring):
            self._num_changes += 1
            for key_id in self._asking.keys() - state.good_ids():
                for revoked in self._asking[key_id]:
                    if not revoked.done():
                        revoked.set_result(None)
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

    def _write_uses(self) -> None:
        self._wrote_at = time.monotonic()
        if self._used:
            used, self._used = self._used, {}
            self.follower.soon(lambda catalog: catalog.keys.record_use(used))
        if self._refused:
            refused, self._refused = self._refused, {}
            self.follower.soon(lambda catalog: catalog.audit.record_refused(refused))

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
        """Return the principal of a request that may do `action`; None for what needs no key. `headers` are of HEADERS.

        The audit log has what is refused. Raises Unauthenticated, PermissionDenied, and CatalogError where it is
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
        """Give a future for the time of a request, done as soon as the principal's key is revoked or blocked."""
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
        """The principal of a server without keys acts for any tenant."""
        if not self.ring.was_read:
            raise CatalogError(
                f"the catalog could not be read yet, so it is not known who may ask ({self.follower.failure})"
            )
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
        if given is None and (key := headers.get(_ANTHROPIC_KEY)) is not None:
            given = f"{_BEARER}{key}"
        if given is None:
            raise Unauthenticated(NO_KEY)
        if given[: len(_BEARER)].lower() != _BEARER:
            raise Unauthenticated("the header Authorization must be `Bearer sk-lr-…`")
        now = time.time()
        principal = self.ring.principal(given[len(_BEARER) :].strip(), now=now, monotonic=time.monotonic())
        self._note(principal, now)
        return principal

    async def of_account(self, key_id: str | None, tenant: str) -> Principal:
        """Return who asks now for what a key, or nobody's, has asked before. Raises as `KeyRing.of_account`."""
        if not self.follower.is_running:
            await self.refresh()
        if key_id is None:
            return Principal(tenant=tenant)
        until, principal = self._accounts.get((key_id, tenant), (0.0, None))
        now = time.monotonic()
        if principal is None or now >= until:  # the whole ring is looked through
            principal = self.ring.of_account(key_id, tenant, now=time.time(), monotonic=now)
            if len(self._accounts) >= _KEPT:
                self._accounts.clear()
            self._accounts[key_id, tenant] = now + REFRESH_S, principal
        return principal

    async def of_tenant(self, tenant: str) -> Principal:
        """Return who asks inside of the cluster for a tenant. Raises as `KeyRing.of_tenant`."""
        if not self.follower.is_running:
            await self.refresh()
        return self.ring.of_tenant(tenant)

    def _note(self, principal: Principal, now: float) -> None:
        key_id, period = principal.key_id, int(now) // _USE_S
        if key_id is not None and key_id not in STATIC_KEYS and self._minutes.get(key_id) != period:
            self._minutes[key_id] = period
            self._used[key_id] = datetime.fromtimestamp(period * _USE_S, UTC)


CATALOG_KEYS = "catalog-keys.jsonl"  # in the home folder
STATIC_KEY, METRICS_KEY = "deployment", "metrics"  # ids of keys that the catalog does not have
STATIC_KEYS = frozenset({STATIC_KEY, METRICS_KEY})


def open_auth(settings: Settings, host: str) -> Authenticator:
    """Open the keys of a server that listens at `host`: the deployment's own, and those of its catalog."""
    admin = Principal(scopes=frozenset(SCOPES), key_id=STATIC_KEY, actor=STATIC_KEY)
    metrics = Principal(scopes=frozenset(), key_id=METRICS_KEY, actor=METRICS_KEY)
    static = {bytes.fromhex(sha256): metrics for sha256 in settings.metrics_key_hashes}
    static |= {bytes.fromhex(sha256): admin for sha256 in settings.static_key_hashes}
    ring = KeyRing(static=static, max_age_s=settings.key_max_age_s)
    kept = KeysFile(settings.home / CATALOG_KEYS, settings.catalog)
    return Authenticator(ring, CatalogWatcher(lambda: Catalog(settings.catalog)), host=host, kept=kept)


# -- Allowed origins --

ANY = "*"
_PATHS = re.compile(r"/v1/.*|/tokenize|/detokenize")
_HEADER = re.compile(r"[a-z0-9-]{1,64}")
_MOST_HEADERS = 32
_MAX_AGE_S = 600
_TOLD = ("x-", "retry-after", "request-id", "anthropic-")  # how the headers of an answer begin that a page may read


class AllowOrigins:
    """ASGI middleware: says to browsers that pages of `origins` may ask, and answers before keys are looked at whether
    they may (preflight). Cookies are never allowed, and nothing is while a request needs no key.
    """

    def __init__(self, app: ASGIApp, access: Authenticator, origins: frozenset[str]) -> None:
        """`origins` as a browser sends them, https://chat.example; `*`: all."""
        self._app, self._access, self._origins = app, access, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _PATHS.fullmatch(scope["path"]) or not self._access.needs_key:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        allowed = self._allowed(headers.get("origin"))
        if allowed is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(headers, allowed)(scope, receive, send)
            return

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._tell(MutableHeaders(scope=message), allowed)
            await send(message)

        await self._app(scope, receive, telling)

    def _allowed(self, origin: str | None) -> str | None:
        if ANY in self._origins:
            return ANY
        return origin if origin in self._origins else None

    def _tell(self, headers: MutableHeaders, allowed: str | None) -> None:
        if allowed != ANY:
            headers.add_vary_header("Origin")
        if allowed is not None:
            headers["Access-Control-Allow-Origin"] = allowed
            told = [name for name in headers if name.startswith(_TOLD)]
            headers["Access-Control-Expose-Headers"] = ", ".join(told)


def _preflight(asked: Headers, allowed: str) -> Response:
    names = [name.strip().lower() for name in asked.get("access-control-request-headers", "").split(",")]
    answer = Response(status_code=204)
    answer.headers["Access-Control-Allow-Origin"] = allowed
    answer.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
    answer.headers["Access-Control-Allow-Headers"] = ", ".join(filter(_HEADER.fullmatch, names[:_MOST_HEADERS]))
    answer.headers["Access-Control-Max-Age"] = str(_MAX_AGE_S)
    answer.headers["Vary"] = "Origin, Access-Control-Request-Headers"
    return answer


# -- Rates --

KEY_RATE, KEY_BURST = 20.0, 100.0  # requests a second, and at once
TENANT_RATE, TENANT_BURST = 200.0, 400.0
ADVICE_RATE, ADVICE_BURST = 0.5, 30.0  # plans and recommendations of a key
_KEPT = 4096  # buckets; above that, those that are full are forgotten


class _Bucket(NamedTuple):
    level: float
    at: float
    full_at: float


class RateLimits:
    """Token buckets of keys and tenants. Administrators have none, and a rotated key keeps its bucket."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}

    def take(self, principal: Principal, now: float) -> None:
        """Count a request at `now`, in seconds of any clock. Raises RateLimited, and then counts nothing."""
        if principal.account is None or principal.is_admin:
            return
        key, tenant = (KEY_RATE, KEY_BURST), (TENANT_RATE, TENANT_BURST)
        self._take({f"key {principal.account}": key, f"tenant {principal.tenant}": tenant}, now)

    def take_advice(self, principal: Principal, now: float) -> None:
        """Count a plan or a recommendation, beside its request, as `take` does."""
        if principal.account is not None and not principal.is_admin:
            self._take({f"for advice, key {principal.account}": (ADVICE_RATE, ADVICE_BURST)}, now)

    def _take(self, limits: dict[str, tuple[float, float]], now: float) -> None:
        levels = {of: self._level(of, *limit, now) for of, limit in limits.items()}
        for of, (rate, _) in limits.items():
            if levels[of] < 1:
                often = f"{rate:g} times a second" if rate >= 1 else f"{60 * rate:g} times a minute"
                raise RateLimited(f"{of} may ask {often}: wait a moment", (1 - levels[of]) / rate)
        for of, (rate, burst) in limits.items():
            level = levels[of] - 1
            self._buckets[of] = _Bucket(level, now, now + (burst - level) / rate)
        if len(self._buckets) > _KEPT:
            self._buckets = {of: bucket for of, bucket in self._buckets.items() if now < bucket.full_at}

    def _level(self, of: str, rate: float, burst: float, now: float) -> float:
        bucket = self._buckets.get(of)
        return burst if bucket is None else min(burst, bucket.level + rate * (now - bucket.at))


# -- The middleware, and the principal behind it --

_PRINCIPAL, _REVOKED = "principal", "revoked"
AS_BATCH = "as_batch"  # of a request that this process itself makes for a batch: the Principal that asks
_NAMES = {name.encode(): name for name in HEADERS}
# Twice, another server may read the other one.
_ONCE = frozenset({"authorization", _ANTHROPIC_KEY, "x-tenant-id", "host", "origin"})


class Authenticate:
    """ASGI middleware: `scope["state"]["principal"]` is who asks. Nothing behind it looks at keys or tenants' headers.

    `scope["state"]["revoked"]` is a future that is done when the key is revoked or blocked while its request is
    answered. What has no route is passed on: the application says to everybody that it is not there.

    permissions  of the application's routes
    refused      the response to an error, in the application's form
    rates        how often keys and tenants may ask; None: as often as they like
    key_start    what clients of the application write before a key in X-API-Key
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Authenticator,
        permissions: Permissions,
        refused: Callable[[Exception], Response],
        rates: RateLimits | None = None,
        key_start: str = "",
    ) -> None:
        self._app, self._access, self._permissions, self._refused = app, access, permissions, refused
        self._rates, self._key_start = rates, key_start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (action := self._permissions.action(scope)) is None:
            await self._app(scope, receive, send)
            return
        with coming_from(_origin_of(scope)):
            try:
                as_batch = scope.get("state", {}).get(AS_BATCH)
                if as_batch is None:
                    principal = await self._admit(scope, action)
                else:
                    check(as_batch, action)
                    principal = as_batch
                if self._rates is not None and principal is not None:
                    self._rates.take(principal, time.monotonic())
            except LorayError as e:
                await self._refusal(scope, e)(scope, receive, send)
                return
            state = scope.setdefault("state", {})
            state[_PRINCIPAL] = principal
            with self._access.until_revoked(principal) as state[_REVOKED]:
                await self._app(scope, receive, send)

    async def _admit(self, scope: Scope, action: Action) -> Principal | None:
        return await self._access.admit(scope["method"], action, self._headers(scope))

    def _refusal(self, scope: Scope, error: Exception) -> Response:
        return self._refused(error)

    def _headers(self, scope: Scope) -> dict[str, str]:
        headers: dict[str, str] = {}
        for raw, value in scope["headers"]:
            name = _NAMES.get(raw.lower())
            if name is None:
                continue
            if name in headers and name in _ONCE:
                raise Unauthenticated(f"the header {name} comes twice")
            headers[name] = value.decode("latin-1")
        if self._key_start and _ANTHROPIC_KEY in headers:
            headers[_ANTHROPIC_KEY] = headers[_ANTHROPIC_KEY].removeprefix(self._key_start)
        return headers


def _origin_of(scope: Scope) -> Origin:
    """Behind a proxy, the address is the proxy's."""
    client = scope.get("client")
    return Origin(str(client[0])[:64] if client else None, scope.get("state", {}).get("request_id"))


def principal_of(request: Request) -> Principal:
    """Return who asks, at a route that is not open."""
    principal = request.state.principal
    assert isinstance(principal, Principal), "this route is open to all: it has no principal"
    return principal


async def until_revoked(request: Request, parts: AsyncIterator[str]) -> AsyncIterator[str]:
    """Pass on the parts of a long answer, until its end or until the request's key is revoked or blocked."""
    revoked: asyncio.Future[None] = request.state.revoked
    while True:
        coming = asyncio.ensure_future(anext(parts, None))
        either: tuple[asyncio.Future[Any], ...] = (coming, revoked)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not coming.done():
                coming.cancel()
        if revoked.done() or (part := coming.result()) is None:
            return
        yield part


async def _current_principal(request: Request) -> Principal:  # FastAPI would call a plain function in a thread
    return principal_of(request)


CurrentPrincipal = Annotated[Principal, Depends(_current_principal)]


_SCHEME = "key"
_DESCRIPTION = (
    "An API key, `sk-lr-…`; the header x-api-key takes it too. A server on loopback that was started without a key "
    "takes requests without one."
)


def describe_keys(document: dict[str, Any], permissions: Permissions) -> None:
    """Add to an OpenAPI document how a key is sent, and to each operation that needs one, that it does."""
    scheme = {"type": "http", "scheme": "bearer", "description": _DESCRIPTION}
    document["components"]["securitySchemes"] = {_SCHEME: scheme}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if permissions.named(method.upper(), path) != "open":
                operation["security"] = [{_SCHEME: []}]


# -- The page of the OpenAPI document --

# Of pages. Pictures in style sheets are data: URLs. Nothing inline runs, and nothing is asked of another host.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FOLDER = FilePath(__file__).parent / "access" / "swagger"
_FILES = {name: _FOLDER / name for name in ("swagger-ui-bundle.js", "swagger-ui.css", "swagger.js")}
_A_DAY = {"Cache-Control": "public, max-age=86400", "X-Content-Type-Options": "nosniff"}
_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>loray</title><link rel="stylesheet" href="docs/static/swagger-ui.css"></head>
<body>
<div id="swagger-ui"></div>
<script src="docs/static/swagger-ui-bundle.js"></script>
<script src="docs/static/swagger.js"></script>
</body>
</html>
"""

router = APIRouter(include_in_schema=False)


@router.get("/docs")
@may("open")
async def show_docs() -> Response:
    return HTMLResponse(_PAGE, headers=PAGE_HEADERS)


@router.get("/docs/static/{name}")
@may("open")
async def get_docs_file(name: Annotated[str, Path(max_length=64)]) -> Response:
    path = _FILES.get(name)
    if path is None:
        raise NotFoundError(f"there is no file {name!r}")
    return FileResponse(path, headers=_A_DAY)
