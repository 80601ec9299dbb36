"""What several owners of limits count is summed up, and those that say nothing are not counted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa

from loray.catalog import Catalog, QuotaUse
from loray.catalog.database import reading
from loray.catalog.schema import quota_levels


def test_units_of_all_owners_are_summed_up_and_come_back(catalog: Catalog) -> None:
    def use(units: float) -> list[QuotaUse]:
        return [QuotaUse("requests key k 60.0 60.0 0", units, 1.0)]

    (used,) = catalog.quotas.count("a", use(10), 1000.0).used.values()
    assert used == 10
    state = catalog.quotas.count("b", use(5), 1004.0)
    assert (state.num_owners, *state.used.values()) == (2, 11)
    assert catalog.quotas.known(1004.0) == {"requests key k 60.0 60.0 0": (11, 1004)}
    assert catalog.quotas.count("a", use(0), 1014.0).used == {"requests key k 60.0 60.0 0": 1}
    catalog.quotas.count("a", [], 1100.0)
    with reading(catalog._db.engine) as c:
        assert c.execute(sa.select(quota_levels)).all() == []


def test_a_budget_begins_with_its_usage_and_what_lost_servers_reserved_is_free_again(catalog: Catalog) -> None:
    def use(units: float, before: float | None = None) -> list[QuotaUse]:
        return [QuotaUse("budget key k 100.0 60.0 17", units, 0.0, 1080.0, before)]

    assert [*catalog.quotas.count("a", use(10, 40), 1020.0).used.values()] == [50]
    assert [*catalog.quotas.count("b", use(1, 40), 1021.0).used.values()] == [51]  # a has reserved ten
    assert catalog.quotas.known(1021.0) == {}
    assert [*catalog.quotas.count("c", use(1, 45), 1050.0).used.values()] == [46]  # both are gone
    assert [*catalog.quotas.count("c", use(1), 1051.0).used.values()] == [47]
    assert [*catalog.quotas.count("c", use(1), 1081.0).used.values()] == [1]


def test_owners_are_there_for_fifteen_seconds(catalog: Catalog) -> None:
    assert catalog.quotas.count("a", [], 1000.0).num_owners == 1
    assert catalog.quotas.count("b", [], 1014.0).num_owners == 2
    assert catalog.quotas.count("b", [], 1016.0).num_owners == 1
    catalog.quotas.count("a", [], 1017.0)
    catalog.quotas.leave("b")
    assert catalog.quotas.count("a", [], 1018.0).num_owners == 1
    assert catalog.quotas.count("a", [], 500.0).num_owners == 1  # the clock went back
    assert catalog.quotas.count("b", [], 501.0).num_owners == 2


def test_owners_that_count_at_once_lose_nothing(catalog: Catalog) -> None:
    rules = [f"tokens key k{i} 1e9 60.0 0" for i in range(600)]

    def count(owner: str) -> None:
        for _ in range(5):
            catalog.quotas.count(owner, [QuotaUse(rule, 1.0, 1e-9) for rule in rules], 1000.0)

    with ThreadPoolExecutor() as threads:
        list(threads.map(count, "abcd"))
    state = catalog.quotas.count("a", [QuotaUse(rule, 0.0, 1e-9) for rule in rules], 1000.0)
    assert state.num_owners == 4
    assert set(state.used.values()) == {20.0}
