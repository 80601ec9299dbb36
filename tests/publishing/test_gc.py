"""The store's garbage: exactly what nothing needs is deleted, beside publishers, on both kinds of store."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from loray.bases.registry import BaseModel
from loray.catalog import Catalog, removal
from loray.errors import CatalogError, ConflictError, IntegrityError
from loray.publishing import Destination, import_folder, register_stored, restore
from loray.publishing.gc import collect, find_garbage, verify_store
from loray.store import AdapterStore, LocalStore, open_store
from loray.store.adapters import object_name
from loray.store.s3 import S3Store
from tests.fixtures.catalogs import new_postgresql
from tests.fixtures.postgres import Postgres
from tests.fixtures.stores import damage_object

Import = Callable[..., str]


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    with closing(Catalog(catalog_url)) as catalog:
        yield catalog


@pytest.fixture
def published(
    store: AdapterStore, catalog: Catalog, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]
) -> Import:
    """`published("tone", 1)`: the digest of a version made from a seed."""

    def make(name: str, seed: int) -> str:
        return import_folder(peft_folder(tiny_base(), seed=seed), tiny_base(), Destination(name, store, catalog)).digest

    return make


def run(store: AdapterStore, catalog: Catalog, *, keep_deleted_s: float = 0) -> set[str]:
    """Collects what is of any age; returns the names of the deleted objects."""
    garbage = find_garbage(store, catalog, grace_s=-60, keep_deleted_s=keep_deleted_s)
    assert {*garbage.objects} == {*collect(store, catalog, garbage, keep_deleted_s=keep_deleted_s)}
    return {object_name(entry.key) for entry in garbage.objects}


def test_what_nothing_needs(
    store: AdapterStore, catalog: Catalog, published: Import, describe_one: Callable[[int], Path]
) -> None:
    first, second = published("tone", 1), published("tone", 2)
    orphan = store.put(describe_one(3))
    shared = set(store.manifest(orphan).files.values()) & set(store.manifest(first).files.values())
    assert shared  # the configuration
    blob = hashlib.sha256(b"left").hexdigest()
    store.objects.put_if_absent(f"blobs/{blob[:2]}/{blob}", b"left")
    store.objects.put_if_absent("uploads/default/u1/README.md", b"left")
    store.objects.put_if_absent("runs/r1/state", b"not of the store of adapters")
    young = find_garbage(store, catalog)
    assert young.objects == ()
    before = set(store.objects.list())
    expected = {orphan, blob, "README.md", *(set(store.manifest(orphan).files.values()) - shared)}
    assert {object_name(e.key) for e in find_garbage(store, catalog, grace_s=-60).objects} == expected
    assert set(store.objects.list()) == before
    assert run(store, catalog) == expected
    for digest in (first, second):
        store.verify(digest)
    assert run(store, catalog) == set()
    assert verify_store(store, catalog) == []


def test_what_was_deleted_is_kept_for_a_time(store: AdapterStore, catalog: Catalog, published: Import) -> None:
    first, second = published("tone", 1), published("tone", 2)
    catalog.removal.delete_version("tone", 1)
    assert run(store, catalog, keep_deleted_s=3600) == set()
    restore("tone", 1, store, catalog)
    store.verify(catalog.adapters.resolve("tone@1").digest)
    catalog.removal.delete_version("tone", 1)
    assert first in run(store, catalog)
    with pytest.raises(ConflictError, match=f"the bytes of adapter {first[:12]} are gone; publish it again"):
        restore("tone", 1, store, catalog)
    store.verify(second)
    assert published("tone", 1) == first
    store.verify(catalog.adapters.resolve("tone@1").digest)
    catalog.removal.delete_adapter("tone")
    assert {first, second} <= run(store, catalog)
    assert list(store.objects.list()) == []


def test_bytes_on_which_a_publication_relies_stay(
    store: AdapterStore,
    catalog: Catalog,
    tiny_base: Callable[..., BaseModel],
    describe_one: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The adapter is there already, as garbage, which is collected after the publisher has seen it."""
    folder = describe_one(3)
    orphan = store.put(folder)
    store.objects.put_if_absent(f"blobs/00/{'0' * 64}", b"left")
    put = AdapterStore.put

    def put_and_collect(self: AdapterStore, folder: Path) -> str:
        digest = put(self, folder)
        garbage = find_garbage(store, catalog, grace_s=-60)
        assert orphan in {object_name(entry.key) for entry in garbage.objects}
        assert [object_name(e.key) for e in collect(store, catalog, garbage, keep_deleted_s=0)] == ["0" * 64]
        return digest

    monkeypatch.setattr(AdapterStore, "put", put_and_collect)
    version = import_folder(folder, tiny_base(), Destination("tone", store, catalog))
    assert version.digest == orphan
    store.verify(orphan)


