"""Adapters in a store: whole or not at all, stored once, damage found and repaired."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loray.adapters.manifest import digest, verify_folder
from loray.errors import ConflictError, IntegrityError, NotFoundError
from loray.spec import AdapterManifest
from loray.store import AdapterStore, ObjectStore, adapters
from tests.fixtures.calls import refused
from tests.fixtures.stores import damage, damage_object


def blob_of(manifest: AdapterManifest, name: str) -> str:
    return f"blobs/{manifest.files[name][:2]}/{manifest.files[name]}"


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
    refused(ConflictError, "exists", store.fetch, name, fetched)


def test_equal_files_are_stored_once(
    store: AdapterStore, objects: ObjectStore, describe_one: Callable[[int], Path]
) -> None:
    first, second = store.put(describe_one(0)), store.put(describe_one(1))
    files = [store.manifest(d).files for d in (first, second)]
    assert files[0]["adapter_config.json"] == files[1]["adapter_config.json"]
    assert len(list(objects.list("blobs/"))) == len({sha for f in files for sha in f.values()})


def test_manifest_comes_last(
    objects: ObjectStore, describe_one: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
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
    store: AdapterStore, objects: ObjectStore, describe_one: Callable[[int], Path]
) -> None:
    folder = describe_one(0)
    damage(folder / "adapter_model.safetensors")
    refused(IntegrityError, r"adapter_model\.safetensors", store.put, folder)
    assert list(objects.list()) == []


def test_damaged_blob_is_found_and_replaced(
    store: AdapterStore, objects: ObjectStore, describe_one: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = describe_one(0)
    name = store.put(folder)
    blob = blob_of(store.manifest(name), "adapter_model.safetensors")
    damage_object(objects, blob)
    refused(IntegrityError, r"adapter_model\.safetensors in the store differs", store.verify, name)
    refused(IntegrityError, "differs", store.fetch, name, tmp_path / "out" / "a")
    assert list((tmp_path / "out").iterdir()) == []
    assert store.put(folder) == name
    store.verify(name)
    objects.delete(blob)
    refused(IntegrityError, "missing from the store", store.verify, name)


def test_unknown_digests(store: AdapterStore) -> None:
    refused(NotFoundError, "", store.manifest, "0" * 64)
    for wrong in ("../../etc", "0" * 63, "G" * 64):
        refused(NotFoundError, "not an adapter digest", store.manifest, wrong)


def test_a_file_in_pieces(
    store: AdapterStore, objects: ObjectStore, describe_one: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one comes when all of them are right."""
    monkeypatch.setattr(adapters, "_PIECE_BYTES", 1000)
    folder = describe_one(0)
    name = store.put(folder)
    weights = "adapter_model.safetensors"
    sha256, data = store.manifest(name).files[weights], (folder / weights).read_bytes()
    num_bytes = store.file_size(name, weights, sha256)
    pieces = list(store.pieces(name, weights, sha256, num_bytes))
    assert (b"".join(pieces), {len(piece) for piece in pieces[:-1]}) == (data, {1000})
    damage_object(objects, blob_of(store.manifest(name), weights))
    came: list[bytes] = []
    with pytest.raises(IntegrityError, match=rf"{weights} in the store differs from its SHA-256"):
        came.extend(store.pieces(name, weights, sha256, num_bytes))
    assert came == pieces[:-1]
    refused(IntegrityError, "differs", next, store.pieces(name, weights, sha256, 0))
    objects.delete(blob_of(store.manifest(name), weights))
    refused(IntegrityError, "is missing from the store", next, store.pieces(name, weights, sha256, num_bytes))
