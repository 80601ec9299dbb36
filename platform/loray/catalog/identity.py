"""The catalog's operations on those who ask: tenants, API keys, the log of what they did, logins at the console."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa

from loray.catalog.audit_chain import Origin, chained, coming_from, log
from loray.catalog.database import Database
from loray.catalog.entries import check_tenant
from loray.catalog.queries import count_change, newest, now, read_counter
from loray.catalog.schema import audit_log, keys, logins, tenants
from loray.errors import ConflictError, IntegrityError, KeyNotFound, LimitExceeded, PermissionDenied, SpecError
from loray.schemas.access import AuditResource, KeyChange
from loray.schemas.resources import Page
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
    Tenant,
    account_of,
)

# -- tenants ----------------------------------------------------------------------------------------------------------


@dataclass
class Tenants:
    """The catalog's operations on tenants. The tenant `default` is there from the beginning."""

    db: Database

    def create(self, name: str, limits: Limits | None = None) -> Tenant:
        """Create a tenant. Raises SpecError where the name is malformed, ConflictError where it is taken."""
        check_tenant(name)
        with self.db.changing() as c:
            if c.execute(sa.select(tenants.c.name).where(tenants.c.name == name)).first():
                raise ConflictError(f"there is a tenant {name!r} already; `loray tenants set` changes it")
            row = {"name": name, "blocked": False, "limits": (limits or Limits()).model_dump_json()}
            c.execute(tenants.insert().values(row | {"created_at": now(), "changed_at": count_change(c)}))
            log(c, self.db.actor, "create_tenant", name, tenant=name)
            return get_tenant(c, name)

    def update(self, name: str, *, limits: Limits | None = None, blocked: bool | None = None) -> Tenant:
        """Replace what is given. Raises KeyNotFound."""
        given: dict[str, Any] = {} if limits is None else {"limits": limits.model_dump_json()}
        given |= {} if blocked is None else {"blocked": blocked}
        with self.db.changing() as c:
            known = get_tenant(c, name)
            if (limits in (None, known.limits)) and (blocked in (None, known.blocked)):
                return known
            c.execute(tenants.update().where(tenants.c.name == name).values(given | {"changed_at": count_change(c)}))
            log(c, self.db.actor, "update_tenant", name, tenant=name, **given)
            return get_tenant(c, name)

    def all(self, *, limit: int | None = None) -> tuple[Tenant, ...]:
        """The first `limit`, or all, sorted by name."""
        with self.db.reading() as c:
            query = sa.select(tenants).order_by(tenants.c.name).limit(limit)
            return tuple(_tenant(row) for row in c.execute(query))

    def get(self, name: str) -> Tenant:
        """One tenant. Raises KeyNotFound."""
        with self.db.reading() as c:
            return get_tenant(c, name)


def get_tenant(c: sa.Connection, name: str) -> Tenant:
    row = c.execute(sa.select(tenants).where(tenants.c.name == name)).first()
    if row is None:
        raise KeyNotFound(f"no tenant {name!r}; `loray tenants create {name}` makes it")
    return _tenant(row)


def _tenant(row: sa.Row[Any]) -> Tenant:
    limits = Limits.model_validate_json(row.limits)
    return Tenant(name=row.name, blocked=row.blocked, limits=limits, created_at=row.created_at)


# -- keys -------------------------------------------------------------------------------------------------------------

MAX_GRACE = timedelta(days=30)  # of a key that was replaced
SELF_ROTATION = timedelta(days=1)  # between two times that a key replaces itself


def refuse_rotation(old: ApiKey, family: Collection[ApiKey], now: datetime, *, is_kept: bool, by_itself: bool) -> None:
    """Raise ConflictError where `old` may not be replaced now: it is revoked or blocked, it was replaced already, it
    would be one of three that go on, or it was made by a rotation of itself less than a day ago.

    family     all keys that were rotated into each other, `old` among them
    is_kept    it is to go on for a while beside the new one
    by_itself  it is the key of the request
    """
    if old.revoked_at is not None:
        raise ConflictError(f"key {old.id!r} is revoked; create another one")
    if old.blocked:
        raise ConflictError(f"key {old.id!r} is blocked; let it pass again before it is replaced")
    go_on = (key for key in family if key.revoked_at is None and (key.expires_at is None or key.expires_at > now))
    others = [key for key in go_on if key.id != old.id]
    for other in others:
        if _number_of(other.id) > _number_of(old.id):
            raise ConflictError(f"key {old.id!r} has been replaced by {other.id}; replace that one")
    if others and is_kept:
        raise ConflictError(
            f"key {others[0].id} goes on beside {old.id}, and a third one may not: revoke it alone first, or replace "
            "the key without a grace period"
        )
    if by_itself and _number_of(old.id) > 1 and now - old.created_at < SELF_ROTATION:
        raise ConflictError(
            f"key {old.id!r} was made by a rotation less than a day ago; it may replace itself after "
            f"{old.created_at + SELF_ROTATION:%Y-%m-%d %H:%M} UTC, and an administrator may do it now"
        )


