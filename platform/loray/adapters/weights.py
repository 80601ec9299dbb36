"""An adapter as data: the tensors of a published folder, by layer and module.

Shapes: R rank, I input width, O output width, V rows of an embedding, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from loray.spec import MLP_MODULES, RopeParameters

if TYPE_CHECKING:
    from torch import Tensor


class ModuleKey(NamedTuple):
    """One linear module of the base: `ModuleKey(3, "q_proj")`."""

    layer: int
    module: str

    @property
    def path(self) -> str:
        """Path below `model.`: "layers.3.self_attn.q_proj"."""
        return f"layers.{self.layer}.{'mlp' if self.module in MLP_MODULES else 'self_attn'}.{self.module}"


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """y += scale · B (A x); scale is alpha/r, or alpha/√r for rsLoRA."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class VeraWeights:
    """y += b ⊙ (B[:O] (d ⊙ (A[:, :I] x))) with the adapter's ProjectionPair."""

    d_R: Tensor
    b_O: Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class ProjectionPair:
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

    modules: Mapping[ModuleKey, LoraWeights | VeraWeights]
    pair: ProjectionPair | None = None
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    embedding: EmbeddingRows | None = None
    rope: RopeParameters | None = None
    context_length: int | None = None
