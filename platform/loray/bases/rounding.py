"""Quantised forms of a 16-bit base: their linear modules rounded to int8, float8 or int4, or to bitsandbytes' 4 bits.

int8, fp8  a scale a row, the row's largest magnitude over 127 or 448; products may round activations row by row, too
int4       a scale a group of 128, 64 or 32 inputs: the value of largest magnitude over −8, shrunk to the least error
nf4, fp4   as QLoRA rounds its base (Dettmers et al., 2023), whose experts stay as they are

The first three are written as llm-compressor writes them (compressed-tensors), the last as transformers does.
Embeddings, norms, biases and the output head stay as they are.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loray.bases.checkpoint import plain_name, read_tensors, stored_dtype, tensor_infos
from loray.bases.config import FUSED
from loray.bases.quantization import RoundedTo
from loray.bases.quantized import check_installed, linear_4bit
from loray.bases.registry import BaseModel, add_filled, copy_beside_weights, list_bases
from loray.bases.weights import WeightSource, write_tensors
from loray.errors import SpecError, UnsupportedError
from loray.files import file_lock
from loray.spec import LINEAR_MODULES, DType, QuantizationSpec, TrainSpec
from loray.telemetry import Progress


class QloraBase(NamedTuple):
    """The base on which QLoRA trains: its quantization, and the dtype that it is read in and dequantised to."""

    spec: QuantizationSpec
    dtype: DType


_LARGEST: Mapping[RoundedTo, float] = {"int8": 127.0, "fp8": 448.0}
_QUIET: Progress = lambda stage, share: None  # noqa: E731
_GROUPS = (128, 64, 32)
_SHRINKS = tuple(1.05 - 0.025 * i for i in range(16))  # what is cut off may cost less than coarse steps do


def add_rounded(
    base: BaseModel,
    to: RoundedTo | QloraBase,
    *,
    home: Path,
    name: str | None = None,
    progress: Progress = _QUIET,
) -> BaseModel:
    """Add the form of `base` that is rounded to `to`, called `name` or NAME-int8, … Adding it again verifies it.

    Raises SpecError where `base` is quantised already, UnsupportedError where its widths have no groups or bitsandbytes
    is missing, and as `add_base` does.
    """
    if base.config.quantization is not None:
        raise SpecError(f"{base.name} is quantised already ({base.config.quantization}): take the 16-bit base")
    if isinstance(to, QloraBase):
        check_installed()
        rounds: _Rounding = _Nf4(to)
    else:
        rounds = _Rows(to, _group_size(base) if to == "int4" else None)
    label, fill = _label(base, to), partial(_fill, base, rounds)
    return add_filled(name or f"{base.name}-{label}", _source(base, label), home, progress, fill, of=base)


def form_trained_on(base: BaseModel, spec: TrainSpec, home: Path, progress: Progress = _QUIET) -> BaseModel:
    """Find the base on which a recipe's adapter is trained: `base`, or the quantised form of it, which is added where
    it is missing.
    """
    if spec.quantization is None:
        return base
    to = QloraBase(spec.quantization, spec.chosen_dtype)
    source = _source(base, _label(base, to))
    with file_lock(home / f".{base.name}.lock"):  # the workers of a node ask for it at once
        found = (form for form in list_bases(home) if form.of == base.fingerprint and form.source == source)
        return next(found, None) or add_rounded(base, to, home=home, progress=progress)


def _label(base: BaseModel, to: RoundedTo | QloraBase) -> str:
    if not isinstance(to, QloraBase):
        return to
    scales = "" if to.spec.bnb_4bit_use_double_quant else "-single"
    return to.spec.bnb_4bit_quant_type + scales + ("" if to.dtype == stored_dtype(base.path) else f"-{to.dtype}")


def _source(base: BaseModel, label: str) -> str:
    return f"{label} of {base.name} ({base.fingerprint[:12]})"


def _group_size(base: BaseModel) -> int:
    widths = {base.config.module_shape(module)[1] for module in LINEAR_MODULES}
    for size in _GROUPS:
        if not any(width % size for width in widths):
            return size
    raise UnsupportedError(
        f"{base.name} has modules of {', '.join(map(str, sorted(widths)))} inputs, which no group of "
        f"{', '.join(map(str, _GROUPS))} divides: round it to int8"
    )


def is_rounded(name: str, shape: Sequence[int]) -> bool:
    """Say whether a tensor of a checkpoint is the weight of a linear module of a layer, which is rounded."""
    module, _, kind = plain_name(name).rpartition(".")
    return kind == "weight" and len(shape) == 2 and module.rpartition(".")[2] in (*LINEAR_MODULES, *FUSED)


def _fill(base: BaseModel, rounds: _Rounding, target: Path, scratch: Path, progress: Progress) -> None:
    copy_beside_weights(base.path, target)
    infos = tensor_infos(base.path)
    linear = {i.name for i in infos if is_rounded(i.name, i.shape)}
    if not rounds.has_experts:
        linear = {name for name in linear if ".experts." not in name}
    plain = [i.name for i in infos if len(i.shape) == 2 and i.name not in linear and "embed" not in i.name]
    ignored = sorted({"lm_head", *(name.removesuffix(".weight") for name in plain)})
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = rounds.config(ignored)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def parts() -> Iterator[tuple[str, Tensor]]:
        for i, (name, tensor) in enumerate(read_tensors(base.path)):
            if name in linear:
                prefix = name.removesuffix("weight")
                yield from ((prefix + suffix, part) for suffix, part in rounds.parts(tensor).items())
            elif not (name == "lm_head.weight" and base.config.tie_word_embeddings):
                yield name, tensor.clone()
            progress(f"rounding to {rounds.label}", (i + 1) / len(infos))

    write_tensors(parts(), target)


class _Rows:
    """int8 and float8 by rows, int4 by groups, as compressed-tensors."""

    has_experts = True

    def __init__(self, label: RoundedTo, group_size: int | None) -> None:
        self.label: RoundedTo = label
        self._group_size = group_size

    def config(self, ignored: Sequence[str]) -> dict[str, Any]:
        is_packed, is_float = self._group_size is not None, self.label == "fp8"
        weights = {
            "num_bits": 4 if is_packed else 8,
            "type": "float" if is_float else "int",
            "symmetric": True,
            "strategy": "group" if is_packed else "channel",
            "group_size": self._group_size,
            "dynamic": False,
        }
        activations = {"num_bits": 8, "type": weights["type"], "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if is_packed else "float-quantized" if is_float else "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None if is_packed else activations,
                    "output_activations": None,
                }
            },
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }

    def parts(self, weight_OI: Tensor) -> dict[str, Tensor]:
        w_OI = weight_OI.float()
        if self._group_size is not None:
            return self._packed(w_OI.reshape(len(w_OI), -1, self._group_size), weight_OI.dtype)
        most = _LARGEST[self.label]
        scale_O1 = _usable(w_OI.abs().amax(dim=1, keepdim=True) / most)
        scaled_OI = (w_OI / scale_O1).clamp(-most, most)
        is_float = self.label == "fp8"
        q_OI = scaled_OI.to(torch.float8_e4m3fn) if is_float else scaled_OI.round().to(torch.int8)
        return {"weight": q_OI, "weight_scale": scale_O1}

    def _packed(self, w_OGg: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        widest_OG1 = w_OGg.gather(2, w_OGg.abs().argmax(dim=2, keepdim=True)) / -8
        best_OG1 = scale_OG1 = torch.full_like(widest_OG1, math.inf)
        for shrink in _SHRINKS:
            tried_OG1 = _usable((shrink * widest_OG1).to(dtype).float())  # as it is stored
            error_OG1 = (_levels(w_OGg, tried_OG1) * tried_OG1 - w_OGg).square().sum(dim=2, keepdim=True)
            scale_OG1 = torch.where(error_OG1 < best_OG1, tried_OG1, scale_OG1)
            best_OG1 = torch.minimum(error_OG1, best_OG1)
        values_OI = (_levels(w_OGg, scale_OG1) + 8).flatten(1).to(torch.int32)
        words_OWn = values_OI.reshape(len(values_OI), -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
        return {
            "weight_packed": words_OWn.sum(dim=2, dtype=torch.int32),
            "weight_scale": scale_OG1.squeeze(2).to(dtype),
            "weight_shape": torch.tensor(values_OI.shape, dtype=torch.int64),
        }


def _levels(w_OGg: Tensor, scale_OG1: Tensor) -> Tensor:
    return (w_OGg / scale_OG1).round().clamp(-8, 7)


def _usable(scale: Tensor) -> Tensor:
    """Scales of rows of zeros, which any does for, are not zero."""
    return scale.masked_fill(scale == 0, 1.0)


class _Nf4:
    """4 bits as bitsandbytes rounds to them, and as transformers stores them, whose experts are no linear modules."""

    has_experts = False

    def __init__(self, to: QloraBase) -> None:
        self.label, self._to = to.spec.bnb_4bit_quant_type, to

    def config(self, ignored: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            **self._to.spec.model_dump(),
            "bnb_4bit_compute_dtype": self._to.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(ignored),
        }

    def parts(self, weight_OI: Tensor) -> dict[str, Tensor]:
        weight: Any = linear_4bit(weight_OI.to(getattr(torch, self._to.dtype)), None, self._to.spec).weight
        state: dict[str, Tensor] = weight.quant_state.as_dict(packed=True)
        return {"weight": weight.data} | {f"weight.{suffix}": part.clone() for suffix, part in state.items()}


_Rounding = _Rows | _Nf4


# -- what it costs ----------------------------------------------------------------------------------------------------


class RoundingError(NamedTuple):
    """‖Ŵ − W‖ / ‖W‖ of a layer's linear modules together, and the module that has the largest."""

    layer: int
    error: float
    worst_module: str
    worst: float


def rounding_errors(base: BaseModel, form: BaseModel) -> list[RoundingError]:
    """Compare the weights of a base's quantised form with the base's, layer by layer."""
    weights, rounded = WeightSource(base.path, base.config), WeightSource(form.path, form.config)
    squares: defaultdict[int, dict[str, tuple[float, float]]] = defaultdict(dict)
    for info in tensor_infos(base.path):
        if is_rounded(info.name, info.shape):
            w_OI, r_OI = weights.dense(info.name).double(), rounded.dense(info.name).double()
            _, _, number, module = info.name.removesuffix(".weight").split(".", 3)
            squares[int(number)][module] = float((r_OI - w_OI).square().sum()), float(w_OI.square().sum())
    found = []
    for layer, modules in sorted(squares.items()):
        error, whole = (sum(pair[i] for pair in modules.values()) for i in (0, 1))
        shares = {module: math.sqrt(of / norm) if norm else 0.0 for module, (of, norm) in modules.items()}
        worst = max(shares, key=shares.__getitem__)
        found.append(RoundingError(layer, math.sqrt(error / whole) if whole else 0.0, worst, shares[worst]))
    return found
