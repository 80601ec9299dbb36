"""Limits of what a tenant may keep.

Each is checked in the transaction that adds to it, which holds the catalog's lock. What was deleted counts as long as
it can be restored. Limits that nobody has set bind keys that are no administrator's.
"""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from loray.catalog.identity import get_tenant
from loray.catalog.queries import now
from loray.catalog.schema import adapters, files, manifest_as_json, versions
from loray.errors import CatalogFull, LimitExceeded
from loray.spec import (
    DEFAULT_KEEP_DELETED_S,
    DEFAULT_MAX_ADAPTERS,
    MAX_TEMPLATE_CHARACTERS,
    MAX_TEMPLATE_CHARACTERS_OF_TENANT,
    MAX_VERSIONS,
    AdapterManifest,
    Principal,
    format_size,
)
from loray.telemetry import get_logger

_log = get_logger(__name__)

_NAME_BYTES, _VERSION_BYTES = 800, 400  # as `make bench-catalog` measures a hundred thousand names of one version


def refuse_more_names(c: sa.Connection, principal: Principal, tenant: str) -> None:
    """Raise LimitExceeded where the tenant may have no name more."""
    default = DEFAULT_MAX_ADAPTERS if _is_bound(principal) else None
    limit = _limit(c, principal, tenant, "max_adapters", default)
    if limit is not None:
        query = sa.select(sa.func.count()).select_from(adapters).where(adapters.c.tenant == tenant)
        _refuse(c.execute(query.where(_is_kept(adapters))).scalar_one() + 1, limit, f"tenant {tenant}", "adapters")


def refuse_more_versions(
    c: sa.Connection, principal: Principal, tenant: str, adapter_id: int, digest: str, manifest: AdapterManifest
) -> None:
    """Raise LimitExceeded where the tenant's name may not have this version more."""
    of_tenant = f"tenant {tenant}"
    stored = sa.select(versions.c.id).join(adapters, adapters.c.id == versions.c.adapter_id)
    has_digest = stored.where(adapters.c.tenant == tenant, versions.c.digest == digest)
    if c.execute(has_digest.limit(1)).first() is None:
        refuse_more_bytes(c, principal, tenant, manifest.nbytes)
    if not _is_bound(principal):
        return
    query = sa.select(sa.func.count()).select_from(versions).where(versions.c.adapter_id == adapter_id)
    _refuse(c.execute(query.where(_is_kept(versions))).scalar_one() + 1, MAX_VERSIONS, "the adapter", "versions")
    if manifest.chat_template is not None:
        own = manifest.ref(digest, "", 1).chat_template
        others = _characters_of_templates(c, tenant, own)
        total, what = others + len(manifest.chat_template), "characters in chat templates"
        _refuse(total, MAX_TEMPLATE_CHARACTERS_OF_TENANT, of_tenant, what)


def refuse_more_memory(c: sa.Connection, max_bytes: int) -> None:
    """Raise CatalogFull where a version more would not fit into the memory that gateways have for all names."""
    # First what there can be at most, which two indexes tell without a count.
    at_most = [c.execute(sa.select(sa.func.max(table.c.id))).scalar() or 0 for table in (adapters, versions)]
    query = sa.select(sa.func.count(sa.distinct(versions.c.chat_template))).where(versions.c.chat_template.is_not(None))
    if _memory(*at_most) + MAX_TEMPLATE_CHARACTERS * int(c.execute(query).scalar_one()) < max_bytes:
        return
    names = sa.select(sa.func.count()).where(adapters.c.deleted_at.is_(None))
    each = names.select_from(versions.join(adapters)).where(versions.c.deleted_at.is_(None))
    needed = _memory(*(c.execute(query).scalar_one() for query in (names, each))) + _characters_of_templates(c)
    if needed + _VERSION_BYTES > max_bytes:
        use, most = format_size(needed), format_size(max_bytes)
        told = f"all names take about {use} of each gateway's memory, and may take {most}"
        _log.error("nobody can publish: %s", told)
        raise CatalogFull(f"{told}: delete adapters, or give gateways more and set LORAY_SNAPSHOT_BYTES")


def _memory(num_names: int, num_versions: int) -> int:
    return num_names * _NAME_BYTES + num_versions * _VERSION_BYTES


def refuse_more_bytes(c: sa.Connection, principal: Principal, tenant: str, num_bytes: int) -> None:
    limit = stored_limit(c, principal, tenant)
    if limit is None:
        return
    one = sa.select(versions.c.digest, sa.func.max(versions.c.nbytes).label("nbytes"))
    one = one.join(adapters, adapters.c.id == versions.c.adapter_id).where(adapters.c.tenant == tenant)
    each = one.where(_is_kept(versions), _is_kept(adapters)).group_by(versions.c.digest).subquery()
    stored = int(c.execute(sa.select(sa.func.coalesce(sa.func.sum(each.c.nbytes), 0))).scalar_one())
    of_files = sa.select(sa.func.coalesce(sa.func.sum(files.c.bytes), 0)).where(files.c.tenant == tenant)
    stored += int(c.execute(of_files).scalar_one())
    if stored + num_bytes > limit:
        raise LimitExceeded(
            f"tenant {tenant} stores {format_size(stored)} and would store {format_size(num_bytes)} more; "
            f"max_stored_bytes allows {format_size(limit)}: {_AWAY}"
        )


def _characters_of_templates(c: sa.Connection, tenant: str | None = None, beside: str | None = None) -> int:
    """Characters of the chat templates that differ, of a tenant or of all, without the one `beside` them."""
    one = sa.select(sa.func.min(versions.c.id)).join(adapters, adapters.c.id == versions.c.adapter_id)
    one = one.where(versions.c.chat_template.is_not(None), _is_kept(versions), _is_kept(adapters))
    if tenant is not None:
        one = one.where(adapters.c.tenant == tenant)
    if beside is not None:
        one = one.where(versions.c.chat_template != beside)
    length = sa.func.length(manifest_as_json(c)["chat_template"].as_string())
    query = sa.select(sa.func.coalesce(sa.func.sum(length), 0))
    return int(c.execute(query.where(versions.c.id.in_(one.group_by(versions.c.chat_template)))).scalar_one())


def stored_limit(c: sa.Connection, principal: Principal, tenant: str) -> int | None:
    return _limit(c, principal, tenant, "max_stored_bytes", None)


def _is_bound(principal: Principal) -> bool:
    """Limits that nobody has set hold. The driver of a job, which has no key, was admitted before."""
    return principal.key_id is not None and not principal.is_admin


def _limit(c: sa.Connection, principal: Principal, tenant: str, field: str, default: int | None) -> int | None:
    """The smaller one of key and tenant."""
    given = [getattr(limits, field) for limits in (principal.limits, get_tenant(c, tenant).limits)]
    return min((limit for limit in given if limit is not None), default=default)


def _is_kept(table: sa.Table) -> sa.ColumnElement[bool]:
    oldest = now() - timedelta(seconds=DEFAULT_KEEP_DELETED_S)
    return sa.or_(table.c.deleted_at.is_(None), table.c.deleted_at > oldest)


_AWAY = "delete what is not needed, or ask an administrator for more"


def _refuse(count: int, limit: int, whose: str, what: str) -> None:
    if count > limit:
        raise LimitExceeded(f"{whose} would have {count:,} {what}, and may have {limit:,}: {_AWAY}")
