"""Merges an adapter into its base: the result is a Hugging Face checkpoint, which needs neither loray nor PEFT.

LongLoRA's RoPE and context go into `config.json`, and trained norms replace the base's. If the adapter has an input
embedding and the base's output head is tied, the checkpoint has both the adapter's embedding and the base's head.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from loray.adapters.forms.convert import as_lora
from loray.adapters.quantised import rounded
from loray.adapters.weights import AdapterWeights
from loray.bases.checkpoint import INDEX_FILE, SINGLE_FILE, read_tensors
from loray.bases.registry import BaseModel
from loray.bases.sources import is_copied
from loray.errors import ConflictError
from loray.spec import LINEAR_MODULES, QuantizationSpec

_SHARD_BYTES = 1 << 30  # held in memory twice while a file is written
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LINEAR = tuple(f".{module}.weight" for module in LINEAR_MODULES)
_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")  # the last two are older checkpoints'


class RoundedBase(NamedTuple):
    """How the base was quantised, and in which dtype it computed."""

    quantization: QuantizationSpec
    dtype: torch.dtype


def merge_adapter(
    base: BaseModel,
    weights: AdapterWeights,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    trained_on: RoundedBase | None = None,
) -> None:
    """Write base + adapter to `folder` with the base's tokenizer, in `dtype` or the base's.

    With `trained_on` the base's linear layers have the values that they had, quantised, while the adapter was trained;
    else they are the base's own, as where the adapter is served. Sums are computed in fp32 and rounded once.
    `weights.rope` and `context_length` replace the base's. Raises ConflictError where `folder` exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(base.path.iterdir()):
        if is_copied(path.name) and path.name != "config.json":
            shutil.copy2(path, folder / path.name)
    _write_shards(_merged(base, weights, dtype, trained_on), folder)
    _write_config(base, weights, folder, dtype)


def _merged(
    base: BaseModel, weights: AdapterWeights, dtype: torch.dtype | None, trained_on: RoundedBase | None
) -> Iterator[tuple[str, Tensor]]:
    norms = {f"model.{path}.weight": norm for path, norm in weights.norms.items()}
    adapted = {f"model.{key.path}.weight": key for key in weights.modules}
    for name, stored in read_tensors(base.path):
        tensor, kept = stored, dtype or stored.dtype
        if name == _HEAD and base.config.tie_word_embeddings:
            continue  # some exporters write the tied copy
        if trained_on is not None and name.endswith(_LINEAR):
            tensor = rounded(tensor.to(trained_on.dtype), trained_on.quantization)
        if name in adapted:
            lora = as_lora(weights.modules[adapted[name]], weights.pair, tensor.shape[1])
            merged_OI = tensor.float() + lora.scale * (lora.b_OR.float() @ lora.a_RI.float())
            if lora.magnitude_O is not None:
                merged_OI *= lora.output_scale(tensor)[:, None]
            yield name, merged_OI.to(kept)
        elif name == _EMBEDDING and weights.embedding is not None:
            rows_VD, ids = tensor.to(kept, copy=True), weights.embedding.token_ids
            rows_VD[slice(None) if ids is None else list(ids)] = weights.embedding.rows_VD.to(kept)
            yield name, rows_VD
            if base.config.tie_word_embeddings:
                yield _HEAD, tensor.to(kept, copy=True)
        else:
            yield name, norms.get(name, tensor).to(kept)


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Write files of up to `_SHARD_BYTES`, with an index where there are several, as transformers does."""
    shards: list[dict[str, str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def write() -> None:
        nonlocal size
        path = folder / f"shard-{len(shards)}.safetensors"
        save_file({name: t.contiguous() for name, t in held.items()}, path, metadata={"format": "pt"})
        shards.append(dict.fromkeys(held, path.name))
        held.clear()
        size = 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > _SHARD_BYTES:
            write()
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / SINGLE_FILE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"shard-{i}.safetensors").rename(folder / name)
    weight_map = {tensor: names[i] for i, shard in enumerate(shards) for tensor in shard}
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_config(base: BaseModel, weights: AdapterWeights, folder: Path, dtype: torch.dtype | None) -> None:
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    if weights.rope is not None:
        config = {field: value for field, value in config.items() if field not in _ROPE_FIELDS}
        config["rope_parameters"] = weights.rope.to_hf()
        assert weights.context_length is not None
        config["max_position_embeddings"] = weights.context_length
    if weights.embedding is not None:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config = {field: value for field, value in config.items() if field != "torch_dtype"}
        config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
