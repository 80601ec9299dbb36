"""Adapters loaded from a store and from the node's cache: the same rows, every byte verified, errors by name."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loray.adapters.manifest import read_manifest
from loray.adapters.peft_format import parse_adapter, read_adapter
from loray.bases.registry import BaseModel
from loray.engine.pool.packed import PackedAdapter, Packer, open_packed
from loray.errors import AdapterGone, BaseMismatch, IntegrityError
from loray.files import file_sha256
from loray.methods.weights import AdapterWeights
from loray.publishing import ephemeral
from loray.spec import AdapterManifest, AdapterRef, RopeParameters
from loray.store import AdapterStore
from serve_apps.replica import loading as adapter_loading
from serve_apps.replica.loading import AdapterLoader
from tests.fixtures.replica import World, same
from tests.fixtures.stores import damage


@pytest.mark.parametrize("world", ["lora", "vera"], indirect=True)
@pytest.mark.parametrize("piece", [256, 1 << 20])
def test_the_same_rows_from_the_store_and_from_the_cache(
    world: World, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_loading, "_FIRST_BYTES", piece * 8)
    monkeypatch.setattr(adapter_loading, "_RANGE_BYTES", piece)
    expected = world.packer.pack(read_adapter(world.folder, world.base.config))
    cold = world.load()
    assert same(cold, expected)
    world.store.objects.delete(f"manifests/{world.ref.digest[:2]}/{world.ref.digest}.json")  # no store any more
    for loader in (world.loader, AdapterLoader(world.base, world.settings)):
        assert same(world.load(loader=loader), expected)
    assert bool(list(world.cached.glob("packed*"))) == (expected.pair is None)


@pytest.mark.parametrize("at", [-1, 20])
def test_damaged_bytes_are_never_accepted(world: World, at: int) -> None:
    blob = world.blob()
    data = bytearray(blob.read_bytes())
    data[at] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(IntegrityError, match="in the store"):
        world.load()
    assert list(world.cached.parent.iterdir()) == []
    blob.unlink()
    with pytest.raises(IntegrityError, match=r"incomplete: adapter_model\.safetensors is missing"):
        world.load()


def test_a_damaged_packed_file_is_made_again(world: World) -> None:
    packed = world.load()
    damage(world.packed_file)
    assert same(world.load(loader=AdapterLoader(world.base, world.settings)), packed)
    assert same(world.load(loader=AdapterLoader(world.base, world.settings)), packed)
    damage(world.packed_file)
    damage(world.cached / "adapter_model.safetensors")  # then all comes from the store
    assert same(world.load(loader=AdapterLoader(world.base, world.settings)), packed)


@pytest.mark.parametrize("fields", [{"nbytes": 16}, {"nbytes": 1 << 40}])
def test_memory_is_planned_by_what_the_file_has(world: World, fields: dict[str, int]) -> None:
    """A manifest that somebody has put into the store himself."""
    raw = json.loads((world.folder / "loray.json").read_text()) | fields
    (world.folder / "loray.json").write_text(json.dumps(raw))
    ref = replace(world.ref, digest=world.store.put(world.folder))
    with pytest.raises(IntegrityError, match="its manifest says"):
        world.load(ref=ref)
    world.loader.cache.get(ref.digest)
    with pytest.raises(IntegrityError, match="its manifest says"):
        world.load(ref=ref)


def test_a_header_that_promises_more_than_the_store_has(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocated(*_: object) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr(type(world.packer.memory), "empty", allocated)
    weights = world.folder / "adapter_model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1024,262144],"data_offsets":[0,1073741824]}}'
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    raw = json.loads((world.folder / "loray.json").read_text()) | {"nbytes": 1 << 30}
    raw["files"][weights.name] = file_sha256(weights)
    (world.folder / "loray.json").write_text(json.dumps(raw))
    with pytest.raises(IntegrityError, match="its header describes 1,073"):
        world.load(ref=replace(world.ref, digest=world.store.put(world.folder)))


def test_another_pool_packs_for_itself(world: World) -> None:
    half = world.load()
    world.packer = Packer(world.packer.geometry, torch.float32, world.packer.embedding_VD)
    full = world.load()
    assert (full.layered[0].dtype, half.layered[0].dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(full.layered[0].bfloat16(), half.layered[0])
    assert len(list(world.cached.glob("packed*"))) == 2


def test_an_adapter_of_another_base_is_refused(world: World, tiny_base: Callable[..., BaseModel]) -> None:
    other = AdapterLoader(tiny_base(seed=1), world.settings)
    for _ in range(2):  # from the store, and from the cache that the right base has filled
        with pytest.raises(BaseMismatch, match="a@1 was trained on another base"):
            world.load(loader=other)
        world.load()


@pytest.mark.parametrize("world", ["vera"], indirect=True)
def test_a_vera_adapter_keeps_the_pair_it_was_trained_with(world: World) -> None:
    """Simulates a PyTorch that draws other numbers from the same key."""
    manifest = read_manifest(world.folder)
    raw = json.loads((world.folder / manifest.FILE).read_text())
    raw["projection"]["sha256"] = "0" * 64
    (world.folder / manifest.FILE).write_text(json.dumps(raw))
    digest = world.store.put(world.folder)
    with pytest.raises(IntegrityError, match="a@1: its VeRA projection is not the pair it was trained with"):
        world.load(ref=replace(world.ref, digest=digest))


def test_an_adapter_is_given_before_it_is_in_the_cache(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, given = AdapterStore.fetch, Event()

    def held_back(self: AdapterStore, *args: Any, **options: Any) -> AdapterManifest:
        assert given.wait(60)
        return fetch(self, *args, **options)

    monkeypatch.setattr(AdapterStore, "fetch", held_back)
    packed = world.loader(world.ref, world.packer)
    assert not world.cached.exists()
    given.set()
    world.loader.cache_writer.flush()
    assert same(open_packed(world.packed_file, verify=True), packed)


def test_no_load_waits_while_too_many_wait_for_the_cache(
    world: World, published: Callable[..., AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, given = AdapterStore.fetch, Event()

    def held_back(self: AdapterStore, *args: Any, **options: Any) -> AdapterManifest:
        assert given.wait(60)
        return fetch(self, *args, **options)

    monkeypatch.setattr(AdapterStore, "fetch", held_back)
    monkeypatch.setattr(adapter_loading, "_MAX_WAITING", 1)
    loader, other = AdapterLoader(world.base, world.settings), published("b", seed=1)
    loader(world.ref, world.packer)
    packed = loader(other, world.packer)
    given.set()
    loader.cache_writer.flush()
    assert world.packed_file.exists()
    assert not world.cached.with_name(other.digest).exists()
    assert same(world.load(loader=loader, ref=other), packed)
    assert world.cached.with_name(other.digest).exists()


def test_a_header_whose_tensors_are_not_aligned(world: World) -> None:
    weights = world.folder / "adapter_model.safetensors"
    header = (
        b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}'
    )
    weights.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 6)
    raw = json.loads((world.folder / "loray.json").read_text()) | {"nbytes": 6}
    raw["files"][weights.name] = file_sha256(weights)
    (world.folder / "loray.json").write_text(json.dumps(raw))
    with pytest.raises(IntegrityError, match="its header is not that of a safetensors file"):
        world.load(ref=replace(world.ref, digest=world.store.put(world.folder)))


def test_a_cache_that_cannot_be_written_affects_no_request(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(packed: PackedAdapter, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(adapter_loading, "save_packed", full)
    expected = world.packer.pack(read_adapter(world.folder, world.base.config))
    for _ in range(2):  # from the store, and from the published files in the cache
        assert same(world.load(), expected)
    assert "the node's cache has not kept it: [Errno 28] No space left" in caplog.text
    monkeypatch.undo()
    world.load()
    assert same(open_packed(world.packed_file, verify=True), expected)


# -- ephemeral adapters -----------------------------------------------------------------------------------------------


class Actors:
    """Ray's actors by name, each of which gives these files or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
        self._given = given
        self.asked: list[str] = []
        monkeypatch.setattr("ray.get_actor", self._actor)
        monkeypatch.setattr("ray.get", lambda reference, timeout: reference())

    def _actor(self, name: str, namespace: str) -> Any:
        assert namespace == "loray"
        if name not in self._given:
            raise ValueError(f"no actor {name}")

        def give(digest: str) -> Any:
            self.asked.append(name)
            if isinstance(self._given[name], Exception):
                raise self._given[name]
            return self._given[name]

        return SimpleNamespace(give=SimpleNamespace(remote=lambda digest: partial(give, digest)))


