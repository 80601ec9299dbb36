"""Objects written once, adapters whole or not at all, caches shared and bounded."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loray.adapters.manifest import describe, digest, verify_folder
from loray.bases.registry import BaseModel
from loray.errors import ConflictError, IntegrityError, NotFoundError, SettingsError, UnsupportedError
from loray.spec import AdapterManifest
from loray.store import AdapterCache, AdapterStore, LocalStore, open_store

PeftFolder = Callable[..., Path]


@pytest.fixture
def objects(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def store(objects: LocalStore) -> AdapterStore:
    return AdapterStore(objects)


@pytest.fixture
def describe_one(tiny_base: Callable[..., BaseModel], peft_folder: PeftFolder) -> Callable[[int], Path]:
    def make(seed: int = 0) -> Path:
        base = tiny_base()
        folder = peft_folder(base, "lora", seed)
        describe(folder, base=base, description=f"number {seed}")
        return folder

    return make


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def blob_of(objects: LocalStore, manifest: AdapterManifest, name: str) -> Path:
    sha256 = manifest.files[name]
    return objects.root / "blobs" / sha256[:2] / sha256


# -- objects ----------------------------------------------------------------------------------------------------------


def test_objects(objects: LocalStore, tmp_path: Path) -> None:
    assert list(objects.list()) == []
    assert objects.put_if_absent("a/b", b"one")
    assert not objects.put_if_absent("a/b", b"two")
    (tmp_path / "file").write_bytes(b"three")
    assert objects.put_if_absent("a/c", tmp_path / "file")
    assert (objects.get("a/b"), objects.get("a/c")) == (b"one", b"three")
    objects.get_to("a/b", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"one"
    assert list(objects.list("a/")) == ["a/b", "a/c"]
    objects.delete("a/b")
    objects.delete("a/b")
    assert not objects.exists("a/b")
    with pytest.raises(NotFoundError, match="a/b"):
        objects.get("a/b")
    with pytest.raises(NotFoundError, match="a/b"):
        objects.get_to("a/b", tmp_path / "out")


@pytest.mark.parametrize("key", ["", "/a", "a/../b", "..", "a/", ".tmp/x"])
def test_keys_stay_inside(objects: LocalStore, key: str) -> None:
    with pytest.raises(ValueError, match="not a valid key"):
        objects.put_if_absent(key, b"")


def test_one_writer_wins(objects: LocalStore) -> None:
    barrier = threading.Barrier(8)

    def put(i: int) -> bool:
        barrier.wait()
        return objects.put_if_absent("key", bytes([i]) * 100_000)

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(put, range(8)))
    assert wins.count(True) == 1
    assert objects.get("key") == bytes([wins.index(True)]) * 100_000
    assert list((objects.root / ".tmp").iterdir()) == []


def test_urls(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}").put_if_absent("a", b"")
    with pytest.raises(UnsupportedError, match="s3://"):
        open_store("s3://bucket/prefix")
    for url in ("file://relative", "ftp://x", "/plain"):
        with pytest.raises(SettingsError, match="store"):
            open_store(url)


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_round_trip(store: AdapterStore, describe_one: Callable[[int], Path], tmp_path: Path) -> None:
    folder = describe_one(0)
    manifest = verify_folder(folder)
    name = store.put(folder)
    assert name == digest(manifest) == store.put(folder)
    assert store.manifest(name) == manifest == store.verify(name)
    fetched = tmp_path / "fetched" / "adapter"
    assert store.fetch(name, fetched) == verify_folder(fetched) == manifest
    assert {p.name for p in fetched.iterdir()} == {*manifest.files, "loray.json"}
    assert [p.name for p in fetched.parent.iterdir()] == ["adapter"]
    with pytest.raises(ConflictError, match="exists"):
        store.fetch(name, fetched)


def test_equal_files_are_stored_once(
    store: AdapterStore, objects: LocalStore, describe_one: Callable[[int], Path]
) -> None:
    first, second = store.put(describe_one(0)), store.put(describe_one(1))
    files = [store.manifest(d).files for d in (first, second)]
    assert files[0]["adapter_config.json"] == files[1]["adapter_config.json"]
    assert len(list(objects.list("blobs/"))) == len({sha for f in files for sha in f.values()})


def test_manifest_comes_last(
    objects: LocalStore, describe_one: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = describe_one(0)
    keys: list[str] = []
    put = objects.put_if_absent

    def record(key: str, data: bytes | Path) -> bool:
        keys.append(key)
        return put(key, data)

    monkeypatch.setattr(objects, "put_if_absent", record)
    name = AdapterStore(objects).put(folder)
    assert keys[-1] == f"manifests/{name[:2]}/{name}.json"
    assert all(key.startswith("blobs/") for key in keys[:-1])


def test_damaged_folder_is_not_stored(
    store: AdapterStore, objects: LocalStore, describe_one: Callable[[int], Path]
) -> None:
    folder = describe_one(0)
    damage(folder / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        store.put(folder)
    assert list(objects.list()) == []


def test_damaged_blob_is_found_and_replaced(
    store: AdapterStore, objects: LocalStore, describe_one: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = describe_one(0)
    name = store.put(folder)
    blob = blob_of(objects, store.manifest(name), "adapter_model.safetensors")
    damage(blob)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors in the store differs"):
        store.verify(name)
    with pytest.raises(IntegrityError, match="differs"):
        store.fetch(name, tmp_path / "out" / "a")
    assert list((tmp_path / "out").iterdir()) == []
    assert store.put(folder) == name
    store.verify(name)
    blob.unlink()
    with pytest.raises(IntegrityError, match="missing from the store"):
        store.verify(name)


def test_damaged_manifest(store: AdapterStore, objects: LocalStore, describe_one: Callable[[int], Path]) -> None:
    folder = describe_one(0)
    name = store.put(folder)
    damage(objects.root / "manifests" / name[:2] / f"{name}.json")
    with pytest.raises(IntegrityError, match="manifest"):
        store.manifest(name)
    assert store.put(folder) == name
    store.verify(name)


def test_unknown_digests(store: AdapterStore) -> None:
    with pytest.raises(NotFoundError):
        store.manifest("0" * 64)
    for wrong in ("../../etc", "0" * 63, "G" * 64):
        with pytest.raises(NotFoundError, match="not an adapter digest"):
            store.manifest(wrong)


# -- cache ------------------------------------------------------------------------------------------------------------


class CountingStore(AdapterStore):
    def __init__(self, objects: LocalStore) -> None:
        super().__init__(objects)
        self.fetches: list[str] = []

    def fetch(self, digest: str, folder: Path) -> AdapterManifest:
        self.fetches.append(digest)
        return super().fetch(digest, folder)


@pytest.fixture
def counting(objects: LocalStore) -> CountingStore:
    return CountingStore(objects)


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


def test_failed_fetch_leaves_nothing(
    counting: CountingStore, objects: LocalStore, describe_one: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = describe_one(0)
    name = counting.put(folder)
    damage(blob_of(objects, counting.manifest(name), "adapter_model.safetensors"))
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


def test_processes_share_a_cache(objects: LocalStore, describe_one: Callable[[int], Path], tmp_path: Path) -> None:
    names = [AdapterStore(objects).put(describe_one(seed)) for seed in range(3)]
    context = multiprocessing.get_context("fork")
    orders = [names, names[::-1], names[1:] + names[:1]]
    processes = [
        context.Process(target=_read_many, args=(str(objects.root), str(tmp_path / "cache"), order)) for order in orders
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    shutil.rmtree(tmp_path / "cache")
