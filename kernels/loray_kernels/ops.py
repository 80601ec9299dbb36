"""`Ops`, the protocol of backends: the equations of the ops, and the tables and weights that they take.

The pool is one flat tensor. A row is given by the offset of its first element for layer 0; `layer_offset`
(layer × layer share) is added for other layers, and is 0 for rows without a layer. A row wider than a layer's share is
cut into several segments of columns. Every layer of a step passes the same tables, so a backend prepares them once.

Shapes: T tokens of a step, S sequences, D hidden, I input width, O output width, H query heads, K key/value heads,
d head dimension, R adapter rows (ranks) of a batch, N adapters of a batch, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from loray_kernels.decode import CapturedDecoding, CapturedStep, Decoding, StepDescriptors
from loray_kernels.descriptors import RowOverrides, RowTables
from loray_kernels.kv import AttentionMeta, KvLayout, PageWriter
from loray_kernels.prepare import Preparable
from loray_kernels.sampling import Chooser, Drawn, Draws, TokenSlots


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
    dora: Mapping[str, RowOverrides] = field(default_factory=dict)


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
    q_norm_d and k_norm_d are given or neither is; `scale` is attention's.
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


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs(Preparable):
    """The arguments that all layers of a step share."""

    pool: Tensor
    layout: KvLayout
    attention: AttentionMeta
    segments: AdapterSegments
    cos_Td: Tensor
    sin_Td: Tensor


class Ops(Protocol):
    """The ops of one backend. Intermediates are fp32, and values are rounded where the reference rounds them."""

    def page_writer(self, pool: Tensor) -> PageWriter:
        """Give what writes adapters from host memory into `pool`."""
        ...

    def captured_decoding(
        self, forward: Callable[[CapturedStep], Tensor], decoding: Decoding
    ) -> CapturedDecoding | None:
        """Give what captures `forward`, when it is told to, and replays it; None if this backend captures nothing.

        The launches of `forward` must not depend on a step's values. It gives a row for each sequence.
        """
        ...

    def decoder_layers(
        self, x_TD: Tensor, weights: Sequence[LayerWeights], tables: TablesOf, step: StepInputs, first: int
    ) -> Tensor | None:
        """Compute the layers from `first` on in one call, with the bits of their ops; None if there is no such call.

        May write `x_TD`.
        """
        ...

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearWeights:
        """Put the matrix into the layout that `linear` and `logits` read; the original may be freed."""
        ...

    def linear(self, x_TI: Tensor, weights: LinearWeights) -> Tensor:
        """y = x Wᵀ + bias, (T, O)."""
        ...

    def logits(self, x_TD: Tensor, weights: LinearWeights) -> Tensor:
        """Give the results of `linear`, which are rounded to x's dtype, in fp32."""
        ...

    def sample(self, logits_SV: Tensor, draws: Draws, slots: TokenSlots | None = None) -> Drawn:
        """Draw a token for each of the draws' rows, also into `slots`; it is read before the call after the next."""
        ...

    def chooser(self, logits_SV: Tensor) -> Chooser | None:
        """Give what chooses tokens of all rows of logits like these, whatever requests change; None if the backend has
        none.
        """
        ...

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        """silu(gate) · up, (T, M), from (T, 2 M) with gate first."""
        ...

    def embed(self, table_VD: Tensor, token_ids_T: Tensor, pool: Tensor, own: RowOverrides | None) -> Tensor:
        """x_TD: rows of `table_VD`; for the tokens of `own` their rows, where offsets are not negative."""
        ...

    def rms_norm(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, pool: Tensor, own: RowOverrides | None, layer_offset: int
    ) -> Tensor:
        """x / rms(x) · weight, rms in fp32; the weight of the tokens of `own` is their row, where offsets are not
        negative. Also for (T, heads, d).
        """
        ...

    def add_rms_norm(
        self,
        x_TD: Tensor,
        added_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        pool: Tensor,
        own: RowOverrides | None,
        layer_offset: int,
    ) -> tuple[Tensor, Tensor]:
        """x + added, and the `rms_norm` of that."""
        ...

    def rope_kv(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, step: StepInputs, layer: int) -> Tensor:
        """Queries with their halves rotated: x · cos + (−x₂, x₁) · sin. Writes the pool: keys, rotated, and values at
        the step's slots.
        """
        ...

    def paged_attention(
        self, q_THd: Tensor, pool: Tensor, layout: KvLayout, layer: int, meta: AttentionMeta, scale: float
    ) -> Tensor:
        """Causal attention of each sequence's last tokens over its cache; (T, H, d)."""
        ...

    def lora_shrink(
        self, x_TI: Tensor, pool: Tensor, tables: tuple[LoraTable, ...], segments: AdapterSegments, layer_offset: int
    ) -> tuple[Tensor, ...]:
        """h = A x in fp32, one (T, max rank) for each table, in one launch: all tables share the input."""
        ...

    def lora_expand(
        self,
        outputs: tuple[Tensor, ...],
        h: tuple[Tensor, ...],
        pool: Tensor,
        tables: tuple[LoraTable, ...],
        segments: AdapterSegments,
        layer_offset: int,
    ) -> None:
        """y += scale · B h for each (y, h, table), accumulated in fp32, in one launch. Writes `outputs`."""
        ...

    def add_adapters(
        self,
        x_TI: Tensor,
        y_TO: Tensor,
        bias_O: Tensor | None,
        pool: Tensor,
        descriptors: StepDescriptors,
        field: int,
        layer_offset: int,
    ) -> None:
        """Add what the descriptors have at `field`, which is layer × inputs + the input: LoRA's rows as `lora_shrink`
        and `lora_expand` do, then VeRA's vectors as `vera_shrink` and `vera_expand`, then DoRA's scales as
        `scale_rows`; of these the step's parts. `y_TO`, which is written, has the input's modules side by side.
        """
        ...

    def vera_shrink(self, x_TI: Tensor, a_RI: ProjectionMatrix) -> Tensor:
        """z = A[:, :I] x in fp32, (T, R); dense, for all adapters of the pair and all modules of the input."""
        ...

    def vera_expand(self, y_TO: Tensor, z_TR: Tensor, pool: Tensor, table: VeraTable, layer_offset: int) -> None:
        """y[start:stop] += b ⊙ (B[:O] (d ⊙ z)) with each token's d and b, and d ⊙ z in y's dtype. Writes `y_TO`."""
        ...

    def scale_rows(
        self, y_TO: Tensor, bias_O: Tensor | None, pool: Tensor, own: RowOverrides, layer_offset: int
    ) -> None:
        """DoRA: y += row ⊙ (y − bias) for the tokens of `own`, whose rows are the scale less one. Writes `y_TO`."""
        ...