@pytest.fixture
def rollout(world: World) -> tuple[AdapterRef, dict[str, bytes]]:
    files = {name: (world.folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    ref, given = ephemeral(files, world.base, run="run", step=5, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    return ref, given


@pytest.mark.parametrize("world", ["lora", "vera"], indirect=True)
def test_an_ephemeral_adapter_of_the_nodes_cache(world: World, rollout: tuple[AdapterRef, dict[str, bytes]]) -> None:
    ref, files = rollout
    world.loader.cache.put(ref.digest, files)
    expected = world.packer.pack(read_adapter(world.folder, world.base.config))
    for _ in range(2):
        assert same(world.load(ref=ref, loader=AdapterLoader(world.base, world.settings)), expected)
    assert sorted(path.name for path in (world.cached.parent / ref.digest).iterdir()) == sorted(files)  # nothing packed
    assert world.loader.counts.sources["store",] == 0


def test_a_version_that_differs_in_values_alone_is_not_parsed(
    world: World, rollout: tuple[AdapterRef, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after an adapter of the store; with other RoPE parameters, bytes or a shorter file it is."""
    parsed: list[Path] = []

    def parse(folder: Path, *rest: Any) -> AdapterWeights:
        parsed.append(folder)
        return parse_adapter(folder, *rest)

    monkeypatch.setattr(adapter_loading, "parse_adapter", parse)
    world.load()
    ref, files = rollout
    later = {name: files[name] for name in ("adapter_config.json", "adapter_model.safetensors")}
    later["adapter_model.safetensors"] = later["adapter_model.safetensors"][:-2] + b"\0\0"
    ref, files = ephemeral(later, world.base, run="run", step=6, created_at=datetime(2026, 1, 1, tzinfo=UTC))
    world.loader.cache.put(ref.digest, files)
    packed = world.load(ref=ref)
    folder = world.cached.parent / ref.digest
    assert len(parsed) == 1
    assert same(packed, world.packer.pack(read_adapter(folder, world.base.config)))
    assert not same(packed, world.load())
    manifest = folder / AdapterManifest.FILE
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(raw | {"rope_parameters": {"rope_theta": 5.0}}))
    assert world.load(ref=ref).rope == RopeParameters(rope_theta=5.0)
    assert parsed[1:] == [folder]
    manifest.write_text(json.dumps(raw | {"nbytes": raw["nbytes"] + 1}))
    with pytest.raises(IntegrityError, match="its manifest says"):
        world.load(ref=ref)
    manifest.write_text(json.dumps(raw))
    (folder / "adapter_model.safetensors").write_bytes(files["adapter_model.safetensors"][:-2])
    with pytest.raises(IntegrityError, match="is damaged"):
        world.load(ref=ref)


def test_an_ephemeral_adapter_that_a_trainer_gives(
    world: World, rollout: tuple[AdapterRef, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, files = rollout
    damaged = {**files, "adapter_config.json": files["adapter_config.json"] + b" "}
    actors = Actors(monkeypatch, wrong=damaged, gone=AdapterGone("retired"), trainer=files)
    ref = replace(ref, holders=("away", "wrong", "gone", "trainer"))
    expected = world.packer.pack(read_adapter(world.folder, world.base.config))
    for _ in range(2):
        assert same(world.load(ref=ref), expected)
    assert actors.asked == ["wrong", "gone", "trainer"]
    assert world.loader.counts.sources == {("cache",): 1, ("store",): 0, ("actor",): 1}
    assert world.loader.cache.remove(ref.digest)


def test_an_ephemeral_adapter_that_nobody_has(
    world: World, rollout: tuple[AdapterRef, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store, which has these bytes under the digest by chance, is not asked."""
    ref, files = rollout
    for name, data in files.items():
        (world.folder / name).write_bytes(data)
    assert world.store.put(world.folder) == ref.digest
    Actors(monkeypatch)
    with pytest.raises(AdapterGone, match=r"~run@5 \([0-9a-f]{12}\) is neither .* trainer give it; publish it again"):
        world.load(ref=replace(ref, holders=("trainer",)))
    with pytest.raises(AdapterGone, match="nor does any actor"):
        world.load(ref=ref)
    assert not (world.cached.parent / ref.digest).exists()
    assert world.load(ref=replace(ref, name="promoted"))  # under a name of the catalog it is anybody's
