"""An adapter's weights by layer and module.

Shapes: R rank, I input width, O output width, V rows of an embedding, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from loray.spec import MLP_MODULES, RopeParameters

if TYPE_CHECKING:
    from torch import Tensor


_CHUNK_ELEMENTS = 1 << 23  # of W + s B A in fp32 at a time


class ModuleKey(NamedTuple):
    """One linear module of the base: `ModuleKey(3, "q_proj")`."""

    layer: int
    module: str

    @property
    def path(self) -> str:
        """The path below `model.`: "layers.3.self_attn.q_proj"."""
        return f"layers.{self.layer}.{'mlp' if self.module in MLP_MODULES else 'self_attn'}.{self.module}"


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """y += scale · B (A x); scale is alpha/r, or alpha/√r for rsLoRA. With DoRA's magnitudes every output is scaled
    too.
    """

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None

    def output_scale(self, weight_OI: Tensor) -> Tensor:
        """Compute DoRA's m / ‖W + s B A‖ (Liu et al., 2024), (O,) in fp32, with the norm over each output's inputs:
        y = scale ⊙ (W + s B A) x + bias. It is not finite where such a row is zero.
        """
        import torch  # shapes and headers are read without it

        assert self.magnitude_O is not None
        a_RI, rows = self.a_RI.float(), max(1, _CHUNK_ELEMENTS // weight_OI.shape[1])
        chunks = zip(torch.split(weight_OI, rows), torch.split(self.b_OR, rows), strict=True)
        sums = (torch.addmm(w_OI.float(), b_OR.float(), a_RI, alpha=self.scale) for w_OI, b_OR in chunks)
        return self.magnitude_O.float() / torch.cat([torch.linalg.vector_norm(sum_OI, dim=1) for sum_OI in sums])


@dataclass(frozen=True, slots=True)
class VeraWeights:
    """y += b ⊙ (B[:O] (d ⊙ (A[:, :I] x))) with the adapter's SharedProjection."""

    d_R: Tensor
    b_O: Tensor


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

    modules: Mapping[ModuleKey, LoraWeights | VeraWeights]
    pair: SharedProjection | None = None
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    embedding: EmbeddingRows | None = None
    rope: RopeParameters | None = None
    context_length: int | None = None

    @property
    def has_magnitudes(self) -> bool:
        """True for DoRA."""
        return any(isinstance(m, LoraWeights) and m.magnitude_O is not None for m in self.modules.values())
