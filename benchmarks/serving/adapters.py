"""Thousands of random adapters, written in PEFT's format without transformers, published, and fetched for peers.

Their names say what they hold. The store and the catalog in the benchmark's folder keep them between runs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.world import started_s3
from loray.adapters.manifest import ManifestDetails
from loray.adapters.peft_format import PREFIX, read_adapter, write_folder
from loray.bases.config import ModelConfig
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.methods import METHODS, Method
from loray.methods.weights import AdapterWeights, ModuleKey
from loray.planning.run import count_trained
from loray.publishing import Destination, publish
from loray.spec import ATTENTION_MODULES, LINEAR_MODULES, AdapterRef, LoraSpec, VeraSpec
from loray.store import AdapterStore, open_store

if TYPE_CHECKING:
    from torch import Tensor

_B_STD = 0.05  # weaker adapters leave the argmax as it is, and a wrong adapter would not be noticed
_VERA_STD = 0.3
_ALPHA = 8  # PEFT's default
_WRITTEN = datetime(2026, 1, 1, tzinfo=UTC)  # part of the digest, which thus is the same in every run
_SPARE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """Adapter i has rank `ranks[i % len(ranks)]`.

    VeRA adapters of one rank on the same modules share the base's canonical pair, which no adapter's files hold.
    """

    num: int
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    modules: tuple[str, ...] = ATTENTION_MODULES
    method: Literal["lora", "vera"] = "lora"

    def rank(self, index: int) -> int:
        return self.ranks[index % len(self.ranks)]

    def name(self, index: int, base: BaseModel) -> str:
        modules = "all" if self.modules == LINEAR_MODULES else "".join(m[0] for m in self.modules)
        vera = "-vera" if self.method == "vera" else ""
        return f"bench-{base.fingerprint[:8]}-{modules}{vera}-r{self.rank(index)}-{index}"

    def spec(self, rank: int) -> LoraSpec | VeraSpec:
        spec = VeraSpec if self.method == "vera" else LoraSpec
        return spec.model_validate({"rank": rank, "target_modules": self.modules})

    @property
    def _method(self) -> Method:
        return METHODS[self.method]

    def nbytes(self, index: int, config: ModelConfig) -> int:
        """Bytes of the adapter's weights in bf16."""
        return 2 * count_trained(config, self.spec(self.rank(index))).adapter

    def pair_bytes(self, config: ModelConfig) -> int:
        """Bytes of all VeRA pairs in bf16: one pair for each rank."""
        return 2 * sum(self._method.pair_elements(self.spec(rank), config) for rank in set(self.ranks))

    def shared_weights(self, config: ModelConfig) -> int:
        """Elements of the VeRA pair that a token is multiplied with, over all layers; A counts once for each input."""
        if self.method == "lora":
            return 0
        mean = sum(self._method.factors(self.spec(rank), config) for rank in self.ranks) / len(self.ranks)
        return int(mean * config.num_layers)

    def mean_bytes(self, config: ModelConfig) -> float:
        return sum(self.nbytes(i, config) for i in range(self.num)) / self.num


def write_adapter(folder: Path, base: BaseModel, adapters: AdapterSet, index: int) -> None:
    """Write adapter `index` of the set as PEFT saves it, in bf16, with random weights of its own."""
    import torch

    rank, generator = adapters.rank(index), torch.Generator().manual_seed(index)

    def noise(std: float, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(torch.bfloat16)

    tensors: dict[str, Tensor] = {}
    for layer in range(base.config.num_layers):
        for module in adapters.modules:
            out, in_ = base.config.module_shape(module)
            prefix = f"{PREFIX}model.{ModuleKey(layer, module).path}"
            if adapters.method == "vera":
                tensors[f"{prefix}.vera_lambda_d"] = noise(_VERA_STD, rank)
                tensors[f"{prefix}.vera_lambda_b"] = noise(_VERA_STD, out)
            else:
                tensors[f"{prefix}.lora_A.weight"] = noise((3 * in_) ** -0.5, rank, in_)
                tensors[f"{prefix}.lora_B.weight"] = noise(_B_STD, out, rank)
    config: dict[str, Any] = {"peft_type": adapters.method.upper(), "r": rank, "target_modules": list(adapters.modules)}
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base.name, "bias": "none", "inference_mode": True}
    if adapters.method == "vera":
        config |= {"projection_prng_key": 0, "save_projection": False}
    else:
        config |= {"lora_alpha": _ALPHA, "lora_dropout": 0.0}
    write_folder(folder, config, tensors)


