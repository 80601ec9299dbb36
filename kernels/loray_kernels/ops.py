"""The set of ops. `arguments` has what they are given beside tensors.

Shapes: T tokens of a step, S sequences, D hidden, I input width, O output width, H query heads, K key/value heads,
d head dimension, R adapter rows (ranks) of a batch, N adapters of a batch, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from loray_kernels.arguments import (
    LayerWeights,
    LinearWeights,
    LoraTable,
    PairMatrix,
    Segments,
    StepInputs,
    TablesOf,
    VeraTable,
)
from loray_kernels.decoding import Decoding, RecordedDecoding, RecordedStep, StepRecords
from loray_kernels.kv import AttentionMeta, KvLayout
from loray_kernels.pages import PageWriter
from loray_kernels.sampling.choosing import Chooser
from loray_kernels.sampling.draws import Drawn, Draws, TokenSeats
from loray_kernels.vectors import TokenRows


class Ops(Protocol):
    """In every backend intermediates are fp32, and values are rounded where the reference rounds them."""

    def page_writer(self, pool: Tensor) -> PageWriter:
        """Writes adapters from host memory into `pool`."""
        ...

    def recorded(self, forward: Callable[[RecordedStep], Tensor], decoding: Decoding) -> RecordedDecoding | None:
        """Records `forward`, whose launches must not depend on a step's values, when it is told to, and replays it. It
        gives a row for each sequence. None if this backend does not record.
        """
        ...

    def decoder_layers(
        self, x_TD: Tensor, weights: Sequence[LayerWeights], tables: TablesOf, step: StepInputs, first: int
    ) -> Tensor | None:
        """Layers from `first` on in one call, with the bits of their ops; may write `x_TD`. None if there is none."""
        ...

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearWeights:
        """The matrix in the layout that `linear` and `logits` read; the original may be freed."""
        ...

    def linear(self, x_TI: Tensor, weights: LinearWeights) -> Tensor:
        """y = x Wᵀ + bias, (T, O)."""
        ...

    def logits(self, x_TD: Tensor, weights: LinearWeights) -> Tensor:
        """The results of `linear`, which are rounded to x's dtype, in fp32."""
        ...

    def sample(self, logits_SV: Tensor, draws: Draws, seats: TokenSeats | None = None) -> Drawn:
        """A token for each of the draws' rows, also for `seats`; it is read before the call after the next one."""
        ...

    def chooser(self, logits_SV: Tensor) -> Chooser | None:
        """For logits like these: chooses tokens of all rows, whatever requests change. None if the backend has none."""
        ...

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        """silu(gate) · up, (T, M), from (T, 2 M) with gate first."""
        ...

    def embed(self, table_VD: Tensor, token_ids_T: Tensor, pool: Tensor, own: TokenRows | None) -> Tensor:
        """x_TD: rows of `table_VD`; for the tokens of `own` their rows, where offsets are not negative."""
        ...

    def rms_norm(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, pool: Tensor, own: TokenRows | None, layer_offset: int
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
        own: TokenRows | None,
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
        self, x_TI: Tensor, pool: Tensor, tables: tuple[LoraTable, ...], segments: Segments, layer_offset: int
    ) -> tuple[Tensor, ...]:
        """h = A x in fp32, one (T, max rank) for each table, in one launch: all tables share the input."""
        ...

    def lora_expand(
        self,
        outputs: tuple[Tensor, ...],
        h: tuple[Tensor, ...],
        pool: Tensor,
        tables: tuple[LoraTable, ...],
        segments: Segments,
        layer_offset: int,
    ) -> None:
        """y += scale · B h for each (y, h, table), accumulated in fp32, in one launch. Writes `outputs`."""
        ...

    def lora_of_records(
        self,
        x_TI: Tensor,
        outputs: tuple[Tensor, ...],
        pool: Tensor,
        records: StepRecords,
        field: int,
        layer_offset: int,
    ) -> None:
        """`lora_shrink` and `lora_expand` with the rows that the records have at `field`, which is layer × inputs + the
        input. Writes `outputs`.
        """
        ...

    def vera_of_records(
        self,
        x_TI: Tensor,
        y_TO: Tensor,
        pool: Tensor,
        records: StepRecords,
        field: int,
        layer_offset: int,
    ) -> None:
        """`vera_shrink` and `vera_expand` with the vectors that the records have for `field`'s layer and input, whose
        modules `y_TO` has side by side. Writes `y_TO`.
        """
        ...

    def scale_of_records(
        self, y_TO: Tensor, bias_O: Tensor | None, pool: Tensor, records: StepRecords, field: int, layer_offset: int
    ) -> None:
        """`scale_rows` in the same way, for all modules of the input."""
        ...

    def vera_shrink(self, x_TI: Tensor, a_RI: PairMatrix) -> Tensor:
        """z = A[:, :I] x in fp32, (T, R); dense, for all adapters of the pair and all modules of the input."""
        ...

    def vera_expand(self, y_TO: Tensor, z_TR: Tensor, pool: Tensor, table: VeraTable, layer_offset: int) -> None:
        """y[start:stop] += b ⊙ (B[:O] (d ⊙ z)) with each token's d and b, and d ⊙ z in y's dtype. Writes `y_TO`."""
        ...

    def scale_rows(self, y_TO: Tensor, bias_O: Tensor | None, pool: Tensor, own: TokenRows, layer_offset: int) -> None:
        """DoRA: y += row ⊙ (y − bias) for the tokens of `own`, whose rows are the scale less one. Writes `y_TO`."""
        ...
