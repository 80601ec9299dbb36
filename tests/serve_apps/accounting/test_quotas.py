"""Deployments on one database divide each limit, and when a gateway asks the owner of its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from loray.catalog import Catalog
from loray.catalog.quotas import Quotas
from loray.errors import CatalogError, RateLimited
from loray.policy.quota_owner import QuotaOwner
from loray.policy.quotas import QuotaGate, Reply, Report, Reservation
from loray.settings import Settings
from loray.spec import Limits, Principal
from serve_apps.accounting import quotas
from serve_apps.accounting.accounts import UsageMeter
from serve_apps.accounting.quotas import QuotaActor, SharedOwner, follow_owner
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.figures import event

_START = 1_800_000_000.0


class Deployment:
    """A gateway and the owner of its limits."""

    def __init__(self, database: Database, name: str, who: Principal) -> None:
        self._database, self._who = database, who
        self._gate, self.total = QuotaGate(), 0
        self.owner = SharedOwner(name, 1, database.catalog, lambda: database.now)

    def ask(self, tokens: int = 1) -> Reservation | None:
        try:
            admitted = self._gate.admit(self._who, tokens, self._database.now)
        except RateLimited:
            return None
        self.total += 1
        return admitted

    def burst(self, number: int = 200) -> int:
        """How many of so many requests are admitted at once."""
        return sum(self.ask() is not None for _ in range(number))

    async def exchange(self) -> None:
        """Until the gateway knows all that the owner has been told."""
        while True:
            reports = self._gate.reports(self._database.now)
            is_more = self._gate.apply(await self.owner.exchange("g", reports), self._database.now)
            telling = self.owner._telling
            if telling is not None and not telling.done():
                await telling
            elif not is_more:
                return


class Database:
    """One catalog, and the time."""

    def __init__(self, url: str) -> None:
        self.url, self.now = url, _START
        self.opened: list[Catalog] = []

    def catalog(self) -> Catalog:
        self.opened.append(Catalog(self.url))
        return self.opened[-1]

    async def started(self, *names: str, **limits: Any) -> list[Deployment]:
        """They know of each other."""
        who = Principal(key_id="k1", limits=Limits(**limits))
        all_ = [Deployment(self, name, who) for name in names]
        await self.wait(0.0, *all_)
        await self.wait(5.0, *all_)
        return all_

    async def wait(self, seconds: float, *running: Deployment, each: Callable[[], object] = lambda: None) -> None:
        """Exchanges each second, `each` before them."""
        until = self.now + seconds
        while True:
            if self.now < until:
                each()
                self.now += 1.0
            for deployment in running:
                await deployment.exchange()
            if self.now >= until:
                break


@pytest.fixture
def catalog_url(tmp_path: Path) -> str:
    """tests/catalog/test_quotas.py has the statements on both kinds of database."""
    return sqlite_catalog(tmp_path)


@pytest.fixture
def database(catalog_url: str) -> Iterator[Database]:
    database = Database(catalog_url)
    yield database
    for catalog in database.opened:
        catalog.close()


async def test_two_deployments_admit_one_limit(database: Database) -> None:
    first, second = await database.started("a", "b", rpm_limit=60)
    begin = database.now
    assert 54 <= first.burst() + second.burst() <= 66
    await database.wait(120, first, second, each=lambda: (first.burst(2), second.burst(2)))
    allowed = 60 + database.now - begin
    assert 0.9 * allowed <= first.total + second.total <= 1.1 * allowed


async def test_what_an_idle_deployment_does_not_use_is_granted_by_the_other(database: Database) -> None:
    busy, idle = await database.started("a", "b", rpm_limit=60)
    await database.wait(600, busy, idle, each=lambda: busy.burst(2))
    assert 0.9 * 600 <= busy.total <= 630
    assert idle.burst() == 30
    before = busy.total
    await database.wait(60, busy, idle, each=lambda: (busy.burst(2), idle.burst(2)))
    assert busy.total - before <= 30 + 5 + 1


@pytest.mark.parametrize("name", ["a", "another"])
async def test_a_deployment_that_is_killed_grants_five_seconds_twice_at_most(database: Database, name: str) -> None:
    (killed,) = await database.started("a", rpm_limit=60)
    assert killed.burst() == 60
    await database.wait(64, killed, each=lambda: killed.burst(2))
    running = Deployment(database, name, killed._who)
    await running.exchange()
    await database.wait(60, running, each=lambda: running.burst(2))
    assert killed.total + running.total <= 60 + 64 + 60 + 5 + 1


async def test_the_share_of_a_dead_deployment_returns(database: Database) -> None:
    first, _dead = await database.started("a", "b", rpm_limit=60)
    await database.wait(10, first)
    assert first.burst() == 30
    await database.wait(70, first)
    assert first.burst() == 60


async def test_one_that_ends_leaves_its_share_at_once(database: Database) -> None:
    first, second = await database.started("a", "b", rpm_limit=60)
    await second.owner.close()
    await database.wait(5, first)
    assert first.burst() == 60


async def test_while_the_database_is_away_the_last_division_goes_on(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await database.started("a", "b", rpm_limit=60)
    with monkeypatch.context() as patch:
        patch.setattr(Quotas, "count", away)
        assert (first.burst(), second.burst()) == (30, 30)
        await database.wait(100, first, second)
        assert (first.burst(), second.burst()) == (30, 30)
    await database.wait(5, first, second)
    assert first.burst() + second.burst() <= 5


async def test_a_deployment_that_starts_without_the_database_counts_alone(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Quotas, "known", away)
        (only,) = await database.started("a", rpm_limit=60)
        assert only.burst() == 60
    await database.wait(30, only)
    assert 29 <= only.burst() <= 30


def away(*_: object) -> None:
    raise CatalogError("the catalog is away")


async def test_a_budget_is_divided_by_what_is_left_of_it(database: Database) -> None:
    first, second = await database.started("a", "b", max_budget=1000)
    assert first.burst(2000) == 500
    await database.wait(60, first, second, each=lambda: first.burst(2000))
    assert 990 <= first.total <= 1000
    assert second.ask() is not None  # it has not asked what was used
    await database.wait(2, first, second)
    assert second.ask() is None


async def test_a_budget_begins_with_what_was_used_before(database: Database) -> None:
    catalog = database.catalog()
    used = event(1, tenant="default", model="tiny", num_prompt_tokens=90, num_cached_tokens=0, num_output_tokens=5)
    catalog.usage.record([replace(used, created_at=datetime.fromtimestamp(_START, UTC))])
    (only,) = await database.started("a", max_budget=100)
    assert only.ask(1) is not None
    await database.wait(1, only)
    assert only.ask(5) is None
    assert only.ask(4) is not None


@pytest.mark.parametrize(("limit", "each"), [(4, 2), (5, 2), (1, 1), (0, 0)])
async def test_requests_at_once_are_divided(database: Database, limit: int, each: int) -> None:
    first, second = await database.started("a", "b", max_parallel_requests=limit)
    running = [first.ask() for _ in range(9)]
    assert sum(one is not None for one in running) == each
    await database.wait(10, first, second)
    assert (first.burst(), second.burst()) == (0, each)
    for one in running:
        if one is not None:
            one.settle(1, database.now)
    await database.wait(1, first, second)
    assert first.burst() == each


async def test_a_request_larger_than_what_an_owner_grants_is_admitted(database: Database) -> None:
    first, second = await database.started("a", "b", tpm_limit=1000)
    assert first.ask(1001) is None
    assert first.ask(900) is not None
    await database.wait(5, first, second)
    assert first.ask(1) is None  # until what it took too much has come back
    await database.wait(60, first, second)
    assert first.ask(1) is not None


async def test_servers_with_one_gateway_divide_a_limit_and_keep_it_over_a_restart(
    catalog_url: str, tmp_path: Path
) -> None:
    who = Principal(key_id="k1", limits=Limits(rpm_limit=6))

    def server(name: str) -> UsageMeter:
        env = {"LORAY_HOME": str(tmp_path / name), "LORAY_CATALOG": catalog_url}
        return UsageMeter(Settings.from_env(env))

    def burst(server: UsageMeter) -> int:
        admitted = 0
        with suppress(RateLimited):
            while admitted < 20:
                server.enter(who)
                admitted += 1
        return admitted

    first, second, again = server("a"), server("b"), server("a")
    async with first.running():
        assert burst(first) == 6
        async with second.running():
            assert burst(second) == 3
    async with again.running():
        assert burst(again) <= 1  # which comes back in ten seconds


async def test_owners_of_two_clusters_know_of_each_other(
    catalog_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAY_HOME", str(tmp_path))
    monkeypatch.setenv("LORAY_CATALOG", catalog_url)
    sessions = iter(["session_1", "session_2"])
    context = SimpleNamespace(get_session_name=lambda: next(sessions))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    actors = [QuotaActor("loray", 2) for _ in range(2)]
    assert [(await actor.exchange("g", ())).num_owners for actor in actors] == [1, 2]
    for actor in actors:
        await actor.close()


async def test_the_owner_is_asked_only_while_somebody_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "IDLE_S", 0.001)
    monkeypatch.setattr(quotas, "BUSY_S", 0.001)
    gate, owner, asked = QuotaGate(2), QuotaOwner(2), list[int]()

    async def ask(reports: Sequence[Report]) -> Reply:
        asked.append(len(reports))
        return owner.exchange("g1", reports, 0.0)

    async def until_asked(number: int) -> None:
        async with asyncio.timeout(30):
            while len(asked) < number:
                await asyncio.sleep(0.001)

    is_limited = asyncio.Event()
    task = asyncio.create_task(follow_owner(gate, ask, is_limited))
    await asyncio.sleep(0.05)
    assert asked == []
    gate.admit(Principal(key_id="k1", limits=Limits(rpm_limit=10)), 1, 0.0)
    is_limited.set()
    await until_asked(3)  # also without requests of its own: others may need what it holds
    assert asked[0] == 1
    is_limited.clear()
    await asyncio.sleep(0.01)  # the exchange that is under way ends
    number = len(asked)
    await asyncio.sleep(0.05)
    assert len(asked) == number
    is_limited.set()
    await until_asked(number + 1)
    task.cancel()
    await asyncio.wait([task])


def test_an_owner_in_the_same_process_is_asked_again_after_a_pause() -> None:
    """What comes back while both are asked is not given back at once, again and again."""
    gate, owner, now, asked = QuotaGate(1), QuotaOwner(1), 0.0, 0
    gate.admit(Principal(key_id="k1", limits=Limits(rpm_limit=600)), 1, now)
    for _ in range(20):
        reply = owner.exchange("g", gate.reports(now), now)
        now += 0.001
        asked += gate.apply(reply, now)
    assert not asked


async def test_others_have_their_turn_between_urgent_exchanges() -> None:
    class Urgent(QuotaGate):
        def apply(self, reply: Reply, now: float) -> bool:
            return True

    asked = 0

    async def ask(reports: Sequence[Report]) -> Reply:
        nonlocal asked
        asked += 1
        return Reply("epoch", ())

    task = asyncio.create_task(follow_owner(Urgent(), ask))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert asked == 1
