"""The ops on an NVIDIA GPU: gathers in CUDA C++ for few tokens of an adapter, Triton tiles for many, cuBLAS linears.

An adapter's tokens are gathered if it has fewer than `tables.GATHER_BELOW` of them in the step; a mixed batch is two
launches over disjoint tokens. Attention is divided in the same way, into sequences with one query and sequences with
several. Both paths keep the r-wide intermediate in fp32, but add in different orders. So an adapter's results may
differ in the last bits between steps in which it has few tokens and steps in which it has many; the results of the base
and of other adapters do not.

Each call with mixed dtypes, or with heads whose width is no multiple of 8 or above 256, goes to the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from loray_kernels.cuda.flash import FlashPrompts
from loray_kernels.cuda.graphs import DecodeGraphs, GraphCapturer
from loray_kernels.cuda.kernels import MAX_HEAD_DIM, AttentionWork, Gather
from loray_kernels.cuda.launch import SUFFIX
from loray_kernels.cuda.sampling import MAX_VOCAB, Choosing, Sampling
from loray_kernels.cuda.tables import (
    MAX_MODULES,
    pack_attention,
    pack_expand,
    pack_inputs,
    pack_rows,
    pack_shrink,
    pack_spans,
    pack_token_rows,
    pack_vectors,
)
from loray_kernels.cuda.upload import PageUploader
from loray_kernels.decode import CapturedDecoding, CapturedStep, Decoding, Parts, StepDescriptors
from loray_kernels.descriptors import INPUTS, MAX_PAIR_RANK, MAX_ROWS, RowOverrides, side_by_side, token_rows
from loray_kernels.kv import AttentionMeta, KvLayout, PageWriter
from loray_kernels.ops import AdapterSegments, LoraTable, ProjectionMatrix, StepInputs, VeraTable
from loray_kernels.reference import ReferenceOps
from loray_kernels.sampling import Chooser, Drawn, Draws, TokenSlots

if TYPE_CHECKING:  # it imports Triton, which tests of the gathers do not need
    from loray_kernels.cuda.triton_launch import Tiles


class CudaOps(ReferenceOps):
    """`linear` and `logits` are the reference's: torch's, which is cuBLAS here."""

    def __init__(self, gather: Gather, tiles: Tiles, flash: FlashPrompts | None = None) -> None:
        self._gather, self._tiles, self._flash = gather, tiles, flash
        self._sampling: Sampling | None = None

    def page_writer(self, pool: Tensor) -> PageWriter:
        return PageUploader(self._gather, pool) if pool.is_cuda else super().page_writer(pool)

    def captured_decoding(
        self, forward: Callable[[CapturedStep], Tensor], decoding: Decoding
    ) -> CapturedDecoding | None:
        # Attention that goes to the reference cannot be captured: its launches depend on a step's values.
        if decoding.device.type != "cuda" or not _attends(decoding.layout.head_dim):
            return None
        return DecodeGraphs(forward, decoding, GraphCapturer(decoding.device, decoding.ranks))

    def sample(self, logits_SV: Tensor, draws: Draws, slots: TokenSlots | None = None) -> Drawn:
        if not _samples(logits_SV):
            return super().sample(logits_SV, draws, slots)
        if self._sampling is None:
            self._sampling = Sampling(self._gather.launch, logits_SV.device)
        return self._sampling(logits_SV, draws, slots)

    def chooser(self, logits_SV: Tensor) -> Chooser | None:
        return Choosing(self._gather.launch, logits_SV.device) if _samples(logits_SV) else None

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        if gate_up_TM.dtype not in SUFFIX or gate_up_TM.stride(-1) != 1:
            return super().silu_mul(gate_up_TM)
        y_TM = gate_up_TM.new_empty(gate_up_TM.shape[0], gate_up_TM.shape[1] // 2)
        self._gather.silu_mul(gate_up_TM, y_TM)
        return y_TM

    def embed(self, table_VD: Tensor, token_ids_T: Tensor, pool: Tensor, own: RowOverrides | None) -> Tensor:
        if own is None or not _one_dtype(pool, table_VD):
            return super().embed(table_VD, token_ids_T, pool, own)
        x_TD = F.embedding(token_ids_T, table_VD)
        rows = pack_rows(own.rows)
        assert rows.width == x_TD.shape[1]
        assert rows.num == own.tokens_N.shape[0]
        self._gather.take_rows(x_TD, own.tokens_N.contiguous(), pool, rows)
        return x_TD

    def rms_norm(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, pool: Tensor, own: RowOverrides | None, layer_offset: int
    ) -> Tensor:
        if not _one_dtype(pool, x_TD, weight_D):
            return super().rms_norm(x_TD, weight_D, eps, pool, own, layer_offset)
        return self._norm(x_TD, None, weight_D, eps, pool, own, layer_offset)[1]

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
        if not _one_dtype(pool, x_TD, added_TD, weight_D):
            return super().add_rms_norm(x_TD, added_TD, weight_D, eps, pool, own, layer_offset)
        return self._norm(x_TD, added_TD, weight_D, eps, pool, own, layer_offset)

    def _norm(
        self,
        x_TD: Tensor,
        added_TD: Tensor | None,
        weight_D: Tensor,
        eps: float,
        pool: Tensor,
        own: RowOverrides | None,
        layer_offset: int,
    ) -> tuple[Tensor, Tensor]:
        """x + added, or x, and its norm."""
        x_TD, rows, sums = token_rows(x_TD), None, None
        y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        if added_TD is not None:
            sums = (token_rows(added_TD), torch.empty_like(y_TD))
        if own is not None:
            rows = (pack_token_rows(own, x_TD.shape[0]), pack_rows(own.rows))
            assert rows[0].shape[0] == x_TD.shape[0]
            assert rows[1].width == x_TD.shape[-1]
        self._gather.rms_norm(x_TD, sums, weight_D.contiguous(), eps, y_TD, pool[layer_offset:], rows)
        return x_TD if sums is None else sums[1], y_TD

    def rope_kv(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, step: StepInputs, layer: int) -> Tensor:
        pool, layout = step.pool, step.layout
        if not _one_dtype(pool, q_THd, k_TKd, v_TKd, step.cos_Td, step.sin_Td):
            return super().rope_kv(q_THd, k_TKd, v_TKd, step, layer)
        q_THd, k_TKd, v_TKd = token_rows(q_THd), token_rows(k_TKd), token_rows(v_TKd)
        tables = step.cos_Td.contiguous(), step.sin_Td.contiguous()
        num_tokens, _, d = q_THd.shape
        assert d % 2 == 0
        assert k_TKd.shape == v_TKd.shape == (num_tokens, layout.num_kv_heads, d)
        assert tables[0].shape == tables[1].shape == (num_tokens, d)
        assert step.attention.slot_mapping_T.shape == (num_tokens,)
        y_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        cache, slot_mapping_T = pool[layer * layout.layer_share :], step.attention.slot_mapping_T.contiguous()
        self._gather.rope_kv(q_THd, y_THd, k_TKd, v_TKd, tables, cache, layout, slot_mapping_T)
        return y_THd

    def paged_attention(
        self, q_THd: Tensor, pool: Tensor, layout: KvLayout, layer: int, meta: AttentionMeta, scale: float
    ) -> Tensor:
        d = layout.head_dim
        if not _one_dtype(pool, q_THd) or not _attends(d):
            return super().paged_attention(q_THd, pool, layout, layer, meta, scale)
        q_THd = token_rows(q_THd)
        assert q_THd.shape[1] % layout.num_kv_heads == 0
        assert q_THd.shape[2] == d
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        packed, cache = pack_attention(meta, layout), pool[layer * layout.layer_share :]
        if packed.decoded.num:
            work: AttentionWork | None = meta.prepared.get(AttentionWork)
            if work is None:
                work = meta.prepared[AttentionWork] = self._gather.plan_attention(packed, q_THd.shape[1], layout)
            self._gather.attention(q_THd, out_THd, cache, layout, packed, work, scale)
        if packed.prefilled.num and not (self._flash and self._flash(q_THd, out_THd, pool, layout, layer, meta, scale)):
            self._tiles.attention(q_THd, out_THd, cache, layout, packed, scale)
        return out_THd

    def lora_shrink(
        self, x_TI: Tensor, pool: Tensor, tables: tuple[LoraTable, ...], segments: AdapterSegments, layer_offset: int
    ) -> tuple[Tensor, ...]:
        if not _one_dtype(pool, x_TI):
            return super().lora_shrink(x_TI, pool, tables, segments, layer_offset)
        x_TI, spans, packed = token_rows(x_TI), pack_spans(segments, x_TI.device), pack_shrink(tables)
        assert packed.rows.width == x_TI.shape[1]
        assert spans.last_token <= x_TI.shape[0]
        # Zeros for tokens without an adapter and beyond an adapter's rank, as in the reference.
        h_TR = torch.zeros(x_TI.shape[0], sum(packed.widths), device=x_TI.device)
        if packed.max_rows:
            layer = pool[layer_offset:]
            if spans.gathered.num:
                self._gather.shrink(x_TI, layer, spans.gathered, packed, h_TR)
            if spans.tiled.num:
                self._tiles.shrink(x_TI, layer, spans.tiled, packed, h_TR)
        return torch.split(h_TR, list(packed.widths), dim=1)

    def lora_expand(
        self,
        outputs: tuple[Tensor, ...],
        h: tuple[Tensor, ...],
        pool: Tensor,
        tables: tuple[LoraTable, ...],
        segments: AdapterSegments,
        layer_offset: int,
    ) -> None:
        if not _one_dtype(pool, *outputs) or any(y.stride(1) != 1 for y in outputs):
            super().lora_expand(outputs, h, pool, tables, segments, layer_offset)
            return
        assert len(tables) <= MAX_MODULES
        spans, packed = pack_spans(segments, pool.device), pack_expand(tables)
        h_TR = side_by_side([t[:, :rank] for t, rank in zip(h, packed.ranks, strict=True)])
        assert packed.widths == tuple(y.shape[1] for y in outputs)
        assert all(y.shape[0] == h_TR.shape[0] >= spans.last_token for y in outputs)
        if h_TR.shape[1]:
            layer = pool[layer_offset:]
            if spans.gathered.num:
                self._gather.expand(outputs, h_TR, layer, spans.gathered, packed)
            if spans.tiled.num:
                self._tiles.expand(outputs, h_TR, layer, spans.tiled, packed)

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
        assert _one_dtype(pool, x_TI, y_TO, *(() if bias_O is None else (bias_O,)))
        assert y_TO.stride(1) == 1
        table, parts, vectors, x_TI = descriptors.table, descriptors.parts, descriptors.vectors, token_rows(x_TI)
        (layer, number), here = divmod(field, len(INPUTS)), pool[layer_offset:]
        if Parts.LORA in parts:
            lora = pack_inputs(table)[number]
            h_TR = torch.empty(x_TI.shape[0], MAX_ROWS, device=x_TI.device)
            outputs = torch.split(y_TO, [sum(width for _, width in columns) for columns in table.inputs[number].b], 1)
            self._gather.shrink_by_descriptor(x_TI, here, descriptors, field, lora, h_TR)
            self._gather.expand_by_descriptor(outputs, h_TR, here, descriptors, field, lora)
        if vectors is None:
            return
        tables = pack_vectors(table, vectors.shape)[number]
        if Parts.VERA in parts:
            z_TR = torch.empty(x_TI.shape[0], MAX_PAIR_RANK, device=x_TI.device)
            columns = pool[table.inputs[number].pair_column :]
            self._gather.vera_shrink_by_descriptor(x_TI, columns, vectors, layer, tables, z_TR)
            self._gather.vera_expand_by_descriptor(y_TO, z_TR, pool, layer_offset, vectors, layer, tables)
        if Parts.DORA in parts:
            self._gather.scale_by_descriptor(y_TO, bias_O, here, vectors.rows_LWS[layer], tables)

    def vera_shrink(self, x_TI: Tensor, a_RI: ProjectionMatrix) -> Tensor:
        if not _one_dtype(a_RI.data, x_TI) or a_RI.data.stride(1) != 1:
            return super().vera_shrink(x_TI, a_RI)
        z_TR = torch.empty(x_TI.shape[0], a_RI.data.shape[0], device=x_TI.device)
        self._tiles.dense_shrink(token_rows(x_TI), a_RI.data, z_TR)
        return z_TR

    def vera_expand(self, y_TO: Tensor, z_TR: Tensor, pool: Tensor, table: VeraTable, layer_offset: int) -> None:
        b_OR = table.b_OR.data
        if not _one_dtype(pool, y_TO, b_OR) or y_TO.stride(1) != 1 or b_OR.stride(1) != 1:
            super().vera_expand(y_TO, z_TR, pool, table, layer_offset)
            return
        d, b = pack_rows(table.d), pack_rows(table.b)
        assert d.width == z_TR.shape[1] == b_OR.shape[1]
        assert b.width == y_TO.shape[1] <= b_OR.shape[0]
        assert d.num == b.num == z_TR.shape[0] == table.stop - table.start
        y_TO = y_TO[table.start : table.stop]
        self._tiles.vera_expand(y_TO, token_rows(z_TR), b_OR, pool[layer_offset:], d, b)


def _samples(logits_SV: Tensor) -> bool:
    return logits_SV.dtype == torch.float32 and logits_SV.stride(1) == 1 and logits_SV.shape[1] <= MAX_VOCAB


def _attends(head_dim: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def _one_dtype(first: Tensor, *others: Tensor) -> bool:
    return first.dtype in SUFFIX and all(other.dtype == first.dtype for other in others)