def made_adapter(base: BaseModel, rank: int, index: int) -> tuple[AdapterRef, AdapterWeights]:
    """Make a LoRA adapter of this rank, with random weights of its own, that no store has."""
    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        write_adapter(Path(folder), base, AdapterSet(index + 1, ranks=(rank,)), index)
        weights = read_adapter(Path(folder), base.config)
    nbytes = sum(part.nbytes for module in weights.modules.values() for part in module.parts.values())
    context = base.config.max_position_embeddings
    return AdapterRef(f"{index:064x}", f"a{index}", 1, "lora", base.fingerprint, context, nbytes), weights


class Library:
    """A store of published adapters and its catalog. `url`: the store's."""

    def __init__(self, folder: Path, url: str, base: BaseModel) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.url, self.base = folder, url, base
        self.catalog_url = f"sqlite:///{folder}/catalog.db"
        self._store, self._catalog = AdapterStore(open_store(url)), Catalog(self.catalog_url)

    def publish(self, adapters: AdapterSet, num: int | None = None) -> list[AdapterRef]:
        """References of the first `num` adapters of the set; missing ones are published. SystemExit if the disk is too
        small.
        """
        num = adapters.num if num is None else num
        known = {name: entry.default for name, entry in self._catalog.snapshot().adapters.items()}
        names = [adapters.name(i, self.base) for i in range(num)]
        missing = [i for i, name in enumerate(names) if name not in known]
        needed = sum(adapters.nbytes(i, self.base.config) for i in missing)
        free = shutil.disk_usage(self.folder).free
        if missing and needed + _SPARE_BYTES > free:
            raise SystemExit(
                f"{len(missing)} adapters take {needed / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f} GB free; "
                "ask for fewer or smaller ones (--adapters, --ranks), or for another --folder"
            )

        def publish_one(index: int) -> AdapterRef:
            with tempfile.TemporaryDirectory(prefix="publish-", dir=self.folder) as scratch:
                folder = Path(scratch) / "adapter"
                write_adapter(folder, self.base, adapters, index)
                to = Destination(names[index], self._store, self._catalog)
                return publish(folder, self.base, to, ManifestDetails(created_at=_WRITTEN)).ref

        with ThreadPoolExecutor(2) as pool:
            known |= dict(zip((names[i] for i in missing), pool.map(publish_one, missing), strict=True))
        return [known[name] for name in names]

    def fetch(self, refs: list[AdapterRef]) -> list[Path]:
        """The adapters as folders, for peers, which do not read the store."""
        folders = []
        for ref in refs:
            folder = self.folder / "fetched" / ref.digest
            if not folder.is_dir():
                self._store.fetch(ref.digest, folder)
            folders.append(folder)
        return folders


@contextmanager
def open_library(kind: str, folder: Path, base: BaseModel) -> Iterator[Library]:
    """`kind` "file": the store is a folder. "s3": it is a bucket of a local S3 server, which runs during the block."""
    root = folder / kind
    if kind == "file":
        yield Library(root, f"file://{root.absolute()}/store", base)
        return
    from loray.store.s3 import create_bucket

    with started_s3(root / "server", keep=True) as server:
        location = server.location("bench")
        create_bucket(location)
        yield Library(root, location.url, base)
