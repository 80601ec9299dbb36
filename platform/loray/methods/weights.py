"""An adapter's weights by layer and module.

Shapes: R rank, I input width, V rows of an embedding, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from loray.spec import MLP_MODULES, Method, RopeParameters

if TYPE_CHECKING:
    from torch import Tensor

    from loray.methods.lora import LoraWeights


class ModuleKey(NamedTuple):
    """One linear module of the base: `ModuleKey(3, "q_proj")`."""

    layer: int
    module: str

    @property
    def path(self) -> str:
        """The path below `model.`: "layers.3.self_attn.q_proj"."""
        return f"layers.{self.layer}.{'mlp' if self.module in MLP_MODULES else 'self_attn'}.{self.module}"


Role = Literal["lora_a", "lora_b", "dora", "vera_d", "vera_b", "norm", "embedding"]


class PoolRows(NamedTuple):
    """A matrix as rows of the pool. `scale` is LoRA's alpha/r; only lora_b has it."""

    role: Role
    tensor: Tensor
    scale: float = 1.0


class ModuleWeights(Protocol):
    """An adapter's tensors of one linear module. Each method has a class of them beside it.

    parts  by the names that PEFT's files have below the module's path
    """

    @property
    def method(self) -> Method: ...
    @property
    def rank(self) -> int: ...
    @property
    def parts(self) -> Mapping[str, Tensor]: ...
    def shapes(self, out: int, width: int, pair: SharedProjection | None) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes that `parts` must have on a module of `out` outputs and `width` inputs."""

    def rows(self) -> Iterator[PoolRows]: ...
    def as_lora(self, pair: SharedProjection | None, width: int) -> LoraWeights:
        """Convert to what computes the same on a module of `width` inputs; LoRA stays as it is."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class SharedProjection:
    """VeRA's frozen pair, fp32: A (R, max_in), B (max_out, R). `digest` is the SHA-256 of both."""

    a_RI: Tensor
    b_OR: Tensor
    digest: str

    @property
    def nbytes(self) -> int:
        return self.a_RI.nbytes + self.b_OR.nbytes


@dataclass(frozen=True, slots=True)
class EmbeddingRows:
    """Input embedding rows that replace the base's. `token_ids` None: all of them, in order."""

    token_ids: tuple[int, ...] | None
    rows_VD: Tensor


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """All weights of one adapter.

    norms  replacement RMSNorm weights by path below `model.`: "layers.3.input_layernorm", "norm"
    rope   None: the base's RoPE
    """

    modules: Mapping[ModuleKey, ModuleWeights]
    pair: SharedProjection | None = None
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    embedding: EmbeddingRows | None = None
    rope: RopeParameters | None = None
    context_length: int | None = None

    @property
    def method(self) -> Method:
        """The method of the modules, of which LoRA and LongLoRA have the same; LoRA where there are none."""
        return next((module.method for module in self.modules.values()), "lora")
