"""LoRA of experts as PEFT stores it.

Models have the matrices of all of a layer's experts in two parameters, `mlp.experts.gate_up_proj` and
`mlp.experts.down_proj`, which PEFT adapts as `target_parameters`. Each has one A (E R, I), the rows of expert after
expert, and one B (O, R E), of each rank the columns of all experts. O of gate_up_proj is that of gate_proj and of
up_proj, one after the other, or by turns (gpt-oss). Older files have A and B of each module of each expert by itself.

Shapes: E experts, R rank of each, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loray.errors import UnsupportedError
from loray.methods.weights import AddedWeights, LoraWeights, PoolRows, SharedProjection
from loray.spec import MLP_MODULES, AdapterSpec

if TYPE_CHECKING:
    from torch import Tensor

EXPERTS = "mlp.experts"
# The parameters in the order in which PEFT wraps them, the first one innermost, with the modules that each holds.
PARAMETERS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True, slots=True)
class ExpertLoraWeights(AddedWeights):
    """LoRA of one module of all experts of a layer: y += scale · B (A x) with the expert's A and B.

    stored   its tensors by their names in PEFT's files, below the layer
    a, b     one of all experts, or one for each
    module   of the two that gate_up_proj holds, this one; they have A in common
    by_turns the outputs of these two
    """

    stored: Mapping[str, Tensor]
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    scale: float
    num_experts: int
    module: str
    by_turns: bool = False

    @property
    def method(self) -> Literal["lora"]:
        return "lora"

    @property
    def is_fused(self) -> bool:
        """The file has one A and one B of all experts."""
        return len(self.a) < self.num_experts or self.num_experts == 1

    @property
    def rank(self) -> int:
        return self.a[0].shape[0] * len(self.a) // self.num_experts

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return self.stored

    def shapes(self, out: int, width: int, pair: SharedProjection | None) -> Mapping[str, tuple[int, ...]]:
        rank = self.rank
        if self.is_fused:
            rank, out = rank * self.num_experts, out * len(_modules_beside(self.module))
        return {name: (rank, width) if ".lora_A." in name else (out, rank) for name in self.stored}

    def expert(self, number: int) -> LoraWeights:
        """Return the LoRA of one expert."""
        if not self.is_fused:
            return LoraWeights(self.a[number], self.b[number], self.scale)
        (a_AI,), (b_OA,), rank = self.a, self.b, self.rank
        beside = _modules_beside(self.module)
        own, at = b_OA.shape[0] // len(beside), beside.index(self.module)
        rows = slice(at, None, len(beside)) if self.by_turns else slice(at * own, (at + 1) * own)
        b_OR = b_OA[rows].reshape(own, rank, self.num_experts)[:, :, number]
        return LoraWeights(a_AI[number * rank : (number + 1) * rank], b_OR, self.scale)

    def rows(self) -> Iterator[PoolRows]:
        import torch  # shapes and headers are read without it

        experts = [self.expert(number) for number in range(self.num_experts)]
        if not (self.is_fused and self.module == "up_proj"):  # whose A is gate_proj's
            yield PoolRows("lora_a", torch.cat([expert.a_RI for expert in experts]))
        yield PoolRows("lora_b", torch.cat([expert.b_OR.T for expert in experts]), self.scale)

    def as_lora(self, pair: SharedProjection | None, width: int) -> LoraWeights:
        raise UnsupportedError("LoRA of experts is not converted: take it merged, or as it is stored")


def _modules_beside(module: str) -> tuple[str, ...]:
    """Return the modules of the parameter that holds `module`."""
    return next(modules for modules in PARAMETERS.values() if module in modules)


def wrapped(parameters: tuple[str, ...]) -> dict[str, str]:
    """Name the modules that PEFT wraps around a layer's experts by the parameter that each adapts, of `parameters`."""
    own = [name for name in PARAMETERS if name in parameters]
    return {EXPERTS + ".base_layer" * (len(own) - 1 - i): name for i, name in enumerate(own)}


def peft_targets(spec: AdapterSpec, model: Any) -> dict[str, list[str]]:
    """Make PEFT's options that say which modules of a transformers `model` are adapted, where these are experts; none
    where it has no experts, or they are not adapted.
    """
    own = [m for m in spec.target_modules if m in MLP_MODULES]
    if not own or not has_experts(model):
        return {}
    return {
        "target_modules": [m for m in spec.target_modules if m not in MLP_MODULES],
        "target_parameters": [f"{EXPERTS}.{name}" for name, modules in PARAMETERS.items() if {*modules} & {*own}],
    }


def has_experts(model: Any) -> bool:
    """Say whether a transformers model has experts in the place of MLPs, with an adapter or without."""
    return any(path.endswith(f".{EXPERTS}") for path, _ in model.named_modules())
