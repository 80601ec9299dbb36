"""The store's garbage: exactly what nothing needs is deleted, beside publishers, on both kinds of store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import ConflictError, IntegrityError
from loray.publishing import Destination, import_folder, register_stored, restore
from loray.publishing.gc import collect, find_garbage, verify_store
from loray.store import AdapterStore
from loray.store.adapters import object_name
from tests.store.conftest import damage_object

Import = Callable[..., str]


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    catalog = Catalog(catalog_url)
    yield catalog
    catalog.close()


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
    catalog.delete_version("tone", 1)
    assert run(store, catalog, keep_deleted_s=3600) == set()
    restore("tone", 1, store, catalog)
    store.verify(catalog.resolve("tone@1").digest)
    catalog.delete_version("tone", 1)
    assert first in run(store, catalog)
    with pytest.raises(ConflictError, match=f"the bytes of adapter {first[:12]} are gone; publish it again"):
        restore("tone", 1, store, catalog)
    store.verify(second)
    assert published("tone", 1) == first
    store.verify(catalog.resolve("tone@1").digest)
    catalog.delete_adapter("tone")
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
