"""A node's cache: fetched once, verified, bounded, shared by threads and processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loray.adapters.manifest import verify_folder
from loray.errors import IntegrityError
from loray.spec import AdapterManifest
from loray.store import AdapterCache, AdapterStore, LocalStore, ObjectStore
from tests.store.conftest import damage, damage_object


class CountingStore(AdapterStore):
    def __init__(self, objects: ObjectStore) -> None:
        super().__init__(objects)
        self.fetches: list[str] = []

    def fetch(self, digest: str, folder: Path, **have: Any) -> AdapterManifest:
        self.fetches.append(digest)
        return super().fetch(digest, folder, **have)


@pytest.fixture
def counting(local_objects: LocalStore) -> CountingStore:
    return CountingStore(local_objects)


def test_cached_once(counting: CountingStore, describe_one: Callable[[int], Path], tmp_path: Path) -> None:
    name = counting.put(describe_one(0))
    cache = AdapterCache(counting, tmp_path / "cache", 1 << 30)
    barrier = threading.Barrier(8)

    def get(_: int) -> Path:
        barrier.wait()
        return cache.get(name)

    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(get, range(8)))
    assert counting.fetches == [name]
    assert len(paths) == 1
    verify_folder(paths.pop())
    AdapterCache(counting, tmp_path / "cache", 1 << 30).get(name)
    assert counting.fetches == [name]


def test_least_recently_used_goes_first(
    counting: CountingStore, describe_one: Callable[[int], Path], tmp_path: Path
) -> None:
    names = [counting.put(describe_one(seed)) for seed in range(3)]
    roomy = AdapterCache(counting, tmp_path / "roomy", 1 << 30)
    nbytes = max(sum(f.stat().st_size for f in roomy.get(n).iterdir()) for n in names)
    counting.fetches.clear()
    cache = AdapterCache(counting, tmp_path / "cache", 2 * nbytes + 100)
    paths = [cache.get(n) for n in names[:2]]
    cache.get(names[0])
    cache.get(names[2])
    assert [p.exists() for p in paths] == [True, False]
    assert counting.fetches == names
    assert sorted(p.name for p in (tmp_path / "cache" / "locks").iterdir()) == sorted([names[0], names[2]])


def test_pinned_stays(counting: CountingStore, describe_one: Callable[[int], Path], tmp_path: Path) -> None:
    names = [counting.put(describe_one(seed)) for seed in range(3)]
    cache = AdapterCache(counting, tmp_path / "cache", 1)
    with cache.pinned(names[0]) as path:
        other = cache.get(names[1])
        assert path.exists()
        verify_folder(path)
    assert other.exists()  # the one just fetched is never the one evicted
    last = cache.get(names[2])
    assert [p.exists() for p in (path, other, last)] == [False, False, True]


def test_torn_entry_is_fetched_again(
    counting: CountingStore, describe_one: Callable[[int], Path], tmp_path: Path
) -> None:
    name = counting.put(describe_one(0))
    path = AdapterCache(counting, tmp_path / "cache", 1 << 30).get(name)
    damage(path / "adapter_model.safetensors")
    verify_folder(AdapterCache(counting, tmp_path / "cache", 1 << 30).get(name))
    assert counting.fetches == [name, name]


def test_a_cold_fetch_is_verified(objects: ObjectStore, describe_one: Callable[[int], Path], tmp_path: Path) -> None:
    """From a folder and from S3: what arrives is what was published, and bytes changed in the store are found."""
    folder = describe_one(0)
    store = AdapterStore(objects)
    name = store.put(folder)
    cached = AdapterCache(store, tmp_path / "cache", 1 << 30).get(name)
    assert verify_folder(cached) == verify_folder(folder)
    assert (cached / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    sha256 = store.manifest(name).files["adapter_model.safetensors"]
    damage_object(objects, f"blobs/{sha256[:2]}/{sha256}")
    cold = AdapterCache(store, tmp_path / "other", 1 << 30)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors in the store differs"):
        cold.get(name)
    damage_object(objects, f"manifests/{name[:2]}/{name}.json")
    with pytest.raises(IntegrityError, match="manifest"):
        cold.get(name)
    assert list((tmp_path / "other" / "adapters").iterdir()) == []
    assert store.put(folder) == name
    verify_folder(cold.get(name))


def test_who_fetches_and_who_vouches_can_be_said(
    counting: CountingStore, describe_one: Callable[[int], Path], tmp_path: Path
) -> None:
    """One of many fetches, in its own way. What an earlier process left is hashed unless the caller vouches for it."""
    name = counting.put(describe_one(0))
    barrier = threading.Barrier(4)
    own: list[Path] = []

    def fetch(digest: str, folder: Path) -> None:
        own.append(folder)
        AdapterStore(counting.objects).fetch(digest, folder)

    cache = AdapterCache(counting, tmp_path / "cache", 1 << 30)

    def get(_: int) -> Path:
        barrier.wait()
        with cache.pinned(name, fetch=fetch) as path:
            return path

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(get, range(4))) == {tmp_path / "cache" / "adapters" / name}
    assert (len(own), counting.fetches) == (1, [])
    damage(own[0] / "adapter_model.safetensors")
    later = AdapterCache(counting, tmp_path / "cache", 1 << 30)
    with later.pinned(name, fetch=fetch, is_good=lambda folder: True):
        assert len(own) == 1
    later = AdapterCache(counting, tmp_path / "cache", 1 << 30)
    with later.pinned(name, fetch=fetch, is_good=lambda folder: False) as path:
        verify_folder(path)
    assert len(own) == 2


def test_an_entry_that_has_grown_counts_with_all_it_holds(
    counting: CountingStore, describe_one: Callable[[int], Path], tmp_path: Path
) -> None:
    names = [counting.put(describe_one(seed)) for seed in range(2)]
    cache = AdapterCache(counting, tmp_path / "cache", 1 << 20)
    first = cache.get(names[0])
    with cache.pinned(names[1]) as path:
        (path / "packed").write_bytes(bytes(1 << 20))
        cache.trim(names[1])
        assert (first.exists(), path.exists()) == (False, True)


def test_failed_fetch_leaves_nothing(
    counting: CountingStore, local_objects: LocalStore, describe_one: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = describe_one(0)
    name = counting.put(folder)
    sha256 = counting.manifest(name).files["adapter_model.safetensors"]
    damage_object(local_objects, f"blobs/{sha256[:2]}/{sha256}")
    cache = AdapterCache(counting, tmp_path / "cache", 1 << 30)
    with pytest.raises(IntegrityError):
        cache.get(name)
    assert list((tmp_path / "cache" / "adapters").iterdir()) == []
    assert list((tmp_path / "cache" / "locks").iterdir()) == []
    counting.put(folder)
    verify_folder(cache.get(name))


def _read_many(root: str, cache: str, names: list[str]) -> None:
    """In a process of its own: a cache that holds one adapter, so that everyone evicts everyone else's."""
    mine = AdapterCache(AdapterStore(LocalStore(Path(root))), Path(cache), 1)
    for _ in range(15):
        for name in names:
            with mine.pinned(name) as path:
                verify_folder(path)
    os._exit(0)


def test_processes_share_a_cache(
    local_objects: LocalStore, describe_one: Callable[[int], Path], tmp_path: Path
) -> None:
    names = [AdapterStore(local_objects).put(describe_one(seed)) for seed in range(3)]
    context = multiprocessing.get_context("fork")
    orders = [names, names[::-1], names[1:] + names[:1]]
    processes = [
        context.Process(target=_read_many, args=(str(local_objects.root), str(tmp_path / "cache"), order))
        for order in orders
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    shutil.rmtree(tmp_path / "cache")
