"""API keys: 256 random bits each, shown once; the catalog keeps their SHA-256, which is enough for random secrets."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

import sqlalchemy as sa

from loray.catalog.database import Database, reading, writing
from loray.catalog.identity.rotation import MAX_GRACE, refuse_rotation
from loray.catalog.identity.tenants import get_tenant, tenant_of
from loray.catalog.queries import count_change, lock, log, now, utc
from loray.catalog.schema import changes, keys, tenants
from loray.errors import ConflictError, KeyNotFound, LimitExceeded, PermissionDenied, SpecError
from loray.spec import (
    KEY_START,
    PREFIX_LENGTH,
    TENANT_SCOPES,
    ApiKey,
    HashedKey,
    KeyChanges,
    Limits,
    Principal,
    Scope,
    account_of,
)

_KEY_BYTES = 32
_INFER: tuple[Scope, ...] = ("infer",)
UNCHANGED = object()  # of what None would change


class NewKey(NamedTuple):
    """`secret` is shown once, and kept nowhere."""

    secret: str
    key: ApiKey


class KeyPage(NamedTuple):
    """`keys` newest first; `next` is the cursor of the next page, None at the end."""

    keys: tuple[ApiKey, ...]
    next: str | None


def new_secret() -> str:
    return KEY_START + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


class Keys(Database):
    """The catalog's operations on keys. Each change of a key counts as a change, so that servers notice it.

    Other tenants' keys exist for administrators alone. Who is none changes and replaces only keys that it might have
    made: PermissionDenied where one has more scopes or models than it may give, and LimitExceeded where a limit would
    allow more than its tenant's.
    """

    def create_key(
        self,
        alias: str,
        *,
        tenant: str | None = None,
        scopes: Collection[Scope] = _INFER,
        models: Collection[str] | None = None,
        limits: Limits | None = None,
        metadata: Mapping[str, str] | None = None,
        expires_at: datetime | None = None,
    ) -> NewKey:
        """`tenant` None: the caller's. Raises KeyNotFound where there is no such tenant, and ConflictError where a key
        in use has the alias.
        """
        secret, tenant = new_secret(), self.own_tenant if tenant is None else tenant
        fields = {"scopes": scopes, "models": models, "metadata": dict(metadata or {}), "limits": limits or Limits()}
        key = ApiKey.parse(
            fields
            | {
                "id": f"key-{secrets.token_hex(8)}",
                "prefix": secret[len(KEY_START) :][:PREFIX_LENGTH],
                "alias": alias,
                "tenant": tenant,
                "created_by": self._actor,
                "created_at": now(),
                "expires_at": expires_at,
            },
            source="the key",
        )
        if not key.scopes:
            raise SpecError("a key without scopes could do nothing; give it infer, publish, promote or train")
        with writing(self._engine) as c:
            lock(c)
            _refuse_power(self._principal, key)
            _refuse_limits(c, self._principal, key)
            _refuse_alias(c, key)
            _insert(c, key, secret)
            log(c, self._actor, "create_key", key.id, tenant=tenant, alias=alias, scopes=sorted(key.scopes))
        return NewKey(secret, key)

    def rotate_key(self, key_id: str, *, grace: timedelta = timedelta()) -> NewKey:
        """Replace a key by a new one with the same alias, scopes and limits, whose usage is counted on with the old
        one's. The old one goes on for `grace`.

        Raises KeyNotFound, SpecError for a grace longer than `MAX_GRACE`, and ConflictError as `refuse_rotation` does.
        """
        if not timedelta() <= grace <= MAX_GRACE:
            raise SpecError(f"a replaced key may go on for at most {MAX_GRACE.days} days")
        secret = new_secret()
        with writing(self._engine) as c:
            lock(c)
            old, by_itself = _get(c, self._principal, key_id), self._principal.key_id == key_id
            if not by_itself:
                _refuse_power(self._principal, old)
            account = account_of(key_id)
            family = _together(c, old)
            refuse_rotation(old, family, now(), is_kept=bool(grace), by_itself=by_itself)
            number = len(family) + 1
            fields = {"id": f"{account}_{number}", "prefix": secret[len(KEY_START) :][:PREFIX_LENGTH]}
            made = {"created_by": self._actor, "created_at": now(), "last_used_at": None}
            key = old.model_copy(update=fields | made)
            _insert(c, key, secret)
            if grace:
                ends = now() + grace
                _update(c, key_id, expires_at=ends if old.expires_at is None else min(ends, old.expires_at))
            else:
                _update(c, key_id, revoked_at=now())
            log(c, self._actor, "rotate_key", key_id, tenant=key.tenant, replaced_by=key.id)
        return NewKey(secret, key)

    def revoke_key(self, key_id: str, *, only_this: bool = False) -> ApiKey:
        """For ever, with the keys that it was rotated from and into: whoever has stolen one may have rotated it.
        `only_this`: the others stay. A second call changes nothing. Raises KeyNotFound.
        """
        with writing(self._engine) as c:
            lock(c)
            found = _get(c, self._principal, key_id)
            _refuse_power(self._principal, found)
            for key in [found] if only_this else _together(c, found):
                if key.revoked_at is None:
                    _update(c, key.id, revoked_at=now())
                    log(c, self._actor, "revoke_key", key.id, tenant=key.tenant)
            return _get(c, self._principal, key_id)

    def update_key(
        self,
        key_id: str,
        *,
        alias: str | None = None,
        blocked: bool | None = None,
        limits: Limits | None = None,
        single_limits: Mapping[str, Any] = MappingProxyType({}),
        metadata: Mapping[str, str] | None = None,
        models: Collection[str] | object | None = UNCHANGED,
        expires_at: datetime | object | None = UNCHANGED,
    ) -> ApiKey:
        """Replaces what is given; of the limits also single ones, by name. A blocked key is refused until it is
        unblocked, with the keys that it was rotated from and into.

        Raises KeyNotFound, and ConflictError where another key in use has the alias.
        """
        given: dict[str, Any] = {} if blocked is None else {"blocked": blocked}
        given |= {} if alias is None else {"alias": alias}
        given |= {} if metadata is None else {"metadata": dict(metadata)}
        given |= {} if models is UNCHANGED else {"models": models}
        given |= {} if expires_at is UNCHANGED else {"expires_at": expires_at}
        with writing(self._engine) as c:
            lock(c)
            before = _get(c, self._principal, key_id)
            _refuse_power(self._principal, before)
            if limits is not None or single_limits:
                given["limits"] = (limits or before.limits).model_dump() | dict(single_limits)
            after = ApiKey.parse(before.model_dump() | given, source=f"key {key_id}")
            _refuse_power(self._principal, after)
            if after.limits != before.limits:
                _refuse_limits(c, self._principal, after)
            if after != before:
                if after.revoked_at is None and given.keys() & {"alias", "expires_at"}:
                    _refuse_alias(c, after)
                _update(c, key_id, **{name: value for name, value in _row(after).items() if name in given})
                log(c, self._actor, "update_key", key_id, tenant=before.tenant, changed=sorted(given))
            for other in _together(c, before) if blocked is not None else ():
                if other.blocked != blocked:
                    _update(c, other.id, blocked=blocked)
                    log(c, self._actor, "update_key", other.id, tenant=other.tenant, changed=["blocked"])
            return _get(c, self._principal, key_id)

    def key(self, key_id: str) -> ApiKey:
        """Raises KeyNotFound."""
        with reading(self._engine) as c:
            return _get(c, self._principal, key_id)

    def keys(
        self, *, limit: int = 100, cursor: str | None = None, tenant: str | None = None, alias: str | None = None
    ) -> KeyPage:
        """At most `limit` keys, newest first, after `cursor`, the `next` of a page. Raises SpecError."""
        mine = _exist_for(self._principal)
        query = sa.select(keys).where(mine).order_by(keys.c.created_at.desc(), keys.c.id.desc()).limit(limit + 1)
        wanted = {"tenant": tenant, "alias": alias}
        query = query.where(*(keys.c[name] == value for name, value in wanted.items() if value is not None))
        with reading(self._engine) as c:
            if cursor is not None:
                last = c.execute(sa.select(keys.c.created_at, keys.c.id).where(mine, keys.c.id == cursor)).first()
                if last is None:
                    raise SpecError(f"{cursor!r} is no cursor; take `next` from the page before")
                earlier = sa.and_(keys.c.created_at == last.created_at, keys.c.id < last.id)
                query = query.where(sa.or_(keys.c.created_at < last.created_at, earlier))
            found = [_key(row) for row in c.execute(query)]
        page = tuple(found[:limit])
        return KeyPage(page, page[-1].id if len(found) > limit else None)

    def key_changes(self, since: int = -1) -> KeyChanges:
        """What has changed after the change counter was `since`; everything by default."""
        with reading(self._engine) as c:
            counter = int(c.execute(sa.select(changes.c.counter)).scalar_one())
            rows = c.execute(sa.select(keys).where(keys.c.changed_at > since)).all() if counter > since else []
            of_tenants = c.execute(sa.select(tenants).where(tenants.c.changed_at > since)) if counter > since else ()
            return KeyChanges(
                counter=counter,
                keys=tuple(HashedKey(bytes.fromhex(row.sha256), _key(row)) for row in rows),
                tenants=tuple(tenant_of(row) for row in of_tenants),
                any_keys=c.execute(sa.select(keys.c.id).limit(1)).first() is not None,
            )

    def note_key_use(self, used: Mapping[str, datetime]) -> None:
        """Record when keys, by their ids, were last used. That is no change: servers need not know."""
        rows = [{"key": key_id, "at": moment} for key_id, moment in sorted(used.items())]
        if rows:
            with writing(self._engine) as c:
                where = keys.c.id == sa.bindparam("key")
                c.execute(keys.update().where(where).values(last_used_at=sa.bindparam("at")), rows)


def _exist_for(principal: Principal) -> sa.ColumnElement[bool]:
    """The keys that exist for this caller: those of its tenant and its own, for administrators all."""
    if principal.is_admin:
        return sa.true()
    return sa.or_(keys.c.tenant == principal.tenant, keys.c.id == principal.key_id)


def _refuse_power(principal: Principal, key: ApiKey) -> None:
    """Raise PermissionDenied where the caller is no administrator of all, and the key is another tenant's, or may do or
    ask more than the caller may give.
    """
    if principal.is_admin:
        return
    if key.tenant != principal.tenant:
        raise PermissionDenied(f"this key makes and changes keys of tenant {principal.tenant}, and of no other")
    if beyond := key.scopes - TENANT_SCOPES:
        scopes = ", ".join(sorted(beyond))
        raise PermissionDenied(f"only an administrator of all makes and changes keys with the scope {scopes}")
    if principal.models is not None and (key.models is None or not key.models <= principal.models):
        raise PermissionDenied("this key is for some models, and makes and changes keys for models among these alone")


def _refuse_limits(c: sa.Connection, principal: Principal, key: ApiKey) -> None:
    """Raise KeyNotFound where there is no such tenant, LimitExceeded where a limit allows more than the tenant's."""
    most = get_tenant(c, key.tenant).limits
    name = None if principal.is_admin else key.limits.beyond(most)
    if name is not None:
        bound = getattr(most, name) or 0
        raise LimitExceeded(f"{name} of a key may not go beyond that of tenant {key.tenant}, which is {bound}")


