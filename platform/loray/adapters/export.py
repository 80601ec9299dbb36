"""Saving a trained adapter in PEFT's format.

Every trained parameter is saved under PEFT's name and in the dtype that it is given in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from peft import PeftConfig
from torch import Tensor

from loray.adapters.checks.files import PAIR_NAMES
from loray.adapters.inject import ADAPTER, BASE_ROWS, is_magnitude, peft_config, trained_norms
from loray.adapters.peft_format import PREFIX, ROWS_SUFFIX, AdapterFiles, write_folder
from loray.adapters.vera import VeraLinear
from loray.spec import AdapterSpec, VeraSpec

_INDEX_NBYTES = 16  # of one token id as a line of the configuration


def save_adapter(model: Any, spec: AdapterSpec, folder: Path, *, trained: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter that `attach` put into `model` to `folder`, in PEFT's format.

    `trained` has the full values of the trained parameters by name, for a model that holds only shards of them.
    """
    if trained is None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    write_folder(folder, *adapter_files(model, spec, trained))


def adapter_files(model: Any, spec: AdapterSpec, trained: Mapping[str, Tensor]) -> AdapterFiles:
    """The same in memory. The tensors are those of `trained`, and VeRA's pair.

    The base's name is the last part of `model.config.name_or_path`. An input embedding that is not tied to the output
    head is saved as its changed rows (PEFT's `trainable_token_indices`) where that is smaller.
    """
    tensors = {PREFIX + peft_name(name): t for name, t in trained.items()}
    token_ids = _replace_embedding_by_rows(model, spec, tensors)
    modules_to_save = trained_norms(model)
    if token_ids is None and model.get_input_embeddings().weight.requires_grad:
        modules_to_save.append("embed_tokens")
    if isinstance(spec, VeraSpec) and spec.save_projection:
        pair = next(m.shared.pair for m in model.modules() if isinstance(m, VeraLinear))
        tensors |= dict(zip(PAIR_NAMES, (pair.a_RI, pair.b_OR), strict=True))
    options: dict[str, Any] = {
        "modules_to_save": modules_to_save or None,
        "base_model_name_or_path": PurePath(model.config.name_or_path).name,
        "inference_mode": True,
    }
    if token_ids is not None:
        options["trainable_token_indices"] = token_ids
    return AdapterFiles(_fields(peft_config(spec, **options)), tensors)


def peft_name(name: str) -> str:
    """A parameter's name in a checkpoint, where PEFT leaves out the name of the adapter, and what follows it in the
    names of DoRA's magnitudes.
    """
    stored = name.replace(f".{ADAPTER}.", ".")
    return stored.removesuffix(".weight") if is_magnitude(name) else stored


def _replace_embedding_by_rows(model: Any, spec: AdapterSpec, tensors: dict[str, Tensor]) -> list[int] | None:
    """Replace the dense embedding in `tensors` by its changed rows, and return their token ids. None where the
    embedding stays dense.
    """
    embedding = model.get_input_embeddings()
    base_VD = getattr(embedding, BASE_ROWS, None)
    if base_VD is None or isinstance(spec, VeraSpec):  # tied: PEFT would change the head too. VeraConfig has no rows
        return None
    name = PREFIX + next(name for name, p in model.named_parameters() if p is embedding.weight)
    weight_VD = tensors[name].detach()
    changed = (weight_VD != base_VD.to(weight_VD.device)).any(dim=1).nonzero().squeeze(1)
    row_nbytes = weight_VD[0].nbytes
    if not len(changed) or len(changed) * (row_nbytes + _INDEX_NBYTES) >= weight_VD.nbytes:
        return None
    del tensors[name]
    tensors[name.removesuffix(".weight") + ROWS_SUFFIX] = weight_VD[changed]
    return [int(i) for i in changed]


def _fields(config: PeftConfig) -> dict[str, Any]:
    """The fields of `config` with sets sorted: PEFT writes them in the order of their hashes, which varies."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
