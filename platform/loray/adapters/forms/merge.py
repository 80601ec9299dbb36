"""Merges an adapter into its base: the result is a Hugging Face checkpoint, which needs neither loray nor PEFT.

LongLoRA's RoPE and context go into `config.json`, and trained norms replace the base's. If the adapter has an input
embedding and the base's output head is tied, the checkpoint has both the adapter's embedding and the base's head.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loray.adapters.forms.convert import as_lora
from loray.adapters.weights import AdapterWeights
from loray.bases.checkpoint import INDEX_FILE, SINGLE_FILE, read_tensors
from loray.bases.registry import BaseModel
from loray.bases.sources import is_copied
from loray.errors import ConflictError

_SHARD_BYTES = 1 << 30  # held in memory twice while a file is written
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")  # the last two are older checkpoints'


def merge_adapter(base: BaseModel, weights: AdapterWeights, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write base + adapter to `folder` with the base's tokenizer, in `dtype` or the base's.

    Sums are computed in fp32 and rounded once. `weights.rope` and `context_length` replace the base's. Raises
    ConflictError where `folder` exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(base.path.iterdir()):
        if is_copied(path.name) and path.name != "config.json":
            shutil.copy2(path, folder / path.name)
    _write_shards(_merged(base, weights, dtype), folder)
    _write_config(base, weights, folder, dtype)


def _merged(base: BaseModel, weights: AdapterWeights, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    norms = {f"model.{path}.weight": norm for path, norm in weights.norms.items()}
    adapted = {f"model.{key.path}.weight": key for key in weights.modules}
    for name, tensor in read_tensors(base.path):
        kept = dtype or tensor.dtype
        if name == _HEAD and base.config.tie_word_embeddings:
            continue  # some exporters write the tied copy
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
