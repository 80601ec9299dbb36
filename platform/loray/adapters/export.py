"""Saving a trained adapter in PEFT's format, and reading it back into a model that has the same adapter attached.

Every trained parameter is saved, under PEFT's name and in its own dtype, which is the base's: what is published is bit
for bit what was evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from loray.adapters.inject import ADAPTER, BASE_ROWS, peft_config, trained_norms
from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_config, read_tensors
from loray.adapters.vera import VeraLinear
from loray.errors import IntegrityError
from loray.spec import AdapterSpec, VeraSpec

_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_INDEX_NBYTES = 16  # of one token id as a line of adapter_config.json


def save_adapter(model: Any, spec: AdapterSpec, folder: Path, *, trained: Mapping[str, Tensor] | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; PEFT loads the folder as it is.

    `trained` has the trained parameters' full values by name, where `model` holds only a shard of them. The base is
    named by `model.config.name_or_path`, of a path only the last part. An input embedding that is not tied to the
    output head is saved as its changed rows (PEFT's `trainable_token_indices`) where that is smaller.
    """
    if trained is None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = {_PREFIX + peft_name(name): t for name, t in trained.items()}
    token_ids = _replace_embedding_by_rows(model, spec, tensors)
    modules_to_save = trained_norms(model)
    if token_ids is None and model.get_input_embeddings().weight.requires_grad:
        modules_to_save.append("embed_tokens")
    if isinstance(spec, VeraSpec) and spec.save_projection:
        pair = next(m.shared.pair for m in model.modules() if isinstance(m, VeraLinear))
        tensors |= {"base_model.vera_A": pair.a_RI, "base_model.vera_B": pair.b_OR}
    options: dict[str, Any] = {
        "modules_to_save": modules_to_save or None,
        "base_model_name_or_path": PurePath(model.config.name_or_path).name,
        "inference_mode": True,
    }
    if token_ids is not None:
        options["trainable_token_indices"] = token_ids
    config = peft_config(spec, **options)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(stored, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(_json(config), encoding="utf-8")


@torch.no_grad()
def load_adapter_state(model: Any, folder: Path) -> None:
    """Copy the adapter in `folder` into `model`, which has one of the same spec attached.

    Raises IntegrityError where tensors are missing, or left over, or of other shapes.
    """
    stored = read_tensors(folder)
    embedding = model.get_input_embeddings()
    for name in [name for name in stored if name.endswith(_ROWS)]:
        rows = getattr(embedding, BASE_ROWS).clone()
        rows[read_config(folder)["trainable_token_indices"]] = stored.pop(name).to(rows)
        stored[f"{name.removesuffix(_ROWS)}.weight"] = rows
    stored = {name: t for name, t in stored.items() if name not in ("base_model.vera_A", "base_model.vera_B")}
    ours = {peft_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    shapes, expected = ({name: tuple(t.shape) for name, t in side.items()} for side in (stored, ours))
    if wrong := sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)):
        raise IntegrityError(f"{folder} does not fit the attached adapter, for example in {wrong[0]}: specs differ")
    for name, parameter in ours.items():
        parameter.copy_(stored[name])


def peft_name(name: str) -> str:
    """A parameter's name in a checkpoint: PEFT leaves out the adapter's own name."""
    return name.replace(f".{ADAPTER}.", ".")


def _replace_embedding_by_rows(model: Any, spec: AdapterSpec, tensors: dict[str, Tensor]) -> list[int] | None:
    """Token ids whose rows replace the dense embedding in `tensors`; None where the embedding stays dense."""
    embedding = model.get_input_embeddings()
    base_VD = getattr(embedding, BASE_ROWS, None)
    if base_VD is None or isinstance(spec, VeraSpec):  # tied: PEFT would change the head too. VeraConfig has no rows
        return None
    name = _PREFIX + next(name for name, p in model.named_parameters() if p is embedding.weight)
    weight_VD = tensors[name].detach()
    changed = (weight_VD != base_VD.to(weight_VD.device)).any(dim=1).nonzero().squeeze(1)
    row_nbytes = weight_VD[0].nbytes
    if not len(changed) or len(changed) * (row_nbytes + _INDEX_NBYTES) >= weight_VD.nbytes:
        return None
    del tensors[name]
    tensors[name.removesuffix(".weight") + _ROWS] = weight_VD[changed]
    return [int(i) for i in changed]


def _json(config: PeftConfig) -> str:
    """PEFT writes sets in the order of their hashes; the same adapter must give the same bytes."""
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
