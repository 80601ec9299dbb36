"""Pages of names: what the filters say, on both databases, however the statement is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa

from loray.catalog import AdapterEntry, Catalog, queries
from loray.catalog.database import reading, writing
from loray.catalog.schema import adapters, tags
from loray.spec import Principal
from tests.fixtures.filled_catalog import BASES, adapter_name, fill, tenant_name

_NUM, _NUM_TENANTS = 500, 10
_LONG = "x" * 5000  # longer than what PostgreSQL's indices hold
FILTERS: list[dict[str, Any]] = [
    {},
    {"tenant": tenant_name(2)},
    {"method": "vera"},
    {"base": "other"},
    {"base": "nobody"},
    {"base": "smollm2", "method": "longlora"},
    {"search": "TENANT-007"},
    {"search": "0042"},
    {"search": "nothing"},
    {"tags": {"team": "team-7"}},
    {"tags": {"team": None}, "search": "tone"},
    {"tags": {"stage": None, "team": None}},
    {"tags": {"long": f"{_LONG}1"}},
    {"tags": {"long": _LONG[:64]}},
    {"tags": {"team": "nobody"}},
]
CALLERS = [Principal(), Principal(tenant=tenant_name(1), scopes=frozenset({"infer"}))]


@pytest.fixture
def catalog(catalog_url: str) -> Catalog:
    fill(catalog_url, _NUM, _NUM_TENANTS)
    catalog = Catalog(catalog_url)
    with writing(catalog._db.engine) as c:
        c.execute(tags.insert(), [{"adapter_id": i, "key": "long", "value": f"{_LONG}{i % 2}"} for i in range(1, 50)])
    return catalog


def passes(entry: AdapterEntry, tagged: Mapping[str, str], wanted: Mapping[str, Any]) -> bool:
    base = wanted.get("base")
    return (
        wanted.get("tenant") in (None, entry.tenant)
        and wanted.get("method") in (None, entry.default.method)
        and (base is None or BASES.get(base) == entry.default.base_fingerprint)
        and wanted.get("search", "").lower() in entry.name.lower()
        and all(key in tagged and value in (None, tagged[key]) for key, value in wanted.get("tags", {}).items())
    )


def test_pages_have_what_the_filters_say(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    tagged, snapshot = dict[str, dict[str, str]](), catalog.snapshot()
    query = sa.select(adapters.c.name, tags.c.key, tags.c.value).join(tags, tags.c.adapter_id == adapters.c.id)
    with reading(catalog._db.engine) as c:
        for name, key, value in c.execute(query):
            tagged.setdefault(name, {})[key] = value
    for few in (0, 10_000):
        monkeypatch.setattr(queries, "_FEW", few)
        for caller in CALLERS:
            view = catalog.view(caller)
            for wanted in FILTERS:
                seen = snapshot.models(principal=caller)
                expected = sorted(e.name for e in seen if passes(e, tagged.get(e.name, {}), wanted))
                found: list[str] = []
                while page := view.adapters.page(limit=150, after=found[-1] if found else "", **wanted):
                    found += [entry.name for entry in page]
                assert found == expected, (few, caller.tenant, wanted)
    catalog.close()


def test_sqlite_reads_pages_in_order_and_from_indices_alone(catalog: Catalog) -> None:
    if catalog._db.engine.dialect.name == "sqlite":
        with reading(catalog._db.engine) as c:
            for caller in CALLERS:
                for wanted in (f for f in FILTERS if "tags" not in f and f.get("base") != "nobody"):
                    given = {"tenant": None, "base": None, "method": None, "search": None, "tags": {}} | wanted
                    query = queries.select_names(c, caller, adapter_name(250, _NUM_TENANTS), **given).limit(100)
                    words = str(query.compile(catalog._db.engine, compile_kwargs={"literal_binds": True}))
                    plan = [row[-1] for row in c.exec_driver_sql(f"EXPLAIN QUERY PLAN {words}")]
                    assert not [step for step in plan if "TEMP" in step or "SCAN" in step], plan
                    of_adapters = [step for step in plan if "adapters" in step]
                    assert all("COVERING" in step for step in of_adapters), plan
    catalog.close()
