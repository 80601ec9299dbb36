"""A base whose decoder's linear layers are quantised as they are read, one tensor at a time."""

from __future__ import annotations

from typing import Any

from torch import nn

from loray.adapters.quantised import check_installed, linear_4bit
from loray.spec import QuantizationSpec
from loray.train.weights.deferred import BaseWeights, replace_parameters


def read_quantised(model: Any, weights: BaseWeights, spec: QuantizationSpec) -> None:
    """Fill `model`, whose parameters are on meta. The output head stays as it is stored.

    Raises UnsupportedError where bitsandbytes is missing.
    """
    check_installed()
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            bias = None if module.bias is None else weights.read(f"{path}.bias").clone()
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear_4bit(weights.read(f"{path}.weight"), bias, spec))
    replace_parameters(model, lambda name, p: weights.read(name).clone() if p.is_meta else None)
