"""Fills a catalog by bulk inserts: adapters of many tenants, of which few have several versions, tags or shares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import sqlalchemy as sa

from loray.adapters.manifest import manifest_json
from loray.catalog.database import open_database, writing
from loray.catalog.schema import adapters, aliases, bases, changes, shares, tags, tenants, versions
from loray.spec import DEFAULT_TENANT, AdapterManifest, Method, qualified_name

BASES = {"smollm2": "ba5e" * 16, "other": "07e2" * 16}
_AT_ONCE = 2000
_TEXT = "Answers questions about the orders, invoices and returns of one customer. " * 20


def tenant_name(number: int) -> str:
    return DEFAULT_TENANT if number == 0 else f"tenant-{number:03d}"


def adapter_name(number: int, num_tenants: int) -> str:
    kind = ("tone", "dates", "legal", "support", "summary")[number % 5]
    return qualified_name(tenant_name(number % num_tenants), f"{kind}-{number:06d}")


def fill(url: str, num_adapters: int, num_tenants: int) -> None:
    """The catalog at `url` must be empty."""
    engine = open_database(url)
    created_at = datetime(2026, 1, 1, tzinfo=UTC)
    common = {"blocked": False, "limits": "{}", "created_at": created_at}
    try:
        with writing(engine) as c:
            c.execute(
                bases.insert(), [{"name": n, "fingerprint": f, "created_at": created_at} for n, f in BASES.items()]
            )
            if num_tenants > 1:
                c.execute(tenants.insert(), [{"name": tenant_name(i), **common} for i in range(1, num_tenants)])
            for table, rows in _rows(num_adapters, num_tenants, created_at):
                insert(c, table, rows)
            c.execute(changes.update().values(counter=num_adapters))
            if engine.dialect.name == "postgresql":
                for table in (adapters, versions):
                    last = sa.select(sa.func.max(table.c.id)).scalar_subquery()
                    c.execute(sa.select(sa.func.setval(f"{table.name}_id_seq", last)))
        if engine.dialect.name == "postgresql":
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as c:
                c.exec_driver_sql("ANALYZE")  # autovacuum does it after such a load, within a minute
    finally:
        engine.dispose()


def _rows(num: int, num_tenants: int, created_at: datetime) -> Iterator[tuple[sa.Table, Iterable[dict[str, Any]]]]:
    ids = range(1, num + 1)
    yield adapters, (_adapter(i, num_tenants, created_at) for i in ids)
    yield versions, (_version(i, v, created_at) for i in ids for v in range(1, _num_versions(i) + 1))
    yield (
        aliases,
        ({"adapter_id": i, "alias": "prod", "version_id": _version_id(i, 1), "revision": i} for i in ids if i % 5),
    )
    yield shares, ({"adapter_id": i, "tenant": tenant_name(j)} for i in ids if i % 50 == 1 for j in (1, 2, 3))
    yield tags, ({"adapter_id": i, "key": "team", "value": f"team-{i % 20}"} for i in ids)
    yield tags, ({"adapter_id": i, "key": "stage", "value": "gold"} for i in ids if i % 1000 == 0)


def insert(c: sa.Connection, table: sa.Table, rows: Iterable[dict[str, Any]]) -> None:
    """Many rows, some at once."""
    rest = iter(rows)
    while part := list(islice(rest, _AT_ONCE)):
        c.execute(table.insert(), part)


def _num_versions(i: int) -> int:
    return 3 if i % 10 == 1 else 1


def _version_id(i: int, version: int) -> int:
    return 3 * i + version


def _method(i: int) -> Method:
    return "vera" if i % 50 == 0 else "longlora" if i % 97 == 0 else "lora"


def _base(i: int) -> str:
    return BASES["other" if i % 500 == 0 else "smollm2"]


def _adapter(i: int, num_tenants: int, created_at: datetime) -> dict[str, Any]:
    return {
        "id": i,
        "name": adapter_name(i, num_tenants),
        "tenant": tenant_name(i % num_tenants),
        "visibility": "shared" if i % 50 == 1 else "public" if i % 50 == 2 else "private",
        "changed_at": i,
        "served_method": _method(i),
        "served_base": _base(i),
        "created_at": created_at + timedelta(seconds=i),
    }


def _version(i: int, version: int, created_at: datetime) -> dict[str, Any]:
    digest = f"{_version_id(i, version):064x}"
    manifest = AdapterManifest(
        method="lora",
        base="smollm2",
        base_fingerprint=_base(i),
        rank=8,
        target_modules=("q_proj", "v_proj"),
        num_parameters=460_800,
        nbytes=1_843_200,
        context_length=8192,
        files={"adapter_model.safetensors": digest, "adapter_config.json": digest},
        description=_TEXT,
        created_at=created_at.isoformat(),
    )
    return {
        "id": _version_id(i, version),
        "adapter_id": i,
        "version": version,
        "digest": digest,
        "method": _method(i),
        "base_fingerprint": manifest.base_fingerprint,
        "context_length": manifest.context_length,
        "nbytes": manifest.nbytes,
        "manifest": manifest_json(manifest).decode(),
        "created_at": created_at,
    }
