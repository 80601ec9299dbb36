"""Who may do what, and the keys in memory that say who asks: plain rules without HTTP and database.

Each route of both APIs says its action (`serve_apps.auth.may`).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Literal

from loray.errors import CatalogError, PermissionDenied, Unauthenticated
from loray.spec import (
    DEFAULT_TENANT,
    KEY_START,
    PREFIX_LENGTH,
    TENANT_SCOPES,
    ApiKey,
    HashedKey,
    KeyChanges,
    Limits,
    Principal,
    Scope,
    Tenant,
    account_of,
    qualified_name,
)

Action = Literal[
    "open",
    "identify",
    "infer",
    "batch",
    "files",
    "session",
    "read",
    "download",
    "publish",
    "promote",
    "train",
    "follow",
    "audit",
    "manage_own",
    "observe",
    "manage",
]

# One of these scopes is enough; an administrator does everything. "open" needs no key, "identify" any key.
SCOPES_OF: Mapping[Action, frozenset[Scope]] = {
    "infer": frozenset({"infer"}),
    "batch": frozenset({"infer"}),  # what generates later
    "files": frozenset({"infer", "train"}),  # each file by its purpose
    "session": frozenset({"infer", "train"}),  # of Tinker's protocol
    "read": frozenset({"infer", "publish", "promote", "train"}),
    "download": frozenset({"publish", "promote", "train"}),
    "publish": frozenset({"publish"}),
    "promote": frozenset({"promote"}),
    "train": frozenset({"train"}),
    "follow": frozenset({"train", "tenant_admin"}),  # jobs
    "audit": frozenset({"publish", "promote", "train", "tenant_admin"}),
    "manage_own": frozenset({"tenant_admin"}),  # keys of the own tenant
    "observe": frozenset(),
    "manage": frozenset(),
}
NO_KEY = (
    "this needs an API key, in the header `Authorization: Bearer sk-lr-…`; an administrator makes one with "
    "`loray keys create`"
)
_WRITES: frozenset[Action] = frozenset({"publish", "promote", "train", "manage_own", "manage"})
_PREFIX = slice(len(KEY_START), len(KEY_START) + PREFIX_LENGTH)
_LONGEST_KEY = 512
_INVALID = "the API key is not valid: it is misspelt, revoked, or of another deployment"


def check(principal: Principal | None, action: Action, owner: str | None = None) -> None:
    """Raises Unauthenticated without a principal, PermissionDenied where its scopes do not allow the action, or where
    it would change what belongs to `owner`, another tenant. What exists for it, `catalog.queries.visible` says.
    """
    if action == "open":
        return
    if principal is None:
        raise Unauthenticated(NO_KEY)
    if principal.is_admin or action == "identify":
        return
    allowed = SCOPES_OF[action]
    if not principal.scopes & allowed:
        needed, held = " or ".join(sorted(allowed | {"admin"})), ", ".join(sorted(principal.scopes)) or "none"
        raise PermissionDenied(f"this needs a key with the scope {needed}, and this key has {held}")
    if owner is not None and action in _WRITES and owner != principal.tenant:
        raise PermissionDenied(f"it belongs to another tenant than {principal.tenant}, which may not change it")


def check_model(principal: Principal, model: str) -> None:
    """Raises PermissionDenied where the key is for other models only. `model` is what the request names, with or
    without version or alias. It is not looked up, so the refusal does not say whether it exists.
    """
    if not may_ask(principal, model):
        raise PermissionDenied("this key is for other models; GET /api/v1/keys/self says for which")


def may_ask(principal: Principal, model: str) -> bool:
    """Return whether the key is for this model, by the name that the request or the list of models has."""
    if principal.models is None:
        return True
    name = model.partition("@")[0].removeprefix(f"{principal.tenant}/")
    own = qualified_name(principal.tenant, name)
    return bool(principal.models & {model, name, own, f"{DEFAULT_TENANT}/{name}" if own == name else own})


def share_of(principal: Principal, user: str | None) -> str:
    """Return the name under which a request takes its share of the engine, for fairness: its tenant. Where nobody needs
    a key and no tenant is named, the body's `user` tells requests apart.
    """
    if principal.key_id is None and principal.tenant == DEFAULT_TENANT:
        return user or ""
    return principal.tenant


@dataclass(frozen=True, slots=True)
class _KeyEntry:
    sha256: bytes
    key: ApiKey
    principal: Principal
    expires_at: float  # seconds since 1970


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys of a deployment at one moment. A ring is immutable; `updated` makes the next one of what has changed in
    the catalog. A revocation holds as soon as a server has the ring that knows of it. While the database cannot be
    read, the catalog's keys go on for a stated time.

    static      SHA-256 of the deployment's own keys, which are an administrator's and need no database. A key that the
                catalog has, or has had, is the catalog's all the same: its scopes, limits and end count
    counter     the catalog's change counter then; -1: the catalog was never read
    any_keys    whether the catalog has a key, or has had one
    has_limits  whether a key or a tenant of the catalog has a limit that is counted
    read_at     when the catalog was last read, by the monotonic clock
    max_age_s   how long the catalog's keys go on from then
    """

    static: Mapping[bytes, Principal] = field(default_factory=dict)
    max_age_s: float = 3600.0
    counter: int = -1
    any_keys: bool = False
    has_limits: bool = False
    read_at: float = float("-inf")
    _entries: Mapping[str, tuple[_KeyEntry, ...]] = field(default_factory=dict)  # by prefix
    _tenants: Mapping[str, Tenant] = field(default_factory=dict)
    _not_static: Mapping[bytes, HashedKey] = field(default_factory=dict)  # the catalog's among `static`

    @property
    def was_read(self) -> bool:
        return self.counter >= 0

    @property
    def needs_key(self) -> bool:
        """True if somebody has made a key, so that requests need one also on loopback."""
        return self.any_keys or bool(self.static)

    def confirmed(self, read_at: float) -> KeyRing:
        """Return the same ring, of which nothing had changed at `read_at`."""
        return replace(self, read_at=read_at)

    def has_same_keys(self, other: KeyRing) -> bool:
        """Return whether one came of the other without a change of keys or tenants."""
        return self._entries is other._entries and self._tenants is other._tenants

    def updated(self, changes: KeyChanges, read_at: float) -> KeyRing:
        """Return the ring after these changes, which were read at `read_at`."""
        ring = replace(self, counter=changes.counter, any_keys=changes.any_keys, read_at=read_at)
        if not changes.keys and not changes.tenants:
            return ring
        tenants = {**self._tenants, **{tenant.name: tenant for tenant in changes.tenants}}
        renewed = {tenant.name for tenant in changes.tenants} & self._tenants.keys()  # their limits are in principals
        of_renewed = (e for same in self._entries.values() for e in same if e.key.tenant in renewed)
        changed = {e.key.id: HashedKey(e.sha256, e.key) for e in of_renewed} if renewed else {}
        changed |= {stored.key.id: stored for stored in changes.keys}
        entries = dict(self._entries)
        for stored in changed.values():
            key = stored.key
            others = tuple(e for e in entries.get(key.prefix, ()) if e.key.id != key.id)
            now = () if key.revoked_at is not None else (_entry(stored, tenants[key.tenant]),)
            entries[key.prefix] = others + now
            if not entries[key.prefix]:
                del entries[key.prefix]
        limits = chain((t.limits for t in tenants.values()), (e.key.limits for same in entries.values() for e in same))
        ours = {stored.sha256: stored for stored in changed.values() if stored.sha256 in self.static}
        return replace(
            ring,
            has_limits=any(of.are_counted for of in limits),
            _entries=entries,
            _tenants=tenants,
            _not_static={**self._not_static, **ours},
        )

    def good_ids(self) -> frozenset[str]:
        """Return the ids of the keys that are neither revoked nor blocked, and whose tenants are not."""
        entries = (e for same in self._entries.values() for e in same)
        return frozenset(e.key.id for e in entries if not e.key.blocked and not self._tenants[e.key.tenant].blocked)

    @property
    def state(self) -> KeyChanges:
        """All that the ring knows of the catalog's keys."""
        keys = [HashedKey(e.sha256, e.key) for same in self._entries.values() for e in same]
        keys += [stored for stored in self._not_static.values() if stored.key.revoked_at is not None]
        return KeyChanges(self.counter, tuple(keys), tuple(self._tenants.values()), self.any_keys)

    def principal(self, secret: str, *, now: float, monotonic: float) -> Principal:
        """Return the principal for which a key stands. `now` is the time since 1970.

        Raises Unauthenticated for a key that is unknown, revoked or expired, PermissionDenied for one that is blocked,
        or whose tenant is, and CatalogError where the catalog has not been read for too long to say.
        """
        if len(secret) > _LONGEST_KEY:
            raise Unauthenticated(_INVALID)
        sha256 = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        for known, principal in self.static.items():
            if hmac.compare_digest(known, sha256) and known not in self._not_static:
                return principal
        if monotonic - self.read_at > self.max_age_s:
            raise CatalogError(
                "API keys cannot be checked, because the catalog could not be read for too long; try again, or use a "
                "key of the deployment itself"
            )
        found = None
        for entry in self._entries.get(secret[_PREFIX], ()):
            if hmac.compare_digest(entry.sha256, sha256):
                found = entry
        if found is None:
            raise Unauthenticated(_INVALID)
        if now >= found.expires_at:
            ended = datetime.fromtimestamp(found.expires_at, UTC).isoformat(timespec="seconds")
            raise Unauthenticated(f"the API key has expired ({ended}); ask an administrator for another one")
        if found.key.blocked or self._tenants[found.key.tenant].blocked:
            raise PermissionDenied("the API key, or its tenant, is blocked; ask an administrator")
        return found.principal

    def of_account(self, key_id: str, tenant: str, *, now: float, monotonic: float) -> Principal:
        """Return the principal that asks later for what a key has asked for this tenant: that of its family's newest
        good key. Raises as `principal` does, and as `acting_for` where the key has acted for another tenant.
        """
        for known in self.static.values():
            if known.key_id == key_id:
                return known if known.tenant == tenant else self.acting_for(known, tenant)
        if monotonic - self.read_at > self.max_age_s:
            raise CatalogError("API keys cannot be checked, because the catalog could not be read for too long")
        account = account_of(key_id)
        family = (e for same in self._entries.values() for e in same if account_of(e.key.id) == account)
        good = [entry for entry in family if now < entry.expires_at]
        if not good:
            raise Unauthenticated("the API key was revoked, or has expired")
        entry = max(good, key=lambda entry: entry.key.created_at)
        if entry.key.blocked or self._tenants[entry.key.tenant].blocked:
            raise PermissionDenied("the API key, or its tenant, is blocked; ask an administrator")
        return entry.principal if entry.key.tenant == tenant else self.acting_for(entry.principal, tenant)

    def of_tenant(self, tenant: str) -> Principal:
        """Return who asks inside of the cluster for a tenant, without a key: with the tenant's limits, where it has
        any, and no right but to generate. Raises PermissionDenied.
        """
        known = self._tenants.get(tenant)
        if known is not None and known.blocked:
            raise PermissionDenied(f"tenant {tenant!r} is blocked; ask an administrator")
        limits = Limits() if known is None else known.limits
        return Principal(tenant=tenant, scopes=frozenset({"infer"}), tenant_limits=limits)

    def acting_for(self, principal: Principal, tenant: str) -> Principal:
        """Return the principal that a key with the scope `act_for` stands for, where a request names another tenant:
        with its own scopes, but none of an administrator, and the tenant's limits. Raises PermissionDenied.
        """
        if "act_for" not in principal.scopes:
            raise PermissionDenied("this key may not name a tenant (X-Tenant-Id): it has no scope act_for")
        known = self._tenants.get(tenant)
        if known is None or known.blocked:
            raise PermissionDenied(f"there is no tenant {tenant[:64]!r} to act for, or it is blocked")
        scopes = principal.scopes & TENANT_SCOPES
        return principal.model_copy(update={"tenant": tenant, "scopes": scopes, "tenant_limits": known.limits})


def _entry(stored: HashedKey, tenant: Tenant) -> _KeyEntry:
    key = stored.key
    expires_at = float("inf") if key.expires_at is None else key.expires_at.timestamp()
    return _KeyEntry(stored.sha256, key, key.principal(tenant), expires_at)
