"""DoRA as a torch module: what serving computes, with norms in fp32.

Trained beside A and B is the change of the magnitudes, which begins at zero, so that it can be of the base's dtype:
what a step changes of a norm is less than 16 bits hold. PEFT rounds the norms to the base's dtype in each step, and
multiplies a unit matrix with A and B; served norms are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loray.bases.quantized import dequantized, is_quantized
from loray.methods.lora_module import replace_linears
from loray.methods.weights import MAGNITUDE, changed_norms, row_squares
from loray.spec import DoraSpec


class DoraLinear(nn.Module):
    """A linear module with DoRA: y = m ⊙ (W + s B A) x / ‖W + s B A‖ + bias with m = ‖W‖ + the trained change.

    The norm is a constant of the gradient (section 4.3 of the paper). With dropout, A alone has a part of the input.
    """

    def __init__(self, base_layer: nn.Linear, spec: DoraSpec) -> None:
        super().__init__()
        weight: Any = base_layer.weight
        dtype = base_layer.compute_dtype if is_quantized(weight) else weight.dtype
        like: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        self.base_layer = base_layer
        self.dropout = nn.Dropout(spec.dropout)
        self.scale = spec.scale
        # Drawn in fp32 and in the order in which PEFT does, so that A begins with the same numbers.
        self.lora_A = nn.Linear(base_layer.in_features, spec.rank, bias=False)
        self.lora_B = nn.Linear(spec.rank, base_layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.lora_A.to(**like)
        self.lora_B.to(**like)
        self.lora_magnitude_change = nn.Parameter(torch.zeros(base_layer.out_features, **like))
        self.initial_square_O: Tensor
        square_O = torch.zeros(base_layer.out_features, dtype=torch.float32, device=weight.device)
        self.register_buffer("initial_square_O", square_O)

    def begin(self, weight_OI: Tensor) -> None:
        """Take the norms of the base's rows."""
        self.initial_square_O.copy_(row_squares(weight_OI))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        y = y + self.scale * self.lora_B(self.lora_A(self.dropout(x)))
        bias, excess = self.base_layer.bias, self.excess_scale().to(y.dtype).float()
        plain = y.float() if bias is None else y.float() - bias.float()
        return (y.float() + excess * plain).to(y.dtype)

    def excess_scale(self) -> Tensor:
        """Compute m / ‖W + s B A‖ − 1, (O,) in fp32."""
        with torch.no_grad():
            a_RI, b_OR = self.lora_A.weight, self.lora_B.weight
            norm_O = changed_norms(dequantized(self.base_layer), self.initial_square_O, a_RI, b_OR, self.scale)
        return (self.initial_square_O.sqrt() + self.lora_magnitude_change.float()) / norm_O - 1

    @property
    def reads(self) -> tuple[Tensor, ...]:
        """The parameters of modules inside this one that it reads itself, which a strategy must gather for it."""
        return self.base_layer.weight, self.lora_A.weight, self.lora_B.weight

    def published(self, change_O: Tensor) -> Tensor:
        """Make the magnitudes, fp32, of their trained change."""
        return _magnitude(self.initial_square_O, change_O)

    def own_parts(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is trained, by name, of a published module's parts."""
        change_O = parts[MAGNITUDE].float() - self.initial_square_O.sqrt()
        return {name: part for name, part in parts.items() if name != MAGNITUDE} | {"lora_magnitude_change": change_O}


def inject_dora(model: nn.Module, spec: DoraSpec) -> None:
    """Put a DoraLinear into every target module of `model`, and freeze all other parameters."""
    replace_linears(model, spec.target_modules, lambda module: DoraLinear(module, spec))


def published_magnitudes(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy `tensors`, the trained ones by PEFT's names, with magnitudes in the place of their changes."""
    found = dict(tensors)
    for path, module in model.named_modules():
        if (change_O := found.pop(f"{path}.lora_magnitude_change", None)) is not None:
            found[f"{path}.{MAGNITUDE}"] = _magnitude(module.initial_square_O, change_O.detach())
    return found


def _magnitude(initial_square_O: Tensor, change_O: Tensor) -> Tensor:
    return initial_square_O.sqrt().to(change_O.device) + change_O.float()
