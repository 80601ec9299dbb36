"""The tables and weights that ops take; `reference` has the ops' equations.

The pool is one flat tensor. A row is given by the offset of its first element for layer 0; `layer_offset`
(layer × layer share) is added for other layers, and is 0 for rows without a layer. A row wider than a layer's share is
cut into several segments of columns. Every layer of a step passes the same tables, so a backend prepares them once.

A row of A that sums every `period`-th column from column `first` on is not in the pool: its offset is
~(period << 32 | first), which is negative, and kernels take both numbers from it. All rows of an adapter's A are of one
kind, and those that are summed have the `first` of their number and the period of the module's rank.

Shapes: T tokens of a step, S sequences, D hidden, I input width, O output width, H query heads, K key/value heads,
d head dimension, R adapter rows (ranks) of a batch, N adapters of a batch, B blocks, G groups of a row's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
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
class QuantizedWeight:
    """W ≈ scale · (q − zero), q in groups of neighbouring columns that share a scale.

    q_OI       int8 (O, I); int4 as uint8 (O, I/2), two columns a byte, the first in its lower half; or float8_e4m3fn
               (O, I)
    scale_OG   fp32 (O, G): G = 1 for a scale a row, or I / group
    zero_OG    fp32 (O, G); None: 0, and 8 for int4, whose q is 0 to 15
    """

    q_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None = None

    @property
    def is_int4(self) -> bool:
        return self.q_OI.dtype is torch.uint8

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), of the whole matrix."""
        rows, columns = self.q_OI.shape
        return rows, 2 * columns if self.is_int4 else columns

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scale_OG.shape[1]

    @property
    def kind(self) -> str:
        """Name its values and its scales in words: int8 by rows, int4 in groups of 128."""
        values = "int4" if self.is_int4 else str(self.q_OI.dtype).removeprefix("torch.")
        return f"{values} by rows" if self.scale_OG.shape[1] == 1 else f"{values} in groups of {self.group}"

    @property
    def nbytes(self) -> int:
        parts = (self.q_OI, self.scale_OG) if self.zero_OG is None else (self.q_OI, self.scale_OG, self.zero_OG)
        return sum(part.nbytes for part in parts)

    def values(self) -> Tensor:
        """q, (O, I); int4 as bytes from 0 to 15."""
        if not self.is_int4:
            return self.q_OI
        return torch.stack((self.q_OI & 15, self.q_OI >> 4), dim=-1).flatten(1)

    def zeros(self) -> Tensor:
        """zero, fp32 (O, G), also where it is not given."""
        if self.zero_OG is not None:
            return self.zero_OG
        return torch.full_like(self.scale_OG, 8 if self.is_int4 else 0)

    def dequantized(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Compute rows of W, (rows, I), in fp32, and round them to `dtype`."""
        part = self.rows(rows)
        q_RGg = part.values().float().reshape(len(part.q_OI), -1, self.group)
        return ((q_RGg - part.zeros().unsqueeze(-1)) * part.scale_OG.unsqueeze(-1)).flatten(1).to(dtype)

    @staticmethod
    def join(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Put matrices of one input side by side along O. ValueError unless they are quantised in one way."""
        if len(kinds := {part.kind for part in parts}) > 1:
            found = " and ".join(sorted(kinds))
            raise ValueError(f"modules that share an input must be quantised in one way, not as {found}")
        zeros = [part.zeros() for part in parts] if any(part.zero_OG is not None for part in parts) else None
        return QuantizedWeight(
            torch.cat([part.q_OI for part in parts]),
            torch.cat([part.scale_OG for part in parts]),
            None if zeros is None else torch.cat(zeros),
        )

    def rows(self, part: slice) -> QuantizedWeight:
        """Take rows, as views."""
        return self._each(lambda x, _: x[part])

    def columns(self, part: slice) -> QuantizedWeight:
        """Take columns, as views. ValueError where a group would be cut."""
        start, stop, _ = part.indices(self.shape[1])
        unit = (2 if self.is_int4 else 1) if self.scale_OG.shape[1] == 1 else self.group
        if start % unit or stop % unit:
            raise ValueError(f"columns {start} to {stop} of a weight quantised in groups of {unit} cut a group")

        def cut(x: Tensor, columns: int) -> Tensor:
            return x if columns == 1 else x[:, start * columns // self.shape[1] : stop * columns // self.shape[1]]

        return self._each(cut)

    def padded(self, rows: int) -> QuantizedWeight:
        """Add so many rows of zeros."""

        def pad(x: Tensor, _: int) -> Tensor:
            return torch.cat((x, torch.zeros(rows, x.shape[1], dtype=x.dtype, device=x.device)))

        return self._each(pad)

    def to(self, device: torch.device) -> QuantizedWeight:
        return self._each(lambda x, _: x.to(device))

    def clone(self) -> QuantizedWeight:
        return self._each(lambda x, _: x.clone())

    def _each(self, f: Callable[[Tensor, int], Tensor]) -> QuantizedWeight:
        """Apply `f` to each tensor and its number of columns."""
        q, scale, zero = (None if x is None else f(x, x.shape[1]) for x in (self.q_OI, self.scale_OG, self.zero_OG))
        assert q is not None
        assert scale is not None
        return QuantizedWeight(q, scale, zero)


Weight = Tensor | QuantizedWeight  # (O, I)


def join_weights(weights: Sequence[Weight]) -> Weight:
    """Put matrices of one input side by side along O. If only some are quantised, these are dequantised."""
    quantized = [w for w in weights if isinstance(w, QuantizedWeight)]
    if len(weights) == 1:
        return weights[0]
    if len(quantized) == len(weights):
        return QuantizedWeight.join(quantized)
    dtype = next(w.dtype for w in weights if isinstance(w, Tensor))
    return torch.cat([w.dequantized(slice(None), dtype) if isinstance(w, QuantizedWeight) else w for w in weights])


@dataclass(frozen=True, slots=True, eq=False)
class LinearWeights:
    """Matrices that share an input, side by side as their backend packed them: only that backend can read `data`.

    bits, group  of packed integers: of each, and how many columns share a scale
    scales_GO2   of packed integers whose scales and zeros are not in `data`
    """

    in_features: int
    out_features: int
    data: Weight
    bias_O: Tensor | None = None
    bits: int = 0
    group: int = 0
    scales_GO2: Tensor | None = None

    @property
    def are_integers(self) -> bool:
        if isinstance(self.data, QuantizedWeight):
            return not self.data.q_OI.dtype.is_floating_point
        return self.bits > 0


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights(Preparable):
    """The experts of a layer, each an MLP; gate and up are one matrix, side by side.

    router      has an output for each expert
    per_token   experts that a token passes: those with the largest logits of the router
    normalised  a token's shares of their results are a softmax over these logits; else over all
    limit       of gate and up, whose product is `clamped_mul`; None: it is `silu_mul`
    """

    router: LinearWeights
    gate_up: tuple[LinearWeights, ...]
    down: tuple[LinearWeights, ...]
    per_token: int
    normalised: bool
    limit: float | None = None

    @property
    def matrices(self) -> tuple[LinearWeights, ...]:
        return self.router, *self.gate_up, *self.down


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """Attention scores a query and a key with s = scale · q · k.

    window    tokens that a token attends to, itself included; blocks behind all windows are not read
    soft_cap  c: a score s is c · tanh(s / c)
    sinks_H   of each head the score of one more key, whose value is 0
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks_H: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights(Preparable):
    """A decoder layer of the Llama family. q, k and v are one matrix, side by side, and so are gate and up. Both of
    q_norm_d and k_norm_d are given or neither is, and so are both of the norms of results; `norm_offset` is of all
    norms. Where the layer has `experts`, gate_up and down are the first one's.
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
    scoring: Scoring
    norm_offset: float = 0.0
    activation: Activation = "silu"
    post_attention_norm_D: Tensor | None = None
    post_mlp_norm_D: Tensor | None = None
    experts: ExpertWeights | None = None

    @property
    def matrices(self) -> tuple[LinearWeights, ...]:
        experts = () if self.experts is None else self.experts.matrices
        return self.qkv, self.o, self.gate_up, self.down, *experts


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
