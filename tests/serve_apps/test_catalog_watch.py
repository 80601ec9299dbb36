"""One look at the catalog for all that a process keeps of it, whatever one of them takes for reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from loray.catalog import Catalog
from loray.catalog.snapshot_file import StoredSnapshot
from loray.errors import CatalogError
from loray.policy.auth import KeyRing
from loray.schemas.access import KeyChange
from loray.spec import OPERATOR, Limits
from serve_apps import catalog_watch
from serve_apps.auth import Authenticator
from serve_apps.catalog_watch import CatalogWatcher
from serve_apps.gateway.directory import ModelResolver
from tests.fixtures.gateway import register


class Database:
    """A catalog that is its change counter. `opened` and `looks`: how often it was opened and looked at."""

    def __init__(self) -> None:
        self.counter, self.opened, self.looks = 0, 0, 0
        self.is_away = False

    def __call__(self) -> Any:
        self.opened += 1
        return self

    def change_counter(self) -> int:
        if self.is_away:
            raise CatalogError("the database is away")
        self.looks += 1
        return self.counter

    def close(self) -> None:
        pass


class Numbers:
    """Keeps the counter. `free`: reading waits until it is set."""

    what, look_s = "numbers", 0.01

    def __init__(self, kept: StoredSnapshot[int] | None = None) -> None:
        self.counter, self.confirmed_at, self.reads, self.kept = -1, float("-inf"), list[bool](), kept
        self.free = Event()
        self.free.set()

    def read(self, catalog: Any, *, whole: bool) -> int:
        found: int = catalog.counter
        assert self.free.wait(30)
        self.reads.append(whole)
        return found

    def read_kept(self) -> StoredSnapshot[int] | None:
        return self.kept

    def take(self, state: int, at: float) -> None:
        self.counter = state

    def confirm(self, at: float) -> None:
        assert at > self.confirmed_at
        self.confirmed_at = at


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.002)


def run(test: Callable[[Database, CatalogWatcher], Coroutine[Any, Any, None]]) -> None:
    async def running() -> None:
        database = Database()
        follower = CatalogWatcher(database)
        try:
            await test(database, follower)
        finally:
            follower.close()

    asyncio.run(running())


def test_one_look_and_one_connection_serve_all() -> None:
    async def test(database: Database, follower: CatalogWatcher) -> None:
        readers = [Numbers() for _ in range(3)]
        for reader in readers:
            follower.add(reader)
        for changes in range(1, 4):
            database.counter += 1
            await follower.refresh()
            assert (database.opened, database.looks) == (1, changes)
            assert [reader.counter for reader in readers] == [changes] * 3
        await follower.refresh()
        assert [reader.reads for reader in readers] == [[True, False, False]] * 3  # and nothing without a change
        assert database.looks == 4
        await asyncio.gather(*(follower.refresh() for _ in range(50)))
        assert database.looks == 6  # the second look is for those that came when the first had begun

    run(test)


def test_it_follows_while_somebody_uses_it() -> None:
    async def test(database: Database, follower: CatalogWatcher) -> None:
        reader = Numbers()
        follower.add(reader)
        for _ in range(2):  # it may be started again
            await follower.start()
            await follower.start()
            database.counter += 1
            await until(lambda: reader.counter == database.counter)
            await follower.stop()
            database.counter += 1
            assert follower.is_running
            await until(lambda: reader.counter == database.counter)
            await follower.stop()
            assert not follower.is_running

    run(test)


def test_a_reader_that_takes_long_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(database: Database, follower: CatalogWatcher) -> None:
        slow, quick = Numbers(), Numbers()
        follower.add(slow)
        follower.add(quick)
        await follower.start()
        slow.free.clear()
        for _ in range(5):
            database.counter += 1
            await until(lambda: quick.counter == database.counter)
        assert slow.counter == 0
        monkeypatch.setattr("serve_apps.catalog_watch._DATABASE_TIMEOUT_S", 0.01)
        await until(lambda: follower.failure is not None)
        slow.free.set()
        await until(lambda: slow.counter == database.counter)
        await until(lambda: follower.failure is None)
        assert slow.reads[1:] == [False] * (len(slow.reads) - 1)
        await follower.stop()

    run(test)


def test_what_began_before_a_call_is_not_its_answer() -> None:
    async def test(database: Database, follower: CatalogWatcher) -> None:
        reader = Numbers()
        follower.add(reader)
        await follower.refresh()
        database.counter += 1
        reader.free.clear()
        first = asyncio.create_task(follower.refresh())
        await until(lambda: database.looks == 2)
        database.counter += 1  # after it was read
        second = asyncio.create_task(follower.refresh())
        await asyncio.sleep(0)
        reader.free.set()
        await asyncio.gather(first, second)
        assert reader.counter == 2

    run(test)


@pytest.mark.parametrize("kept", [None, StoredSnapshot(7, 60.0)])
def test_after_an_error_all_is_read_again(
    kept: StoredSnapshot[int] | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_watch, "SPREAD_S", 0.0)

    async def test(database: Database, follower: CatalogWatcher) -> None:
        reader = Numbers(kept)
        follower.add(reader)
        database.is_away = True
        for _ in range(2):
            await follower.refresh()
        assert reader.counter == (-1 if kept is None else 7)
        assert follower.failure == "CatalogError: the database is away"
        assert caplog.text.count("cannot be read") == 1
        assert ("of 60 s ago" in caplog.text) == (kept is not None)
        database.is_away, database.counter = False, 7
        await follower.refresh()
        assert (reader.reads, reader.counter, follower.failure) == ([True], 7, None)
        database.is_away = True
        await follower.refresh()
        assert follower.failure is not None
        database.is_away = False  # another copy, with the same counter
        await follower.refresh()
        await follower.refresh()
        assert (reader.reads, follower.failure) == ([True, True], None)

    run(test)


def test_processes_do_not_read_all_at_once_when_the_database_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """But at once what has changed, and all where the database is behind what is known."""
    delays = [1e6, 2e6]
    monkeypatch.setattr(catalog_watch.random, "uniform", lambda low, high: delays.pop())

    async def test(database: Database, follower: CatalogWatcher) -> None:
        reader = Numbers()
        follower.add(reader)
        database.counter = 5
        await follower.refresh()
        for _ in range(2):
            database.is_away = True
            await follower.refresh()
            database.is_away, database.counter = False, database.counter + 1
            for _ in range(2):
                await follower.refresh()
                assert (reader.counter, follower.failure) == (database.counter, None)
        assert (reader.reads, delays) == ([True, False, False], [])  # each outage has a time of its own
        follower._followed[0].whole_at = 0.0  # it has come
        await follower.refresh()
        await follower.refresh()
        assert reader.reads == [True, False, False, True]
        database.is_away = True
        await follower.refresh()
        database.is_away, database.counter = False, 3
        await follower.refresh()
        assert (reader.reads[4:], reader.counter) == ([True], 3)

    run(test)


def test_a_gateway_follows_its_names_and_keys_together(tmp_path: Path, tiny_base: Callable[..., Any]) -> None:
    base, url = tiny_base(), f"sqlite:///{tmp_path}/catalog.db"
    catalog, opened = Catalog(url), list[Catalog]()

    def open_catalog() -> Catalog:
        opened.append(Catalog(url))
        return opened[-1]

    async def test() -> None:
        follower = CatalogWatcher(open_catalog)
        access = Authenticator(KeyRing(), follower, host="0.0.0.0")
        directory = ModelResolver([base], follower)
        await access.start()
        await directory.follower.start()
        assert not access.is_limited.is_set()
        register(catalog, "tone", base.fingerprint)
        secret, key = catalog.keys.create("ci", limits=Limits(rpm_limit=5))
        headers = {"authorization": f"Bearer {secret}"}
        assert (await directory.resolve("tone", OPERATOR)).adapter is not None
        assert (await access.admit("POST", "infer", headers)) is not None  # the look for the name brought the key too
        assert access.is_limited.is_set()
        catalog.keys.update(key.id, KeyChange(limits=Limits(max_jobs=1)))
        await access.refresh()
        assert not access.is_limited.is_set()
        began = time.monotonic()
        catalog.keys.revoke(key.id)
        await until(lambda: not access.ring.state.keys)
        assert time.monotonic() - began < 10
        await directory.follower.stop()
        await access.stop()

    asyncio.run(test())
    catalog.close()
    assert len(opened) == 1


def test_a_stop_in_the_moment_in_which_the_database_answers_ends_the_watch() -> None:
    async def run() -> None:
        follower = CatalogWatcher(Database())
        follower.add(Numbers())
        await follower.start()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        follower._in_thread = lambda question: answer  # type: ignore[method-assign,assignment,return-value]
        while follower._counting is not answer:
            await asyncio.sleep(0.001)
        answer.set_result(0)
        async with asyncio.timeout(30):
            await follower.stop()
        assert not follower.is_running

    asyncio.run(run())
