"""Tenants: they are created, get limits, and are blocked, but never deleted, because names and usage refer to them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

from loray.catalog.database import Database, reading, writing
from loray.catalog.queries import count_change, lock, log, now, utc
from loray.catalog.schema import tenants
from loray.errors import ConflictError, KeyNotFound, SpecError
from loray.spec import Limits, Tenant, TenantName


class Tenants(Database):
    """The catalog's operations on tenants. The tenant `default` is there from the beginning."""

    def create_tenant(self, name: str, limits: Limits | None = None) -> Tenant:
        """Raises SpecError where the name is malformed, ConflictError where it is taken."""
        check_tenant_name(name)
        with writing(self._engine) as c:
            lock(c)
            if c.execute(sa.select(tenants.c.name).where(tenants.c.name == name)).first():
                raise ConflictError(f"there is a tenant {name!r} already; `loray tenants set` changes it")
            row = {"name": name, "blocked": False, "limits": (limits or Limits()).model_dump_json()}
            c.execute(tenants.insert().values(row | {"created_at": now(), "changed_at": count_change(c)}))
            log(c, self._actor, "create_tenant", name, tenant=name)
            return get_tenant(c, name)

    def update_tenant(self, name: str, *, limits: Limits | None = None, blocked: bool | None = None) -> Tenant:
        """Replaces what is given. Raises KeyNotFound."""
        given: dict[str, Any] = {} if limits is None else {"limits": limits.model_dump_json()}
        given |= {} if blocked is None else {"blocked": blocked}
        with writing(self._engine) as c:
            lock(c)
            known = get_tenant(c, name)
            if (limits in (None, known.limits)) and (blocked in (None, known.blocked)):
                return known
            c.execute(tenants.update().where(tenants.c.name == name).values(given | {"changed_at": count_change(c)}))
            log(c, self._actor, "update_tenant", name, tenant=name, **given)
            return get_tenant(c, name)

    def tenants(self, *, limit: int | None = None) -> tuple[Tenant, ...]:
        """The first `limit`, or all, sorted by name."""
        with reading(self._engine) as c:
            query = sa.select(tenants).order_by(tenants.c.name).limit(limit)
            return tuple(tenant_of(row) for row in c.execute(query))

    def tenant(self, name: str) -> Tenant:
        """Raises KeyNotFound."""
        with reading(self._engine) as c:
            return get_tenant(c, name)


def check_tenant_name(name: str) -> None:
    try:
        TypeAdapter(TenantName).validate_python(name)
    except ValidationError as e:
        rule = "letters, digits, '.', '_' and '-', at most 32"
        raise SpecError(f"{name!r} is not a valid name of a tenant: {rule}") from e


def get_tenant(c: sa.Connection, name: str) -> Tenant:
    row = c.execute(sa.select(tenants).where(tenants.c.name == name)).first()
    if row is None:
        raise KeyNotFound(f"no tenant {name!r}; `loray tenants create {name}` makes it")
    return tenant_of(row)


def tenant_of(row: sa.Row[Any]) -> Tenant:
    limits = Limits.model_validate_json(row.limits)
    return Tenant(name=row.name, blocked=row.blocked, limits=limits, created_at=utc(row.created_at))
