"""The ops on an NVIDIA GPU: gathers in CUDA C++ for few tokens of an adapter, Triton tiles for many, cuBLAS linears.

An adapter's tokens are gathered if it has fewer than `tables.GATHER_BELOW` of them in the step; a mixed batch is two
launches over disjoint tokens. Attention is divided in the same way, into sequences with one query and sequences with
several. Both paths keep the r-wide intermediate in fp32, but add in different orders. So an adapter's results may
differ in the last bits between steps in which it has few tokens and steps in which it has many; the results of the base
and of other adapters do not.

Each call with mixed dtypes, or with heads whose width is no multiple of 8 or above 256, goes to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loray_kernels.cuda.attention import MAX_HEAD_DIM, AttentionWork, DecodeAttention
from loray_kernels.cuda.flash import FlashPrompts
from loray_kernels.cuda.graphs import DecodeGraphs, GraphCapturer
from loray_kernels.cuda.launch import SUFFIX, Argument, Launcher
from loray_kernels.cuda.sampling import MAX_VOCAB, Choosing, Sampling
from loray_kernels.cuda.tables import (
    MAX_MODULES,
    DeviceRows,
    VectorLaunch,
    pack_attention,
    pack_expand,
    pack_inputs,
    pack_rows,
    pack_shrink,
    pack_spans,
    pack_token_rows,
    pack_vectors,
    three_outputs,
)
from loray_kernels.cuda.upload import PageUploader
from loray_kernels.decode import CapturedDecoding, CapturedStep, Decoding, Parts, StepDescriptors
from loray_kernels.descriptors import INPUTS, MAX_PAIR_RANK, MAX_ROWS, RowOverrides, side_by_side, token_rows
from loray_kernels.kv import AttentionMeta, KvLayout, PageWriter
from loray_kernels.ops import (
    AdapterSegments,
    LinearWeights,
    LoraTable,
    ProjectionMatrix,
    QuantizedWeight,
    Scoring,
    StepInputs,
    VeraTable,
    Weight,
    join_weights,
)
from loray_kernels.reference import ReferenceOps
from loray_kernels.sampling import Chooser, Drawn, Draws, TokenSlots

if TYPE_CHECKING:  # it imports Triton, which tests of the gathers do not need
    from loray_kernels.cuda.triton_launch import Tiles


INT4_GROUPS = (32, 64, 128, 256)  # columns that share a scale, of torch's product
THREADS, NORM_THREADS, SHRINK_WARPS, EXPAND_THREADS = 128, 256, 4, 64  # as in csrc
_WARP, _NARROW = 32, 512  # a row up to so wide has a warp
_ROW_COLUMNS = 8 * THREADS
_ROW_TURNS = 12  # blocks of warps for an item: 48 rows at once, such as rank 16 of q, k and v
_PAIR_TURNS = 32  # the same for a pair: 128 rows at once


class CudaOps(ReferenceOps):
    """`linear` and `logits` are torch's: cuBLAS, its products of int8, those of float8 with a scale a row, and those of
    bf16 with int4 in groups.
    """

    def __init__(
        self, launch: Launcher, tiles: Tiles, flash: FlashPrompts | None = None, *, num_processors: int = 132
    ) -> None:
        """`num_processors`: the device's multiprocessors."""
        self._launch, self._tiles, self._flash = launch, tiles, flash
        self._decode_attention = DecodeAttention(launch, num_processors)
        self._sampling: Sampling | None = None

    def has_kernel(self, weight: QuantizedWeight) -> bool:
        """int8 has kernels, and float8 where the GPU multiplies it, with a scale a row, no zeros, and sizes that 16
        divides; int4 has them in groups of 32 to 256.
        """
        if weight.is_int4:
            return weight.group in INT4_GROUPS and weight.shape[0] % 8 == 0
        if weight.scale_OG.shape[1] > 1 or weight.zero_OG is not None or any(n % 16 for n in weight.shape):
            return False
        q_OI = weight.q_OI
        return q_OI.dtype is torch.int8 or (q_OI.is_cuda and torch.cuda.get_device_capability(q_OI.device) >= (8, 9))

    def pack_linear(self, weights: Sequence[Weight], bias_O: Tensor | None = None) -> LinearWeights:
        """Torch's product of int4 multiplies with (q − 8) · scale + shift in bf16, and has the first of two columns in
        the upper half of a byte, so the shift is scale · (8 − zero).
        """
        joined = join_weights(weights)
        if not (isinstance(joined, QuantizedWeight) and joined.is_int4 and self.has_kernel(joined)):
            return super().pack_linear([joined], bias_O)
        (out_features, in_features), q_OI = joined.shape, joined.q_OI
        tiles = next(n for n in (8, 4, 2) if in_features % (16 * n) == 0)
        scale_OG = joined.scale_OG.bfloat16()
        shift_OG = (scale_OG.float() * (8 - joined.zeros())).bfloat16()
        return LinearWeights(
            in_features,
            out_features,
            torch._convert_weight_to_int4pack(q_OI << 4 | q_OI >> 4, tiles),
            bias_O,
            bits=4,
            group=joined.group,
            scales_GO2=torch.stack((scale_OG, shift_OG), dim=2).transpose(0, 1).contiguous(),
        )

    def linear(self, x_TI: Tensor, weights: LinearWeights) -> Tensor:
        weight, bias_O = weights.data, weights.bias_O
        if isinstance(weight, Tensor) and weights.scales_GO2 is not None:
            x_TI, dtype = x_TI.bfloat16().contiguous(), x_TI.dtype
            y_TO = torch._weight_int4pack_mm(x_TI, weight, weights.group, weights.scales_GO2)
            return (y_TO if bias_O is None else y_TO + bias_O).to(dtype)
        if not isinstance(weight, QuantizedWeight) or x_TI.dtype not in SUFFIX or not self.has_kernel(weight):
            return super().linear(x_TI, weights)
        x_TI, kind = token_rows(x_TI), weight.q_OI.dtype
        (num_tokens, width), suffix = x_TI.shape, SUFFIX[x_TI.dtype]
        is_int8 = kind is torch.int8
        # Torch's product of int8 takes no fewer than 17 rows.
        q_TI = torch.empty(max(num_tokens, 32 if is_int8 else 0), width, dtype=kind, device=x_TI.device)
        scale_T1 = torch.empty(num_tokens, 1, device=x_TI.device)
        most = np.float32(127 if is_int8 else torch.finfo(kind).max)
        arguments = x_TI.data_ptr(), x_TI.stride(0), width, most, q_TI.data_ptr(), scale_T1.data_ptr()
        self._launch(f"quantize_rows_{suffix}", (num_tokens, 1, 1), NORM_THREADS, arguments)
        if not is_int8:
            y_TO = torch._scaled_mm(q_TI, weight.q_OI.T, scale_T1, weight.scale_OG.T, out_dtype=torch.bfloat16)
            return (y_TO if bias_O is None else y_TO + bias_O).to(x_TI.dtype)
        sums_TO = torch._int_mm(q_TI, weight.q_OI.T)
        y_TO = x_TI.new_empty(num_tokens, weights.out_features)
        self._launch(
            f"scale_sums_{suffix}",
            (num_tokens, -(-weights.out_features // _ROW_COLUMNS), 1),
            THREADS,
            (
                sums_TO.data_ptr(),
                weight.scale_OG.data_ptr(),
                scale_T1.data_ptr(),
                0 if bias_O is None else bias_O.data_ptr(),
                y_TO.data_ptr(),
                weights.out_features,
            ),
        )
        return y_TO

    def page_writer(self, pool: Tensor) -> PageWriter:
        return PageUploader(self._launch, pool) if pool.is_cuda else super().page_writer(pool)

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
            self._sampling = Sampling(self._launch, logits_SV.device)
        return self._sampling(logits_SV, draws, slots)

    def chooser(self, logits_SV: Tensor) -> Chooser:
        if not _samples(logits_SV):
            return super().chooser(logits_SV)
        return Choosing(self._launch, logits_SV.device)

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        return self._gated("silu_mul", gate_up_TM) if _is_plain(gate_up_TM) else super().silu_mul(gate_up_TM)

    def gelu_mul(self, gate_up_TM: Tensor) -> Tensor:
        return self._gated("gelu_mul", gate_up_TM) if _is_plain(gate_up_TM) else super().gelu_mul(gate_up_TM)

    def _gated(self, kernel: str, gate_up_TM: Tensor) -> Tensor:
        num_tokens, width = gate_up_TM.shape[0], gate_up_TM.shape[1] // 2
        y_TM = gate_up_TM.new_empty(num_tokens, width)
        self._launch(
            f"{kernel}_{SUFFIX[y_TM.dtype]}",
            (num_tokens, -(-width // _ROW_COLUMNS), 1),
            THREADS,
            (gate_up_TM.data_ptr(), gate_up_TM.stride(0), y_TM.data_ptr(), width),
        )
        return y_TM

    def embed(self, table_VD: Tensor, token_ids_T: Tensor, pool: Tensor, own: RowOverrides | None) -> Tensor:
        if own is None or not _one_dtype(pool, table_VD):
            return super().embed(table_VD, token_ids_T, pool, own)
        x_TD = F.embedding(token_ids_T, table_VD)
        rows, tokens_N = pack_rows(own.rows), own.tokens_N.contiguous()
        assert rows.width == x_TD.shape[1]
        assert rows.num == tokens_N.shape[0]
        self._launch(
            f"take_rows_{SUFFIX[pool.dtype]}",
            (rows.num, rows.num_segments, 1),
            THREADS,
            (
                x_TD.data_ptr(),
                x_TD.stride(0),
                tokens_N.data_ptr(),
                pool.data_ptr(),
                rows.offsets.data_ptr(),
                rows.num,
                rows.segments.data_ptr(),
            ),
        )
        return x_TD

    def rms_norm(
        self,
        x_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        pool: Tensor,
        own: RowOverrides | None,
        layer_offset: int,
        weight_offset: float = 0.0,
    ) -> Tensor:
        if not _one_dtype(pool, x_TD, weight_D):
            return super().rms_norm(x_TD, weight_D, eps, pool, own, layer_offset, weight_offset)
        return self._norm(x_TD, None, weight_D, eps, pool, own, layer_offset, weight_offset)[1]

    def add_rms_norm(
        self,
        x_TD: Tensor,
        added_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        pool: Tensor,
        own: RowOverrides | None,
        layer_offset: int,
        weight_offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        if not _one_dtype(pool, x_TD, added_TD, weight_D):
            return super().add_rms_norm(x_TD, added_TD, weight_D, eps, pool, own, layer_offset, weight_offset)
        return self._norm(x_TD, added_TD, weight_D, eps, pool, own, layer_offset, weight_offset)

    def _norm(
        self,
        x_TD: Tensor,
        added_TD: Tensor | None,
        weight_D: Tensor,
        eps: float,
        pool: Tensor,
        own: RowOverrides | None,
        layer_offset: int,
        weight_offset: float,
    ) -> tuple[Tensor, Tensor]:
        """x + added, or x, and its norm."""
        x_TD, weight_D = token_rows(x_TD), weight_D.contiguous()
        num_heads, width = x_TD.shape[1] if x_TD.dim() == 3 else 1, x_TD.shape[-1]
        num_rows, lanes = x_TD.shape[0] * num_heads, _WARP if width <= _NARROW else NORM_THREADS
        y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        sum_TD, added, rows = x_TD, (0, 0, 0), (0, 0, 0, 0, 0)
        if added_TD is not None:
            added_TD, sum_TD = token_rows(added_TD), torch.empty_like(y_TD)
            added = (added_TD.data_ptr(), added_TD.stride(0), sum_TD.data_ptr())
        if own is not None:
            row_T, table = pack_token_rows(own, x_TD.shape[0]), pack_rows(own.rows)
            assert row_T.shape[0] == x_TD.shape[0]
            assert table.width == width
            rows = (row_T.data_ptr(), *_rows(table))
        self._launch(
            f"rms_norm_{SUFFIX[x_TD.dtype]}",
            (-(-num_rows * lanes // NORM_THREADS), 1, 1),
            NORM_THREADS,
            (
                x_TD.data_ptr(),
                x_TD.stride(0),
                *added,
                weight_D.data_ptr(),
                y_TD.data_ptr(),
                num_rows,
                num_heads,
                width,
                np.float32(eps),
                np.float32(weight_offset),
                lanes,
                pool[layer_offset:].data_ptr(),
                *rows,
            ),
        )
        return sum_TD, y_TD

    def rope_kv(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, step: StepInputs, layer: int) -> Tensor:
        pool, layout, is_int8 = step.pool, step.layout, step.layout.int8_per_element > 0
        if not _one_dtype(pool, q_THd, k_TKd, v_TKd, step.cos_Td, step.sin_Td):
            return super().rope_kv(q_THd, k_TKd, v_TKd, step, layer)
        q_THd, k_TKd, v_TKd = token_rows(q_THd), token_rows(k_TKd), token_rows(v_TKd)
        cos_Td, sin_Td = step.cos_Td.contiguous(), step.sin_Td.contiguous()
        slot_mapping_T = step.attention.slot_mapping_T.contiguous()  # the kernel skips negative ones
        (num_tokens, num_heads, d), turned = q_THd.shape, cos_Td.shape[1]
        assert turned % 2 == 0
        assert turned <= d
        assert k_TKd.shape == v_TKd.shape == (num_tokens, layout.num_kv_heads, d)
        assert cos_Td.shape == sin_Td.shape == (num_tokens, turned)
        assert slot_mapping_T.shape == (num_tokens,)
        y_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        num_rows = num_heads + (2 if is_int8 else 1) * layout.num_kv_heads
        self._launch(
            f"rope_kv_{'int8_' if is_int8 else ''}{SUFFIX[pool.dtype]}",
            (num_tokens, -(-num_rows // (THREADS // 32)), 1),
            THREADS,
            (
                q_THd.data_ptr(),
                q_THd.stride(0),
                num_heads,
                y_THd.data_ptr(),
                k_TKd.data_ptr(),
                k_TKd.stride(0),
                v_TKd.data_ptr(),
                v_TKd.stride(0),
                layout.num_kv_heads,
                cos_Td.data_ptr(),
                sin_Td.data_ptr(),
                turned // 2,
                d,
                pool[layer * layout.layer_share :].data_ptr(),
                layout.block_stride,
                layout.block_tokens,
                slot_mapping_T.data_ptr(),
            ),
        )
        return y_THd

    def paged_attention(
        self,
        q_THd: Tensor,
        pool: Tensor,
        layout: KvLayout,
        layer: int,
        meta: AttentionMeta,
        scoring: Scoring,
    ) -> Tensor:
        d = layout.head_dim
        if not _one_dtype(pool, q_THd) or not _attends(d) or scoring.sinks_H is not None:
            return super().paged_attention(q_THd, pool, layout, layer, meta, scoring)
        q_THd = token_rows(q_THd)
        assert q_THd.shape[1] % layout.num_kv_heads == 0
        assert q_THd.shape[2] == d
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        packed, cache = pack_attention(meta, layout), pool[layer * layout.layer_share :]
        if packed.decoded.num:
            key = (AttentionWork, scoring.window)
            work: AttentionWork | None = meta.prepared.get(key)
            if work is None:
                work = self._decode_attention.plan(packed, q_THd.shape[1], layout, scoring.window)
                meta.prepared[key] = work
            self._decode_attention(q_THd, out_THd, cache, layout, packed, work, scoring)
        is_plain = scoring.window is None and scoring.soft_cap is None and not layout.int8_per_element
        flash = self._flash if is_plain else None
        if packed.prefilled.num and not (flash and flash(q_THd, out_THd, pool, layout, layer, meta, scoring.scale)):
            self._tiles.attention(q_THd, out_THd, cache, layout, packed, scoring)
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
                self._launch(
                    f"lora_shrink_{SUFFIX[pool.dtype]}",
                    (spans.gathered.num, -(-packed.max_rows // SHRINK_WARPS), 1),
                    32 * SHRINK_WARPS,
                    (
                        x_TI.data_ptr(),
                        x_TI.stride(0),
                        layer.data_ptr(),
                        spans.gathered.data.data_ptr(),
                        packed.row_start_N1.data_ptr(),
                        *_rows(packed.rows),
                        packed.h_column_R.data_ptr(),
                        h_TR.data_ptr(),
                        h_TR.stride(0),
                    ),
                )
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
                self._launch(
                    f"lora_expand_{SUFFIX[pool.dtype]}",
                    (spans.gathered.num, packed.num_tiles, 1),
                    EXPAND_THREADS,
                    (
                        *_outputs(outputs),
                        h_TR.data_ptr(),
                        h_TR.stride(0),
                        layer.data_ptr(),
                        spans.gathered.data.data_ptr(),
                        packed.tiles.data_ptr(),
                        packed.offsets.data_ptr(),
                        packed.rank_start_MN1.data_ptr(),
                        packed.num_adapters,
                        packed.scale_MN.data_ptr(),
                        packed.h_column_M.data_ptr(),
                    ),
                )
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
        x_TI, layer = token_rows(x_TI), pool[layer_offset:]
        if Parts.LORA in descriptors.parts:
            self._add_lora(x_TI, y_TO, layer, descriptors, field)
        if Parts.VERA in descriptors.parts:
            self._add_vera(x_TI, y_TO, pool, layer, descriptors, field)
        if Parts.SCALE in descriptors.parts:
            vectors, (rows_WS, tables) = descriptors.vectors, _vectors(descriptors, field)
            assert vectors is not None
            self._launch(
                f"scale_recorded_{SUFFIX[pool.dtype]}",
                (y_TO.shape[0], tables.num_scale_tiles, 1),
                THREADS,
                (
                    y_TO.data_ptr(),
                    y_TO.stride(0),
                    0 if bias_O is None else bias_O.data_ptr(),
                    layer.data_ptr(),
                    rows_WS.data_ptr(),
                    rows_WS.shape[1],
                    tables.scale_tiles.data_ptr(),
                    vectors.words[vectors.shape.scaling_word :].data_ptr(),
                    vectors.starts_S.data_ptr(),
                ),
            )

    def _add_lora(self, x_TI: Tensor, y_TO: Tensor, layer: Tensor, step: StepDescriptors, field: int) -> None:
        """`layer`: the pool from the layer's share on."""
        table, kind, number = step.table, SUFFIX[layer.dtype], field % len(INPUTS)
        tables, num_items = pack_inputs(table)[number], step.items_S3.shape[0]
        outputs = torch.split(y_TO, [sum(width for _, width in columns) for columns in table.inputs[number].b], dim=1)
        h_TR = torch.empty(x_TI.shape[0], MAX_ROWS, device=x_TI.device)
        self._launch(
            f"lora_recorded_shrink_{kind}",
            (num_items, _ROW_TURNS, 1),
            32 * SHRINK_WARPS,
            (
                x_TI.data_ptr(),
                x_TI.stride(0),
                layer.data_ptr(),
                step.items_S3.data_ptr(),
                table.words.data_ptr(),
                field,
                tables.num_modules,
                tables.segments.data_ptr(),
                tables.num_segments,
                h_TR.data_ptr(),
                h_TR.stride(0),
            ),
        )
        self._launch(
            f"lora_recorded_expand_{kind}",
            (num_items, tables.num_tiles, 1),
            EXPAND_THREADS,
            (
                *_outputs(outputs),
                h_TR.data_ptr(),
                h_TR.stride(0),
                layer.data_ptr(),
                step.items_S3.data_ptr(),
                tables.tiles.data_ptr(),
                table.words.data_ptr(),
                field,
                tables.num_modules,
                tables.num_segments,
                tables.module_segments.data_ptr(),
            ),
        )

    def _add_vera(
        self, x_TI: Tensor, y_TO: Tensor, pool: Tensor, layer: Tensor, step: StepDescriptors, field: int
    ) -> None:
        """`layer`: the pool from the layer's share on."""
        vectors, kind, (rows_WS, tables) = step.vectors, SUFFIX[pool.dtype], _vectors(step, field)
        assert vectors is not None
        items, words, num_items = vectors.items_S3.data_ptr(), vectors.words.data_ptr(), vectors.items_S3.shape[0]
        z_TR = torch.empty(x_TI.shape[0], MAX_PAIR_RANK, device=x_TI.device)
        self._launch(
            f"vera_recorded_shrink_{kind}",
            (num_items, _PAIR_TURNS, 1),
            32 * SHRINK_WARPS,
            (
                x_TI.data_ptr(),
                x_TI.stride(0),
                x_TI.shape[1],
                # The column of a pair's A that meets the input's first, counted from the pool's start.
                pool[step.table.inputs[field % len(INPUTS)].pair_column :].data_ptr(),
                items,
                words,
                rows_WS.data_ptr(),
                rows_WS.shape[1],
                tables.words_M.data_ptr(),
                tables.words_M.shape[0],
                z_TR.data_ptr(),
                z_TR.stride(0),
            ),
        )
        self._launch(
            f"vera_recorded_expand_{kind}",
            (num_items, tables.num_tiles, 1),
            THREADS,
            (
                y_TO.data_ptr(),
                y_TO.stride(0),
                z_TR.data_ptr(),
                z_TR.stride(0),
                pool.data_ptr(),
                layer.data_ptr(),
                items,
                words,
                rows_WS.data_ptr(),
                rows_WS.shape[1],
                tables.tiles.data_ptr(),
            ),
        )

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


def _is_plain(x: Tensor) -> bool:
    return x.dtype in SUFFIX and x.stride(-1) == 1


def _attends(head_dim: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def _one_dtype(first: Tensor, *others: Tensor) -> bool:
    return first.dtype in SUFFIX and all(other.dtype == first.dtype for other in others)


def _rows(rows: DeviceRows) -> tuple[int, int, int, int]:
    """The arguments that describe rows of the pool."""
    return rows.offsets.data_ptr(), rows.num, rows.segments.data_ptr(), rows.num_segments


def _outputs(outputs: tuple[Tensor, ...]) -> tuple[Argument, ...]:
    """The arguments that describe what an expand writes: addresses, then strides."""
    y = three_outputs(outputs)
    return (*(t.data_ptr() for t in y), *(t.stride(0) for t in y))


def _vectors(step: StepDescriptors, field: int) -> tuple[Tensor, VectorLaunch]:
    """The offsets of a layer's vectors, (W, S), and the tables of an input."""
    layer, number = divmod(field, len(INPUTS))
    assert step.vectors is not None
    return step.vectors.rows_LWS[layer], pack_vectors(step.table, step.vectors.shape)[number]
