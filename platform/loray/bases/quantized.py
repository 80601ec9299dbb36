"""4-bit linear layers by bitsandbytes."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn

from loray.errors import UnsupportedError
from loray.spec import QuantizationSpec


def check_installed() -> None:
    """Raise UnsupportedError where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedError("a recipe's quantization needs bitsandbytes: pip install 'loray[qlora]'")


def linear_4bit(weight_OI: Tensor, bias_O: Tensor | None, spec: QuantizationSpec) -> nn.Linear:
    """Make a frozen, quantized linear layer on the CPU; products and bias are in the dtype of `weight_OI`."""
    bnb = _bitsandbytes()
    out_features, in_features = weight_OI.shape
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias=bias_O is not None, compute_dtype=weight_OI.dtype, device="meta"
    )
    weight = bnb.nn.Params4bit(
        weight_OI,
        requires_grad=False,
        quant_type=spec.bnb_4bit_quant_type,
        compress_statistics=spec.bnb_4bit_use_double_quant,
        module=layer,
    )
    layer.weight = weight.to("cpu")  # quantizes
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O, requires_grad=False)
    # Else an evaluation on a CPU with AVX512 repacks the weights for another kernel, in which training is not possible.
    layer.support_avx512bf16_for_cpu = False
    linear: nn.Linear = layer
    return linear


def dequantized(layer: nn.Linear) -> Tensor:
    """Read the weight with which a layer computes, quantized or not."""
    weight: Any = layer.weight
    if not is_quantized(weight):
        plain: Tensor = weight.detach()
        return plain
    full: Tensor = _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
    return full


def rounded(weight_OI: Tensor, spec: QuantizationSpec) -> Tensor:
    """Round `weight_OI` to what a base that is quantized so computes with, in its dtype."""
    return dequantized(linear_4bit(weight_OI, None, spec))


def is_quantized(parameter: Tensor) -> bool:
    return getattr(parameter, "quant_state", None) is not None


def numel(parameter: Tensor) -> int:
    """Count the elements of a parameter, also of one in which two share a byte."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def _bitsandbytes() -> Any:
    check_installed()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")  # warns of a faster kernel that could be downloaded
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
