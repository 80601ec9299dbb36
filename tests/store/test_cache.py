"""A node's cache: fetched once, verified, bounded, shared by threads and processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loray.adapters.manifest import verify_folder
from loray.errors import IntegrityError
from loray.spec import AdapterManifest
from loray.store import AdapterCache, AdapterStore, LocalStore, ObjectStore
from tests.fixtures.calls import at_once, refused
from tests.fixtures.stores import damage, damage_object

WEIGHTS = "adapter_model.safetensors"


class CountingStore(AdapterStore):
    def __init__(self, objects: ObjectStore) -> None:
        super().__init__(objects)
        self.fetches: list[str] = []

    def fetch(self, digest: str, folder: Path, **have: Any) -> AdapterManifest:
        self.fetches.append(digest)
        return super().fetch(digest, folder, **have)


@dataclass
class Node:
    """`names`: of three adapters in the store."""

    store: CountingStore
    folder: Path
    names: list[str]

    def cache(self, nbytes: int = 1 << 30) -> AdapterCache:
        return AdapterCache(self.store, self.folder, nbytes)

    def held(self, kind: str) -> list[str]:
        return sorted(p.name for p in (self.folder / kind).iterdir())


@pytest.fixture
def node(local_objects: LocalStore, describe_one: Callable[[int], Path], tmp_path: Path) -> Node:
    store = CountingStore(local_objects)
    return Node(store, tmp_path / "cache", [store.put(describe_one(seed)) for seed in range(3)])


def test_cached_once(node: Node) -> None:
    name, *_ = node.names
    cache = node.cache()
    paths = set(at_once(8, lambda _: cache.get(name)))
    assert (len(paths), node.store.fetches) == (1, [name])
    verify_folder(paths.pop())
    node.cache().get(name)
    assert node.store.fetches == [name]


def test_least_recently_used_goes_first(node: Node, tmp_path: Path) -> None:
    names, roomy = node.names, AdapterCache(node.store, tmp_path / "roomy", 1 << 30)
    nbytes = max(sum(f.stat().st_size for f in roomy.get(n).iterdir()) for n in names)
    node.store.fetches.clear()
    cache = node.cache(2 * nbytes + 100)
    paths = [cache.get(n) for n in names[:2]]
    cache.get(names[0])
    cache.get(names[2])
    assert [p.exists() for p in paths] == [True, False]
    assert node.store.fetches == names
    assert node.held("locks") == sorted([names[0], names[2]])


def test_pinned_stays(node: Node) -> None:
    cache = node.cache(1)
    with cache.pinned(node.names[0]) as path:
        other = cache.get(node.names[1])
        verify_folder(path)
    assert other.exists()  # the one just fetched is never the one evicted
    last = cache.get(node.names[2])
    assert [p.exists() for p in (path, other, last)] == [False, False, True]


def test_torn_entry_is_fetched_again(node: Node) -> None:
    name, *_ = node.names
    damage(node.cache().get(name) / WEIGHTS)
    verify_folder(node.cache().get(name))
    assert node.store.fetches == [name, name]


def test_a_cold_fetch_is_verified(objects: ObjectStore, describe_one: Callable[[int], Path], tmp_path: Path) -> None:
    """From a folder and from S3: what arrives is what was published, and bytes changed in the store are found."""
    folder, store = describe_one(0), AdapterStore(objects)
    name = store.put(folder)
    cached = AdapterCache(store, tmp_path / "cache", 1 << 30).get(name)
    assert verify_folder(cached) == verify_folder(folder)
    assert (cached / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    sha256 = store.manifest(name).files[WEIGHTS]
    damage_object(objects, f"blobs/{sha256[:2]}/{sha256}")
    cold = AdapterCache(store, tmp_path / "other", 1 << 30)
    refused(IntegrityError, r"adapter_model\.safetensors in the store differs", cold.get, name)
    damage_object(objects, f"manifests/{name[:2]}/{name}.json")
    refused(IntegrityError, "manifest", cold.get, name)
    for kind in ("adapters", "locks"):
        assert list((tmp_path / "other" / kind).iterdir()) == []
    assert store.put(folder) == name
    verify_folder(cold.get(name))


def test_who_fills_an_entry_does_it_once_for_all_that_wait(node: Node) -> None:
    """And may say by itself whether what an earlier process left is good; otherwise its files are hashed."""
    name, *_ = node.names
    cache = node.cache()

    def get(_: int) -> tuple[Path, bool]:
        with cache.entry(name) as entry:
            if not entry.present:
                AdapterStore(node.store.objects).fetch(name, entry.folder)
            return entry

    folder = node.folder / "adapters" / name
    assert sorted(at_once(4, get)) == [(folder, False), *[(folder, True)] * 3]
    damage(folder / WEIGHTS)
    with node.cache().entry(name, is_good=lambda folder: True) as entry:
        assert entry.present
    with node.cache().entry(name, is_good=lambda folder: False) as entry:
        assert not entry.present
    with node.cache().entry(name) as entry:
        assert not entry.present
    assert node.store.fetches == []


def test_an_entry_that_has_grown_counts_with_all_it_holds(node: Node) -> None:
    cache = node.cache(1 << 20)
    first = cache.get(node.names[0])
    with cache.pinned(node.names[1]) as path:
        (path / "packed").write_bytes(bytes(1 << 20))
        cache.trim(node.names[1])
        assert (first.exists(), path.exists()) == (False, True)


def _read_many(root: str, cache: str, names: list[str]) -> None:
    """In a process of its own: a cache that holds one adapter, so that everyone evicts everyone else's."""
    mine = AdapterCache(AdapterStore(LocalStore(Path(root))), Path(cache), 1)
    for _ in range(15):
        for name in names:
            with mine.pinned(name) as path:
                verify_folder(path)
    os._exit(0)


def test_processes_share_a_cache(node: Node, local_objects: LocalStore) -> None:
    context, names = multiprocessing.get_context("fork"), node.names
    places = (str(local_objects.root), str(node.folder))
    orders = [names, names[::-1], names[1:] + names[:1]]
    processes = [context.Process(target=_read_many, args=(*places, order)) for order in orders]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0]


def test_what_is_put_is_there_until_it_is_removed(node: Node, describe_one: Callable[[int], Path]) -> None:
    """As a trainer and a replica of one node use it."""
    name, folder = node.names[0], describe_one(0)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    cache, replica = node.cache(), node.cache()
    cache.put(name, files)
    with replica.pinned(name) as path:
        verify_folder(path)
        assert not cache.remove(name)  # at once, while it is read
        cache.put(name, files)
    assert cache.remove(name)
    assert cache.remove(name)
    assert node.store.fetches == []
    assert (node.held("adapters"), node.held("locks")) == ([], [])


def test_what_is_put_is_not_hashed_again_until_it_has_changed(
    node: Node, describe_one: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor after the machine has been started anew."""
    name, folder = node.names[0], describe_one(0)
    hashed: list[Path] = []
    monkeypatch.setattr("loray.store.cache.verify_folder", hashed.append)
    node.cache().put(name, {path.name: path.read_bytes() for path in folder.iterdir()})
    path = node.cache().get(name)
    assert hashed == []
    with monkeypatch.context() as patch:
        patch.setattr("loray.store.cache.boot_id", lambda: "another")
        node.cache().get(name)
        assert hashed == [path]
        patch.setattr("loray.store.cache.boot_id", lambda: (tmp_path / "missing").read_text())
        node.cache().get(name)
        assert hashed == [path, path]
    monkeypatch.undo()
    damage(path / WEIGHTS)
    verify_folder(node.cache().get(name))
    assert node.store.fetches == [name]