def _together(c: sa.Connection, key: ApiKey) -> list[ApiKey]:
    """The key, and those that it was rotated from and into."""
    return [_key(row) for row in c.execute(sa.select(keys).where(_of_account(account_of(key.id))).order_by(keys.c.id))]


def _refuse_alias(c: sa.Connection, key: ApiKey) -> None:
    in_use = sa.or_(keys.c.expires_at.is_(None), keys.c.expires_at > now())
    same = sa.and_(keys.c.alias == key.alias, keys.c.tenant == key.tenant, keys.c.revoked_at.is_(None), in_use)
    found = c.execute(sa.select(keys.c.id).where(same, ~_of_account(account_of(key.id)))).scalar()
    if found is not None:
        raise ConflictError(f"key {found} of tenant {key.tenant} has the alias {key.alias!r}; rotate it, or revoke it")


def _of_account(account: str) -> sa.ColumnElement[bool]:
    """The keys that were rotated into each other, of which the first has the account's id."""
    return sa.or_(keys.c.id == account, keys.c.id.startswith(f"{account}_", autoescape=True))


def _insert(c: sa.Connection, key: ApiKey, secret: str) -> None:
    hashed = {"sha256": digest_of(secret).hex(), "changed_at": count_change(c)}
    c.execute(keys.insert().values(_row(key) | hashed))


