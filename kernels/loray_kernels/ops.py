"""The tables and weights that ops take; `reference` has the ops' equations.

The pool is one flat tensor. A row is given by the offset of its first element for layer 0; `layer_offset`
(layer × layer share) is added for other layers, and is 0 for rows without a layer. A row wider than a layer's share is
cut into several segments of columns. Every layer of a step passes the same tables, so a backend prepares them once.

A row of A that sums every `period`-th column from column `first` on is not in the pool: its offset is
~(period << 32 | first), which is negative, and kernels take both numbers from it. All rows of an adapter's A are of one
kind, and those that are summed have the `first` of their number and the period of the module's rank.

Shapes: T tokens of a step, S sequences, D hidden, I input width, O output width, H query heads, K key/value heads,
d head dimension, R adapter rows (ranks) of a batch, N adapters of a batch, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor

from loray_kernels.descriptors import RowOverrides, RowTables
from loray_kernels.kv import AttentionMeta, KvLayout
from loray_kernels.prepare import Preparable


@dataclass(frozen=True, slots=True)
class LoraTable(Preparable):
    """LoRA of one module for every adapter of the batch; adapter n has rows rank_start[n]:rank_start[n+1].

    An adapter without this module has an empty range. Ranks are not padded.
    """

    a: RowTables
    b: RowTables
    rank_start: tuple[int, ...]
    scale: tuple[float, ...]

    @property
    def ranks(self) -> list[int]:
        """The rank of each adapter; 0 for one without this module."""
        return [stop - start for start, stop in pairwise(self.rank_start)]

    @property
    def max_rank(self) -> int:
        return max(self.ranks, default=0)


@dataclass(frozen=True, slots=True, eq=False)
class ProjectionMatrix(Preparable):
    """A (R, I) or B (O, R) of a VeRA pair, or a part of one. Every layer of every step passes the same object."""

    data: Tensor

    def rows(self, start: int, stop: int) -> ProjectionMatrix:
        return self._part("rows", slice(start, stop), slice(None))

    def columns(self, start: int, stop: int) -> ProjectionMatrix:
        return self._part("columns", slice(None), slice(start, stop))

    def _part(self, what: str, rows: slice, columns: slice) -> ProjectionMatrix:
        key = (what, rows.start, rows.stop, columns.start, columns.stop)
        part: ProjectionMatrix | None = self.prepared.get(key)
        if part is None:
            part = self.prepared[key] = ProjectionMatrix(self.data[rows, columns])
        return part


@dataclass(frozen=True, slots=True)
class VeraTable:
    """VeRA of one module for tokens [start, stop), which share a pair; d and b have one row for each token."""

    a_RI: ProjectionMatrix
    b_OR: ProjectionMatrix
    d: RowTables
    b: RowTables
    start: int
    stop: int


class Turn(NamedTuple):
    """RoAd's: rows of the factors with which each output's partner is added. `distance_N` of each token says how far
    apart the two are, see `turn_rows`.
    """

    rows: RowTables
    distance_N: Tensor


@dataclass(frozen=True, slots=True)
class ScaleTable:
    """Scales of a module's outputs for some tokens, each with a row of scales less one.

    leaves_bias  the base's bias is not scaled (DoRA); else it is (IA³)
    turn         of outputs that are turned in pairs
    """

    own: RowOverrides
    leaves_bias: bool = False
    turn: Turn | None = None


@dataclass(frozen=True, slots=True)
class AdapterSegments(Preparable):
    """The tokens of one adapter are neighbours: adapter n has tokens start[n]:stop[n]."""

    start: tuple[int, ...]
    stop: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerTables(Preparable):
    """The adapters of a batch in one layer, or, in the flat tables, outside of the layers; by module."""

    lora: Mapping[str, LoraTable]
    vera: Mapping[str, Sequence[VeraTable]]
    norms: Mapping[str, RowOverrides]
    scales: Mapping[str, Sequence[ScaleTable]] = field(default_factory=dict)


Activation = Literal["silu", "gelu_tanh"]
TablesOf = Callable[[int], LayerTables]  # of a layer, by its number


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeights:
    """A matrix in the layout of its backend, which only that backend can read."""

    in_features: int
    out_features: int
    data: Tensor
    bias_O: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights(Preparable):
    """A decoder layer of the Llama family. q, k and v are one matrix, side by side, and so are gate and up. Both of
    q_norm_d and k_norm_d are given or neither is, and so are both of the norms of results; `scale`, `window` and
    `soft_cap` are attention's, see `paged_attention`, and `norm_offset` is of all norms.
    """

    attention_norm_D: Tensor
    qkv: LinearWeights
    q_norm_d: Tensor | None
    k_norm_d: Tensor | None
    o: LinearWeights
    mlp_norm_D: Tensor
    gate_up: LinearWeights
    down: LinearWeights
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    scale: float
    norm_offset: float = 0.0
    window: int | None = None
    soft_cap: float | None = None
    activation: Activation = "silu"
    post_attention_norm_D: Tensor | None = None
    post_mlp_norm_D: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs(Preparable):
    """The arguments that all layers of a step with the same RoPE share. cos and sin are as wide as what is rotated of a
    head.
    """

    pool: Tensor
    layout: KvLayout
    attention: AttentionMeta
    segments: AdapterSegments
    cos_Td: Tensor
    sin_Td: Tensor