def test_what_becomes_needed_after_the_search_stays(
    store: AdapterStore, catalog: Catalog, describe_one: Callable[[int], Path]
) -> None:
    digest = store.put(describe_one(1))
    garbage = find_garbage(store, catalog, grace_s=-60)
    assert garbage.objects
    register_stored(digest, Destination("tone", store, catalog))
    assert collect(store, catalog, garbage, keep_deleted_s=0) == []
    store.verify(digest)


def test_an_adapter_without_its_blobs_is_not_registered(
    store: AdapterStore, catalog: Catalog, describe_one: Callable[[int], Path]
) -> None:
    digest = store.put(describe_one(1))
    sha256 = store.manifest(digest).files["adapter_model.safetensors"]
    store.objects.delete(f"blobs/{sha256[:2]}/{sha256}")
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors is missing from the store"):
        register_stored(digest, Destination("tone", store, catalog))


def test_damage_and_loss_are_found(store: AdapterStore, catalog: Catalog, published: Import) -> None:
    first, second = published("tone", 1), published("tone", 2)
    weights = {d: store.manifest(d).files["adapter_model.safetensors"] for d in (first, second)}
    damage_object(store.objects, f"blobs/{weights[first][:2]}/{weights[first]}")
    store.objects.delete(f"manifests/{second[:2]}/{second}.json")
    damaged, missing = verify_store(store, catalog)
    assert damaged == (f"blobs/{weights[first][:2]}/{weights[first]}", "differs from its SHA-256", (first,))
    assert missing == (second, "is missing", (second,))


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
            sa.event.listen(catalog._db.engine, name, self._step)
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
        for name in ("put_if_absent", "get_range", "get_to", "entries", "delete"):
            setattr(self, name, self._stepped(getattr(self, name), step))

    @staticmethod
    def _stepped(request: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
        def stepped(*args: Any, **given: Any) -> Any:
            step()
            return request(*args, **given)

        return stepped


@pytest.mark.parametrize("num_rounds", [10, pytest.param(1000, marks=pytest.mark.slow)])
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
        catalog.removal.delete_version("tone", 2)
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
        assert sorted(catalog.adapters.get("tone").versions) == [1, 2]
    catalog.close()


NUM_PROCESSES = 8
NUM_KILLS = 12
NUM_COLLECTIONS = 20
NUM_PUBLICATIONS = int(os.environ.get("NUM_PUBLICATIONS", "200"))  # 1000 for an hour with more time


class Publisher:
    """Publishes its share, again from the beginning after it was killed."""

    def __init__(self, options: dict[str, object]) -> None:
        self._options = options
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.fixtures.publisher", json.dumps(self._options)]
        self.process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    @property
    def runs(self) -> bool:
        return self.process.poll() is None


@pytest.mark.slow
def test_no_version_is_half_there_and_only_orphans_are_collected(
    tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], postgres: Postgres, s3_objects: S3Store
) -> None:
    base, url = tiny_base(), postgres.new_database()
    catalog, store = Catalog(url), AdapterStore(open_store(s3_objects.location.url))
    options: dict[str, object] = {
        "catalog": url,
        "store": s3_objects.location.url,
        "home": str(base.path.parent.parent),
        "base": base.name,
        "template": str(peft_folder(base)),
        "count": NUM_PUBLICATIONS,
        "step": NUM_PROCESSES,
    }
    chance = random.Random(0)
    publishers = [Publisher(options | {"first": i}) for i in range(NUM_PROCESSES)]
    kills = collections = num_deleted = 0
    while any(p.runs for p in publishers):
        running = [p for p in publishers if p.runs]
        num_published = len(catalog.removal.references(keep_deleted_s=0).files)
        if kills < NUM_KILLS and running and num_published >= kills * NUM_PUBLICATIONS // (2 * NUM_KILLS):
            victim = chance.choice(running)
            victim.process.kill()
            victim.process.wait()
            victim.start()
            kills += 1
        if num_published >= collections * NUM_PUBLICATIONS // NUM_COLLECTIONS:  # not always, or nobody gets through
            garbage = find_garbage(store, catalog, grace_s=-60)  # however young: publishers must notice
            num_deleted += len(collect(store, catalog, garbage, keep_deleted_s=0))
            collections += 1
        time.sleep(0.05)
    assert [p.process.returncode for p in publishers] == [0] * NUM_PROCESSES
    assert kills == NUM_KILLS

    entries = tuple(catalog.snapshot().models())
    digests = {ref.digest for entry in entries for ref in entry.versions.values()}
    assert (len(digests), sum(len(entry.versions) for entry in entries)) == (NUM_PUBLICATIONS,) * 2
    assert verify_store(store, catalog) == []
    for digest in sorted(digests)[:20]:
        store.verify(digest)
    garbage = find_garbage(store, catalog, grace_s=-60)
    collect(store, catalog, garbage, keep_deleted_s=0)
    files = catalog.removal.references(keep_deleted_s=0).files
    needed = digests.union(*files.values())
    assert {object_name(key) for key in store.objects.list()} == needed
    print(f"{collections} collections deleted {num_deleted} objects under the publishers")
    catalog.close()
