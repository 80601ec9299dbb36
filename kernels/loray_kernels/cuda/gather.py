"""Launches of the CUDA C++ kernels that gather: LoRA, VeRA and attention of few tokens. csrc and `ops.Ops` have the
equations.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loray_kernels.cuda.launch import SUFFIX
from loray_kernels.cuda.rows import RowLaunches
from loray_kernels.cuda.tables import Attention, Expand, Items, OfInput, Shrink, three_outputs
from loray_kernels.cuda.vectors import OfInput as VectorsOfInput
from loray_kernels.decoding import StepRecords
from loray_kernels.kv import KvLayout
from loray_kernels.vectors import StepVectors

_SHRINK_WARPS, _EXPAND_THREADS, _THREADS = 4, 64, 128  # as in cuda/csrc
_GROUP = 8
_TENSOR_HEADS, _TENSOR_KEYS = (64, 128), 16
_ROW_TURNS = 12  # blocks of warps for a recorded item: 48 rows at once, such as rank 16 of q, k and v
_PAIR_TURNS = 32  # the same for a pair: 128 rows at once
MAX_HEAD_DIM = 256
PARTIAL_BYTES = 128 << 20  # of partial sums of attention at a time


class Gather(RowLaunches):
    """Each method queues one launch, or two."""

    def shrink(self, x_TI: Tensor, pool: Tensor, items: Items, shrink: Shrink, h_TR: Tensor) -> None:
        rows = shrink.rows
        self.launch(
            f"lora_shrink_{SUFFIX[pool.dtype]}",
            (items.num, -(-shrink.max_rows // _SHRINK_WARPS), 1),
            32 * _SHRINK_WARPS,
            (
                x_TI.data_ptr(),
                x_TI.stride(0),
                pool.data_ptr(),
                items.data.data_ptr(),
                shrink.row_start_N1.data_ptr(),
                rows.offsets.data_ptr(),
                rows.num,
                rows.segments.data_ptr(),
                rows.num_segments,
                shrink.h_column_R.data_ptr(),
                h_TR.data_ptr(),
                h_TR.stride(0),
            ),
        )

    def expand(self, outputs: tuple[Tensor, ...], h_TR: Tensor, pool: Tensor, items: Items, expand: Expand) -> None:
        y = three_outputs(outputs)
        self.launch(
            f"lora_expand_{SUFFIX[pool.dtype]}",
            (items.num, expand.num_tiles, 1),
            _EXPAND_THREADS,
            (
                *(t.data_ptr() for t in y),
                *(t.stride(0) for t in y),
                h_TR.data_ptr(),
                h_TR.stride(0),
                pool.data_ptr(),
                items.data.data_ptr(),
                expand.tiles.data_ptr(),
                expand.offsets.data_ptr(),
                expand.rank_start_MN1.data_ptr(),
                expand.num_adapters,
                expand.scale_MN.data_ptr(),
                expand.h_column_M.data_ptr(),
            ),
        )

    def recorded_shrink(
        self, x_TI: Tensor, pool: Tensor, step: StepRecords, field: int, tables: OfInput, h_TR: Tensor
    ) -> None:
        words = step.records.words
        self.launch(
            f"lora_recorded_shrink_{SUFFIX[pool.dtype]}",
            (step.items_S3.shape[0], _ROW_TURNS, 1),
            32 * _SHRINK_WARPS,
            (
                x_TI.data_ptr(),
                x_TI.stride(0),
                pool.data_ptr(),
                step.items_S3.data_ptr(),
                words.data_ptr(),
                field,
                tables.num_modules,
                tables.segments.data_ptr(),
                tables.num_segments,
                h_TR.data_ptr(),
                h_TR.stride(0),
            ),
        )

    def recorded_expand(
        self, outputs: tuple[Tensor, ...], h_TR: Tensor, pool: Tensor, step: StepRecords, field: int, tables: OfInput
    ) -> None:
        y = three_outputs(outputs)
        self.launch(
            f"lora_recorded_expand_{SUFFIX[pool.dtype]}",
            (step.items_S3.shape[0], tables.num_tiles, 1),
            _EXPAND_THREADS,
            (
                *(t.data_ptr() for t in y),
                *(t.stride(0) for t in y),
                h_TR.data_ptr(),
                h_TR.stride(0),
                pool.data_ptr(),
                step.items_S3.data_ptr(),
                tables.tiles.data_ptr(),
                step.records.words.data_ptr(),
                field,
                tables.num_modules,
                tables.num_segments,
                tables.module_segments.data_ptr(),
            ),
        )

    def vera_recorded_shrink(
        self, x_TI: Tensor, pool: Tensor, step: StepVectors, layer: int, tables: VectorsOfInput, z_TR: Tensor
    ) -> None:
        """`pool` begins at the column of the pair's A that meets the input's first, counted from the pool's start."""
        rows_WS = step.rows_LWS[layer]
        self.launch(
            f"vera_recorded_shrink_{SUFFIX[pool.dtype]}",
            (step.items_S3.shape[0], _PAIR_TURNS, 1),
            32 * _SHRINK_WARPS,
            (
                x_TI.data_ptr(),
                x_TI.stride(0),
                x_TI.shape[1],
                pool.data_ptr(),
                step.items_S3.data_ptr(),
                step.words.data_ptr(),
                rows_WS.data_ptr(),
                rows_WS.shape[1],
                tables.words_M.data_ptr(),
                tables.words_M.shape[0],
                z_TR.data_ptr(),
                z_TR.stride(0),
            ),
        )

    def vera_recorded_expand(
        self,
        y_TO: Tensor,
        z_TR: Tensor,
        pool: Tensor,
        layer_offset: int,
        step: StepVectors,
        layer: int,
        tables: VectorsOfInput,
    ) -> None:
        rows_WS = step.rows_LWS[layer]
        self.launch(
            f"vera_recorded_expand_{SUFFIX[pool.dtype]}",
            (step.items_S3.shape[0], tables.num_tiles, 1),
            _THREADS,
            (
                y_TO.data_ptr(),
                y_TO.stride(0),
                z_TR.data_ptr(),
                z_TR.stride(0),
                pool.data_ptr(),
                pool[layer_offset:].data_ptr(),
                step.items_S3.data_ptr(),
                step.words.data_ptr(),
                rows_WS.data_ptr(),
                rows_WS.shape[1],
                tables.tiles.data_ptr(),
            ),
        )

    def attention(
        self, q_THd: Tensor, out_THd: Tensor, pool: Tensor, layout: KvLayout, tables: Attention, scale: float
    ) -> None:
        """For sequences with one query. `pool` begins at the layer's share.

        Partial sums of splits are merged for as many sequences at a time as fit into PARTIAL_BYTES.
        """
        kind, num_heads, num_kv, d = SUFFIX[pool.dtype], q_THd.shape[1], layout.num_kv_heads, layout.head_dim
        kernel = f"tensor{d}" if _by_tensors(pool, layout) else "decode"
        group, splits, num = num_heads // num_kv, max(1, tables.max_splits), tables.decoded.num
        own = splits * num_heads * (d + 2) if splits > 1 else 0  # numbers of a sequence
        together = max(1, min(num, PARTIAL_BYTES // (4 * own))) if own else num
        partial = torch.empty(together * own, device=pool.device)
        for first in range(0, num, together):
            now, items = min(together, num - first), tables.decoded.data[2 * first :]
            self.launch(
                f"attention_{kernel}_{kind}",
                (now, num_kv * -(-group // _GROUP), splits),
                _THREADS,
                (
                    q_THd.data_ptr(),
                    q_THd.stride(0),
                    out_THd.data_ptr(),
                    pool.data_ptr(),
                    layout.num_layers * layout.layer_share,
                    layout.block_tokens,
                    num_kv,
                    d,
                    group,
                    items.data_ptr(),
                    tables.context_len.data_ptr(),
                    tables.table_start.data_ptr(),
                    tables.blocks.data_ptr(),
                    np.float32(scale),
                    partial.data_ptr(),
                ),
            )
            if splits > 1:
                there = (out_THd.data_ptr(), partial.data_ptr(), splits, d)
                then = (items.data_ptr(), tables.context_len.data_ptr())
                self.launch(f"attention_combine_{kind}", (now, num_heads, 1), _THREADS, (*there, *then))


def _by_tensors(pool: Tensor, layout: KvLayout) -> bool:
    """Whether a tensor core's kernel can read the pool: 16 keys at a time of one block, 16 bytes at once."""
    return (
        pool.element_size() == 2
        and layout.head_dim in _TENSOR_HEADS
        and layout.block_tokens % _TENSOR_KEYS == 0
        and pool.data_ptr() % 16 == 0
    )
