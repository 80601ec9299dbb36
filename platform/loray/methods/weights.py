"""An adapter's weights by layer and module.

Shapes: R rank, I input width, O output width, V rows of an embedding, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from loray.spec import MLP_MODULES, Method, RopeParameters

if TYPE_CHECKING:
    from torch import Tensor


class ModuleKey(NamedTuple):
    """One linear module of the base, as PEFT has it: `ModuleKey(3, "q_proj")`, and `qkv_proj` where that is one."""

    layer: int
    module: str

    @property
    def path(self) -> str:
        """The path below `model.`: "layers.3.self_attn.q_proj"."""
        is_mlp = self.module in MLP_MODULES or self.module == "gate_up_proj"
        return f"layers.{self.layer}.{'mlp' if is_mlp else 'self_attn'}.{self.module}"


MAGNITUDE = "lora_magnitude_vector"  # DoRA's, in PEFT's files
_CHUNK_ELEMENTS = 1 << 21  # of W in fp32 at a time
Role = Literal["lora_a", "summed_a", "lora_b", "dora", "scale", "turn", "vera_d", "vera_b", "norm", "embedding"]


class PoolRows(NamedTuple):
    """A matrix as rows of the pool.

    role    dora and scale are scales of a module's outputs, the latter with the base's bias; turn is what the other
            output of a pair adds, in factors of that; summed_a stands in the place of a lora_a of which only the shape
            (R, I) counts: row r sums the input's columns r, r + R, r + 2 R, …
    scale   of lora_b, LoRA's alpha/r; of turn, how many outputs apart the two of a pair are
    module  whose outputs it is for, where that is another than the one that the weights are stored with
    """

    role: Role
    tensor: Tensor
    scale: float = 1.0
    module: str | None = None


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
        """Convert to what computes the same on a module of `width` inputs; LoRA stays as it is. Raises UnsupportedError
        where it is no sum of the base's outputs and others.
        """

    def merged(self, weight_OI: Tensor, pair: SharedProjection | None) -> Tensor:
        """Compute in fp32 the matrix of a module with the adapter in it."""

    def merged_bias(self, bias_O: Tensor) -> Tensor:
        """Compute its bias."""


class AddedWeights:
    """Weights that add to the base's outputs, and are merged as the LoRA that computes the same."""

    __slots__ = ()

    def as_lora(self, pair: SharedProjection | None, width: int) -> LoraWeights:
        raise NotImplementedError

    def merged(self, weight_OI: Tensor, pair: SharedProjection | None) -> Tensor:
        return self.as_lora(pair, weight_OI.shape[1]).merged(weight_OI, None)

    def merged_bias(self, bias_O: Tensor) -> Tensor:
        return bias_O


@dataclass(frozen=True, slots=True)
class LoraWeights(AddedWeights):
    """y += scale · B (A x); scale is alpha/r, or alpha/√r for rsLoRA. With DoRA's magnitudes every output is scaled
    too.
    """

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None

    @property
    def method(self) -> Literal["lora", "dora"]:
        return "lora" if self.magnitude_O is None else "dora"

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    @property
    def parts(self) -> Mapping[str, Tensor]:
        found = {"lora_A.weight": self.a_RI, "lora_B.weight": self.b_OR}
        return found if self.magnitude_O is None else {**found, MAGNITUDE: self.magnitude_O}

    def shapes(self, out: int, width: int, pair: SharedProjection | None) -> Mapping[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"lora_A.weight": (self.rank, width), "lora_B.weight": (out, self.rank)}
        return found if self.magnitude_O is None else {**found, MAGNITUDE: (out,)}

    def rows(self) -> Iterator[PoolRows]:
        yield PoolRows("lora_a", self.a_RI)
        yield PoolRows("lora_b", self.b_OR.T, self.scale)
        if self.magnitude_O is not None:  # in the place of the scale, of which it has the shape
            yield PoolRows("dora", self.magnitude_O[None])

    def as_lora(self, pair: SharedProjection | None, width: int) -> LoraWeights:
        return self

    def merged(self, weight_OI: Tensor, pair: SharedProjection | None) -> Tensor:
        merged_OI = weight_OI.float() + self.scale * (self.b_OR.float() @ self.a_RI.float())
        if self.magnitude_O is not None:
            merged_OI *= self.output_scale(weight_OI)[:, None]
        return merged_OI

    def output_scale(self, weight_OI: Tensor) -> Tensor:
        """Compute DoRA's m / ‖W + s B A‖ (Liu et al., 2024), (O,) in fp32, with the norm over each output's inputs:
        y = scale ⊙ (W + s B A) x + bias. It is not finite where such a row is zero.
        """
        assert self.magnitude_O is not None
        norm_O = changed_norms(weight_OI, row_squares(weight_OI), self.a_RI, self.b_OR, self.scale)
        return self.magnitude_O.float() / norm_O


def row_squares(weight_OI: Tensor) -> Tensor:
    """Compute ‖W‖² of each row, (O,) in fp32."""
    import torch  # shapes and headers are read without it

    return torch.cat([w_OI.float().square().sum(dim=1) for w_OI in _rows_at_a_time(weight_OI)])


def changed_norms(weight_OI: Tensor, square_O: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Compute ‖W + s B A‖ of each row, (O,) in fp32, with its ‖W‖² and no matrix as large as W:

    ‖W + s B A‖² = ‖W‖² + 2 s Σ B ⊙ (W Aᵀ) + s² Σ B ⊙ (B A Aᵀ).
    """
    import torch  # shapes and headers are read without it

    a_RI, b_OR = a_RI.float(), b_OR.float()
    wa_OR = torch.cat([w_OI.float() @ a_RI.T for w_OI in _rows_at_a_time(weight_OI)])
    added_O = (b_OR * (2 * wa_OR + scale * (b_OR @ (a_RI @ a_RI.T)))).sum(dim=1)
    return (square_O + scale * added_O).clamp(min=0).sqrt()


def _rows_at_a_time(weight_OI: Tensor) -> tuple[Tensor, ...]:
    """Parts of W of which copies in fp32 take little memory."""
    import torch  # shapes and headers are read without it

    return torch.split(weight_OI, max(1, _CHUNK_ELEMENTS // weight_OI.shape[1]))


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
    invocation_tokens  of aLoRA, which is active from their last occurrence in a prompt on; None: from the start
    """

    modules: Mapping[ModuleKey, ModuleWeights]
    pair: SharedProjection | None = None
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    embedding: EmbeddingRows | None = None
    rope: RopeParameters | None = None
    context_length: int | None = None
    invocation_tokens: tuple[int, ...] | None = None

    @property
    def method(self) -> Method:
        """The method of the modules, of which LoRA and LongLoRA have the same; LoRA where there are none."""
        return next((module.method for module in self.modules.values()), "lora")