def _update(c: sa.Connection, key_id: str, **values: Any) -> None:
    c.execute(keys.update().where(keys.c.id == key_id).values(values | {"changed_at": count_change(c)}))


def _get(c: sa.Connection, principal: Principal, key_id: str) -> ApiKey:
    row = c.execute(sa.select(keys).where(_exist_for(principal), keys.c.id == key_id)).first()
    if row is None:
        raise KeyNotFound(f"no key {key_id!r}; `loray keys ls` lists them")
    return _key(row)


def _row(key: ApiKey) -> dict[str, Any]:
    """The columns of a key, without its hash."""
    texts = {
        "scopes": json.dumps(sorted(key.scopes)),
        "models": None if key.models is None else json.dumps(sorted(key.models)),
        "limits": key.limits.model_dump_json(),
        "metadata": json.dumps(key.metadata),
    }
    return key.model_dump() | texts


def _key(row: sa.Row[Any]) -> ApiKey:
    fields = {name: getattr(row, name) for name in ApiKey.model_fields}
    times = {name: utc(value) for name, value in fields.items() if isinstance(value, datetime)}
    texts = {name: json.loads(fields[name]) for name in ("scopes", "limits", "metadata")}
    models = None if row.models is None else json.loads(row.models)
    return ApiKey.model_validate(fields | times | texts | {"models": models})
