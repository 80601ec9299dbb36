"""Garbage is collected while the same content is published, and the database ends the collection's connections."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import psycopg
import pytest
import sqlalchemy as sa

from loray.bases.registry import BaseModel
from loray.catalog import Catalog, removal
from loray.errors import CatalogError, ConflictError
from loray.publishing import Destination, import_folder
from loray.publishing.gc import collect, find_garbage, verify_store
from loray.store import AdapterStore, LocalStore
from loray.store.objects import ObjectEntry
from tests.fixtures.catalogs import new_postgresql
from tests.fixtures.postgres import Postgres

NUM_STEPS = 40  # about as many as each of both has
_END = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = %s"
_BLOCKED_S = 0.1  # one that takes longer waits for a lock


@dataclass
class Worker:
    """Runs in a thread, and reaches a step before each statement, commit and request to the store. At one of them the
    other one runs, until it ends or waits for a lock, and at another one of them its connections end.
    """

    name: str
    url: str
    folder: Path
    pauses_at: int
    ends_at: int = 0
    num_steps: int = 0
    error: Exception | None = None
    paused: Event = field(default_factory=Event)
    resumed: Event = field(default_factory=Event)

    def run(self, work: Callable[[AdapterStore, Catalog], object]) -> None:
        catalog = Catalog(f"{self.url}?application_name={self.name}")
        for name in ("before_cursor_execute", "commit"):
            sa.event.listen(catalog._engine, name, self._step)
        try:
            work(AdapterStore(SteppedStore(self.folder, self._step)), catalog)
        except (CatalogError, ConflictError) as e:
            self.error = e
        finally:
            self.paused.set()
            catalog.close()

    def _step(self, *_: object) -> None:
        self.num_steps += 1
        if self.num_steps == self.pauses_at:
            self.paused.set()
            self.resumed.wait(_BLOCKED_S)
        if self.num_steps == self.ends_at:
            with psycopg.connect(self.url, autocommit=True, application_name="test") as other:
                other.execute(_END, [self.name])


class SteppedStore(LocalStore):
    """A folder that tells of each request."""

    def __init__(self, folder: Path, step: Callable[[], None]) -> None:
        super().__init__(folder)
        self._step = step

    def put_if_absent(self, key: str, data: bytes | Path) -> bool:
        self._step()
        return super().put_if_absent(key, data)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        self._step()
        return super().get_range(key, start, stop)

    def get_to(self, key: str, path: Path) -> None:
        self._step()
        super().get_to(key, path)

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        self._step()
        return super().entries(prefix)

    def delete(self, key: str) -> None:
        self._step()
        super().delete(key)


@pytest.mark.parametrize("num_rounds", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_version_loses_its_files(
    num_rounds: int,
    postgres: Postgres,
    tiny_base: Callable[..., BaseModel],
    describe_one: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(removal, "_LONGEST_WAIT_S", 2 * _BLOCKED_S)
    url, folder, base, adapter = new_postgresql(postgres), tmp_path / "store", tiny_base(), describe_one(2)
    catalog, store = Catalog(url), AdapterStore(LocalStore(folder))

    def publish(store: AdapterStore, catalog: Catalog) -> object:
        return import_folder(adapter, base, Destination("tone", store, catalog))

    def collect_all(store: AdapterStore, catalog: Catalog) -> object:
        return collect(store, catalog, find_garbage(store, catalog, grace_s=-60, keep_deleted_s=0), keep_deleted_s=0)

    import_folder(describe_one(1), base, Destination("tone", store, catalog))
    publish(store, catalog)
    for seed in range(num_rounds):
        chance = random.Random(seed)
        catalog.delete_version("tone", 2)
        steps = [chance.randrange(1, NUM_STEPS) for _ in range(3)]
        collector = Worker("collector", url, folder, steps[0], ends_at=steps[1])
        publisher = Worker("publisher", url, folder, steps[2])
        works = [(collector, collect_all), (publisher, publish)]
        chance.shuffle(works)
        (first, _), (second, _) = works
        threads = [Thread(target=worker.run, args=(work,)) for worker, work in works]
        threads[0].start()
        first.paused.wait()
        threads[1].start()
        second.paused.wait(_BLOCKED_S)
        first.resumed.set()
        threads[0].join()
        second.resumed.set()
        threads[1].join()
        assert verify_store(store, catalog) == [], (seed, steps)
        if publisher.error is not None:  # until the collection ends, or its claim lapses
            postgres.execute(url.rpartition("/")[2], "DELETE FROM claims")
            publish(store, catalog)
            assert verify_store(store, catalog) == [], (seed, steps)
        assert sorted(catalog.entry("tone").versions) == [1, 2]
    catalog.close()
