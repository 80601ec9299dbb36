"""A published adapter of a tiny base, and the loader of a replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.memory.blocks import Geometry
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import AdapterRef
from loray.store import AdapterStore, open_store
from serve_apps.replica.loading import AdapterLoader


@dataclass
class Seen:
    """Calls of `progress`: the number of layers that have arrived, and whether the whole adapter is verified."""

    calls: list[tuple[int, bool]] = field(default_factory=list)

    def __call__(self, packed: PackedAdapter, remaining_s: float) -> None:
        assert remaining_s >= 0
        partial = packed.partial
        num_layers = 2 if partial is None else min(2, partial.wait_for_layers(0, 0))
        self.calls.append((num_layers, partial is None or partial.complete))


class World:
    """A published adapter of a tiny base, and the loader of a replica."""

    def __init__(self, base: BaseModel, folder: Path, home: Path) -> None:
        self.base, self.folder = base, folder
        self.settings = Settings.from_env({"LORAY_HOME": str(home)})
        self.store = AdapterStore(open_store(self.settings.store))
        publish(folder, base, Destination("a", self.store, Catalog(self.settings.catalog)))
        self.ref = Catalog(self.settings.catalog).resolve("a")
        config = base.config
        geometry = Geometry(40, config.num_layers, 16, 2 * 16 * config.num_kv_heads * config.head_dim)
        self.packer = Packer(geometry, torch.bfloat16, torch.zeros(1, config.hidden_size))
        self.loader = AdapterLoader(base, self.settings)
        self.seen = Seen()

    def load(self, *, loader: AdapterLoader | None = None, ref: AdapterRef | None = None) -> PackedAdapter:
        self.seen.calls.clear()
        loader = loader or self.loader
        packed = loader(ref or self.ref).pack(self.packer, self.seen)
        loader.cache_writer.flush()
        return packed

    @property
    def cached(self) -> Path:
        return self.settings.home / "cache" / "adapters" / self.ref.digest

    @property
    def packed_file(self) -> Path:
        (file,) = self.cached.glob("packed*")
        return file

    def blob(self) -> Path:
        sha256 = self.store.manifest(self.ref.digest).files["adapter_model.safetensors"]
        return self.settings.home / "store" / "blobs" / sha256[:2] / sha256


@pytest.fixture
def world(
    request: pytest.FixtureRequest,
    tiny_base: Callable[..., BaseModel],
    peft_folder: Callable[..., Path],
    tmp_path: Path,
) -> World:
    base = tiny_base()
    return World(base, peft_folder(base, getattr(request, "param", "lora")), tmp_path / "home")


def same(a: PackedAdapter, b: PackedAdapter) -> bool:
    pairs = (None if p.pair is None else p.pair.digest for p in (a, b))
    return a.shape == b.shape and len(set(pairs)) == 1 and all(map(torch.equal, a.layered, b.layered))