def _number_of(key_id: str) -> int:
    return int(key_id.partition("_")[2] or 1)


_KEY_BYTES = 32
_INFER: tuple[Scope, ...] = ("infer",)


class NewKey(NamedTuple):
    """`secret` is shown once, and kept nowhere."""

    secret: str
    key: ApiKey


def new_secret() -> str:
    return KEY_START + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


@dataclass
class Keys:
    """The catalog's operations on keys. Each change of a key counts as a change, so that servers notice it.

    The keys that were rotated into each other are told apart by their ids: `key-ab12` is the first, `key-ab12_3` the
    third. A thief who has one of them can make others, so revoking one revokes all, few go on at once, and a key
    replaces itself rarely.

    Other tenants' keys exist for administrators alone. Who is none changes and replaces only keys that it might have
    made: PermissionDenied where one has more scopes or models than it may give, and LimitExceeded where a limit would
    allow more than its tenant's.
    """

    db: Database

    def create(
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
        """Create a key of `tenant` (None: the caller's). Raises KeyNotFound where there is no such tenant, and
        ConflictError where a key in use has the alias.
        """
        secret, tenant = new_secret(), self.db.principal.tenant if tenant is None else tenant
        fields = {"scopes": scopes, "models": models, "metadata": dict(metadata or {}), "limits": limits or Limits()}
        key = ApiKey.parse(
            fields
            | {
                "id": f"key-{secrets.token_hex(8)}",
                "prefix": secret[len(KEY_START) :][:PREFIX_LENGTH],
                "alias": alias,
                "tenant": tenant,
                "created_by": self.db.actor,
                "created_at": now(),
                "expires_at": expires_at,
            },
            source="the key",
        )
        if not key.scopes:
            raise SpecError("a key without scopes could do nothing; give it infer, publish, promote or train")
        with self.db.changing() as c:
            _refuse_power(self.db.principal, key)
            _refuse_limits(c, self.db.principal, key)
            _refuse_alias(c, key)
            _insert(c, key, secret)
            log(c, self.db.actor, "create_key", key.id, tenant=tenant, alias=alias, scopes=sorted(key.scopes))
        return NewKey(secret, key)

    def rotate(self, key_id: str, *, grace: timedelta = timedelta()) -> NewKey:
        """Replace a key by a new one with the same alias, scopes and limits, whose usage is counted on with the old
        one's. The old one goes on for `grace`.

        Raises KeyNotFound, SpecError for a grace longer than `MAX_GRACE`, and ConflictError as `refuse_rotation` does.
        """
        if not timedelta() <= grace <= MAX_GRACE:
            raise SpecError(f"a replaced key may go on for at most {MAX_GRACE.days} days")
        secret = new_secret()
        with self.db.changing() as c:
            old, by_itself = _get(c, self.db.principal, key_id), self.db.principal.key_id == key_id
            if not by_itself:
                _refuse_power(self.db.principal, old)
            account = account_of(key_id)
            family = _together(c, old)
            refuse_rotation(old, family, now(), is_kept=bool(grace), by_itself=by_itself)
            number = len(family) + 1
            fields = {"id": f"{account}_{number}", "prefix": secret[len(KEY_START) :][:PREFIX_LENGTH]}
            made = {"created_by": self.db.actor, "created_at": now(), "last_used_at": None}
            key = old.model_copy(update=fields | made)
            _insert(c, key, secret)
            if grace:
                ends = now() + grace
                _update(c, key_id, expires_at=ends if old.expires_at is None else min(ends, old.expires_at))
            else:
                _update(c, key_id, revoked_at=now())
            log(c, self.db.actor, "rotate_key", key_id, tenant=key.tenant, replaced_by=key.id)
        return NewKey(secret, key)

    def revoke(self, key_id: str, *, only_this: bool = False) -> ApiKey:
        """Revoke a key for ever, with those that it was rotated from and into: whoever has stolen one may have rotated
        it. `only_this`: the others stay. A second call changes nothing. Raises KeyNotFound.
        """
        with self.db.changing() as c:
            found = _get(c, self.db.principal, key_id)
            _refuse_power(self.db.principal, found)
            for key in [found] if only_this else _together(c, found):
                if key.revoked_at is None:
                    _update(c, key.id, revoked_at=now())
                    log(c, self.db.actor, "revoke_key", key.id, tenant=key.tenant)
            return _get(c, self.db.principal, key_id)

    def update(self, key_id: str, change: KeyChange) -> ApiKey:
        """Change what is given. A blocked key is refused until it is unblocked, with the keys that it was rotated from
        and into.

        Raises KeyNotFound, and ConflictError where another key in use has the alias.
        """
        blocked, names = change.blocked, change.model_fields_set
        values = {"blocked": blocked, "alias": change.key_alias, "metadata": change.metadata}
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        given |= {"models": change.models} if "models" in names else {}
        given |= {"expires_at": change.expires_at} if names & {"duration", "expires"} else {}
        with self.db.changing() as c:
            before = _get(c, self.db.principal, key_id)
            _refuse_power(self.db.principal, before)
            if change.limits is not None or change.single_limits:
                given["limits"] = (change.limits or before.limits).model_dump() | change.single_limits
            after = ApiKey.parse(before.model_dump() | given, source=f"key {key_id}")
            _refuse_power(self.db.principal, after)
            if after.limits != before.limits:
                _refuse_limits(c, self.db.principal, after)
            if after != before:
                if after.revoked_at is None and given.keys() & {"alias", "expires_at"}:
                    _refuse_alias(c, after)
                _update(c, key_id, **{name: value for name, value in _row(after).items() if name in given})
                log(c, self.db.actor, "update_key", key_id, tenant=before.tenant, changed=sorted(given))
            for other in _together(c, before) if blocked is not None else ():
                if other.blocked != blocked:
                    _update(c, other.id, blocked=blocked)
                    log(c, self.db.actor, "update_key", other.id, tenant=other.tenant, changed=["blocked"])
            return _get(c, self.db.principal, key_id)

    def get(self, key_id: str) -> ApiKey:
        """One key. Raises KeyNotFound."""
        with self.db.reading() as c:
            return _get(c, self.db.principal, key_id)

    def page(
        self, *, limit: int = 100, cursor: str | None = None, tenant: str | None = None, alias: str | None = None
    ) -> Page[ApiKey]:
        """At most `limit` keys, newest first, after `cursor`, the `next` of a page. Raises SpecError."""
        mine, wanted = _exist_for(self.db.principal), {"tenant": tenant, "alias": alias}
        with self.db.reading() as c:
            rows, last = newest(c, keys, mine, wanted, cursor, limit)
        return Page(items=tuple(map(_key, rows)), next=last)

    def changes(self, since: int = -1) -> KeyChanges:
        """The keys and tenants that have changed after the change counter was `since`; all by default."""
        with self.db.reading() as c:
            counter = read_counter(c)
            rows = c.execute(sa.select(keys).where(keys.c.changed_at > since)).all() if counter > since else []
            of_tenants = c.execute(sa.select(tenants).where(tenants.c.changed_at > since)) if counter > since else ()
            return KeyChanges(
                counter=counter,
                keys=tuple(HashedKey(bytes.fromhex(row.sha256), _key(row)) for row in rows),
                tenants=tuple(_tenant(row) for row in of_tenants),
                any_keys=c.execute(sa.select(keys.c.id).limit(1)).first() is not None,
            )

    def record_use(self, used: Mapping[str, datetime]) -> None:
        """Record when keys, by their ids, were last used. That is no change: servers need not know."""
        rows = [{"key": key_id, "at": moment} for key_id, moment in sorted(used.items())]
        if rows:
            with self.db.writing() as c:
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
    texts = {name: json.loads(fields[name]) for name in ("scopes", "limits", "metadata")}
    models = None if row.models is None else json.loads(row.models)
    return ApiKey.model_validate(fields | texts | {"models": models})


# -- the audit log ----------------------------------------------------------------------------------------------------


class Refused(NamedTuple):
    """Requests of one kind that were refused. `what` is the action that they asked for."""

    actor: str
    tenant: str
    address: str | None
    what: str


class Refusals(NamedTuple):
    """The number of requests of one kind that were refused, and the id of the first of them."""

    num_requests: int
    request_id: str | None = None


class AuditState(NamedTuple):
    """The end of the audit log's chain. Who keeps it elsewhere finds later that entries were cut off."""

    num_entries: int
    last_id: int
    last_hash: str


@dataclass
class Audit:
    """The catalog's operations on the audit log."""

    db: Database

    def record(self, action: str, subject: str, *, tenant: str, **detail: Any) -> None:
        """Add an entry for what writes nothing else, such as a download."""
        with self.db.changing() as c:
            log(c, self.db.actor, action, subject, tenant=tenant, **detail)

    def record_refused(self, refused: Mapping[Refused, Refusals]) -> None:
        """Add an entry for each kind of request, with how often it was refused."""
        with self.db.changing() as c:
            for one, (num_requests, request_id) in refused.items():
                with coming_from(Origin(one.address, request_id)):
                    log(c, one.actor, "refuse", one.what, tenant=one.tenant, count=num_requests)

    def verify(self, known: tuple[int, str] | None = None) -> AuditState:
        """Compute all hashes of the log again. `known`: id and hash of an earlier end, which must still be there.

        Raises IntegrityError that names the first entry which was changed, or before which one is missing.
        """
        previous, num_entries, last = "", 0, 0
        is_known = known is None
        query = sa.select(audit_log).order_by(audit_log.c.id)
        with self.db.reading() as c, c.execute(query, execution_options={"yield_per": 500}) as rows:
            for row in rows:
                if row.previous_hash != previous or row.hash != chained(previous, row._asdict()):
                    raise IntegrityError(f"the audit log was changed: entry {row.id}, or one before it that is missing")
                previous, last, num_entries = row.hash, row.id, num_entries + 1
                is_known = is_known or (row.id, row.hash) == known
        if not is_known:
            raise IntegrityError("the audit log was changed: it does not have the entry with the known hash any more")
        return AuditState(num_entries, last, previous)

    def page(
        self,
        *,
        limit: int = 100,
        cursor: int | None = None,
        tenant: str | None = None,
        actor: str | None = None,
        action: str | None = None,
        subject: str | None = None,
        since: datetime | None = None,
    ) -> Page[AuditResource]:
        """At most `limit` entries, newest first, after `cursor`, the `next` of a page. None: not filtered."""
        query = sa.select(audit_log).order_by(audit_log.c.id.desc()).limit(limit + 1)
        wanted = {"tenant": tenant, "actor": actor, "action": action, "subject": subject}
        query = query.where(*(audit_log.c[name] == value for name, value in wanted.items() if value is not None))
        if since is not None:
            query = query.where(audit_log.c.created_at >= since)
        if cursor is not None:
            query = query.where(audit_log.c.id < cursor)
        with self.db.reading() as c:
            rows = c.execute(query).all()
            found = [AuditResource(**row._asdict() | {"detail": json.loads(row.detail)}) for row in rows]
        return Page(items=tuple(found[:limit]), next=str(found[limit - 1].id) if len(found) > limit else None)


# -- logins -----------------------------------------------------------------------------------------------------------

IDLE = timedelta(hours=12)
LONGEST = timedelta(hours=24)
MOST = 1000  # the one that was not used for longest makes room
_NOTED = timedelta(minutes=5)  # between two times that a use is written


@dataclass
class Logins:
    """The catalog's operations on logins, which end at logout, `IDLE` after the last request, and after `LONGEST`."""

    db: Database

    def begin(self, cookie_sha256: str, sealed: str) -> None:
        """Begin a login, of which `find` gives back what was `sealed`. Logins that have ended are deleted."""
        moment = now()
        with self.db.changing() as c:
            ended = sa.or_(logins.c.used_at < moment - IDLE, logins.c.created_at < moment - LONGEST)
            c.execute(logins.delete().where(ended))
            newest = sa.select(logins.c.cookie_sha256).order_by(logins.c.used_at.desc()).limit(MOST - 1)
            c.execute(logins.delete().where(logins.c.cookie_sha256.not_in(newest)))
            row = {"cookie_sha256": cookie_sha256, "sealed": sealed, "created_at": moment, "used_at": moment}
            c.execute(logins.insert().values(row))
            log(c, self.db.actor, "login", "console", tenant=self.db.principal.tenant)

    def find(self, cookie_sha256: str) -> str | None:
        """The text that was sealed for this cookie; None where there is no such login, or it has ended."""
        moment, mine = now(), logins.c.cookie_sha256 == cookie_sha256
        with self.db.reading() as c:
            row = c.execute(sa.select(logins).where(mine)).first()
        if row is None or moment > min(row.used_at + IDLE, row.created_at + LONGEST):
            return None
        if moment > row.used_at + _NOTED:
            with self.db.writing() as c:
                c.execute(logins.update().where(mine).values(used_at=moment))
        return str(row.sealed)

    def end(self, cookie_sha256: str) -> None:
        """End a login; one that has ended already stays so."""
        with self.db.changing() as c:
            if c.execute(logins.delete().where(logins.c.cookie_sha256 == cookie_sha256)).rowcount:
                log(c, self.db.actor, "logout", "console", tenant=self.db.principal.tenant)
