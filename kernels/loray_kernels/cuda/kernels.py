"""Launches of the CUDA C++ kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loray_kernels.cuda.launch import SUFFIX, Launcher
from loray_kernels.cuda.tables import (
    AttentionTables,
    DeviceRows,
    Expand,
    Items,
    LoraLaunch,
    Shrink,
    VectorLaunch,
    three_outputs,
)
from loray_kernels.decode import StepDescriptors
from loray_kernels.descriptors import StepVectors
from loray_kernels.kv import KvLayout

MAX_HEAD_DIM = 256
PARTIAL_BYTES = 128 << 20  # of partial sums of attention at a time
_THREADS, _NORM_THREADS, _SHRINK_WARPS, _EXPAND_THREADS = 128, 256, 4, 64  # as in csrc
_WARP, _NARROW = 32, 512  # a row up to so wide has a warp
_SILU_COLUMNS = 8 * _THREADS
_GROUP = 8
_TENSOR_HEADS, _TENSOR_KEYS = (64, 128), 16
_ROW_TURNS = 12  # blocks of warps for an item: 48 rows at once, such as rank 16 of q, k and v
_PAIR_TURNS = 32  # the same for a pair: 128 rows at once
_BLOCKS = 8  # of attention, for each multiprocessor: some times as many as stand there at once, so that all are busy


class AttentionWork(NamedTuple):
    """The work of attention in each layer, made once for all layers: which splits of decoding sequences each launch
    computes; see attention.cu.

    starts_G1  of G launches, in `splits`
    arrived    blocks that have come to a sequence, for each part of its heads
    most       a launch has the sequences whose first split is one of so many
    room       the most splits that these have
    """

    starts_G1: Tensor
    splits: Tensor
    arrived: Tensor
    most: int
    room: int


class Gather:
    """Each method but `attention` queues one launch. `num_processors`: the device's multiprocessors."""

    def __init__(self, launch: Launcher, num_processors: int = 132) -> None:
        self.launch = launch
        self._num_blocks = _BLOCKS * num_processors

    # -- rows of activations and of the pool ---------------------------------------------------------------------------

    def rms_norm(
        self,
        x_TD: Tensor,
        sums: tuple[Tensor, Tensor] | None,
        weight_D: Tensor,
        eps: float,
        y_TD: Tensor,
        pool: Tensor,
        own: tuple[Tensor, DeviceRows] | None,
    ) -> None:
        """`sums`: what is added to x before, and where the sum is written. `own`: for each token its row, or −1; and
        the rows. `pool` begins at the layer's share.
        """
        num_heads, width = x_TD.shape[1] if x_TD.dim() == 3 else 1, x_TD.shape[-1]
        num_rows, lanes = x_TD.shape[0] * num_heads, _WARP if width <= _NARROW else _NORM_THREADS
        rows = (0, 0, 0, 0, 0)
        if own is not None:
            own_row, table = own
            addresses = own_row.data_ptr(), table.offsets.data_ptr(), table.segments.data_ptr()
            rows = (addresses[0], addresses[1], table.num, addresses[2], table.num_segments)
        added = (0, 0, 0) if sums is None else (sums[0].data_ptr(), sums[0].stride(0), sums[1].data_ptr())
        self.launch(
            f"rms_norm_{SUFFIX[x_TD.dtype]}",
            (-(-num_rows * lanes // _NORM_THREADS), 1, 1),
            _NORM_THREADS,
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
                lanes,
                pool.data_ptr(),
                *rows,
            ),
        )

    def silu_mul(self, gate_up_TM: Tensor, y_TM: Tensor) -> None:
        num_tokens, width = y_TM.shape
        self.launch(
            f"silu_mul_{SUFFIX[y_TM.dtype]}",
            (num_tokens, -(-width // _SILU_COLUMNS), 1),
            _THREADS,
            (gate_up_TM.data_ptr(), gate_up_TM.stride(0), y_TM.data_ptr(), width),
        )

    def rope_kv(
        self,
        q_THd: Tensor,
        y_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        tables: tuple[Tensor, Tensor],
        pool: Tensor,
        layout: KvLayout,
        slot_mapping_T: Tensor,
    ) -> None:
        """`tables`: cos and sin. `pool` begins at the layer's share. A negative slot is skipped."""
        num_tokens, num_heads, d = q_THd.shape
        self.launch(
            f"rope_kv_{SUFFIX[pool.dtype]}",
            (num_tokens, -(-(num_heads + layout.num_kv_heads) // (_THREADS // 32)), 1),
            _THREADS,
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
                *(table_Td.data_ptr() for table_Td in tables),
                d // 2,
                pool.data_ptr(),
                layout.num_layers * layout.layer_share,
                layout.block_tokens,
                slot_mapping_T.data_ptr(),
            ),
        )

    def take_rows(self, y_TD: Tensor, tokens_N: Tensor, pool: Tensor, rows: DeviceRows) -> None:
        """y[tokens[n]] = row n, unless its offset is negative."""
        self.launch(
            f"take_rows_{SUFFIX[pool.dtype]}",
            (rows.num, rows.num_segments, 1),
            _THREADS,
            (
                y_TD.data_ptr(),
                y_TD.stride(0),
                tokens_N.data_ptr(),
                pool.data_ptr(),
                rows.offsets.data_ptr(),
                rows.num,
                rows.segments.data_ptr(),
            ),
        )

    def place_pages(self, pool: Tensor, pages: Tensor, pieces_P3: Tensor) -> None:
        """pool[to : to + length] = pages[from : from + length] for each piece (from, to, length)."""
        self.launch(
            f"place_pages_{SUFFIX[pool.dtype]}",
            (pieces_P3.shape[0], 1, 1),
            _THREADS,
            (pool.data_ptr(), pages.data_ptr(), pieces_P3.data_ptr()),
        )

    def scale_by_descriptor(
        self, y_TO: Tensor, bias_O: Tensor | None, pool: Tensor, rows_WS: Tensor, tables: VectorLaunch
    ) -> None:
        """`pool` begins at the layer's share."""
        self.launch(
            f"scale_recorded_{SUFFIX[pool.dtype]}",
            (y_TO.shape[0], tables.num_scale_tiles, 1),
            _THREADS,
            (
                y_TO.data_ptr(),
                y_TO.stride(0),
                0 if bias_O is None else bias_O.data_ptr(),
                pool.data_ptr(),
                rows_WS.data_ptr(),
                rows_WS.shape[1],
                tables.scale_tiles.data_ptr(),
            ),
        )

    # -- adapters ------------------------------------------------------------------------------------------------------

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

    def shrink_by_descriptor(
        self, x_TI: Tensor, pool: Tensor, step: StepDescriptors, field: int, tables: LoraLaunch, h_TR: Tensor
    ) -> None:
        words = step.table.words
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

    def expand_by_descriptor(
        self,
        outputs: tuple[Tensor, ...],
        h_TR: Tensor,
        pool: Tensor,
        step: StepDescriptors,
        field: int,
        tables: LoraLaunch,
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
                step.table.words.data_ptr(),
                field,
                tables.num_modules,
                tables.num_segments,
                tables.module_segments.data_ptr(),
            ),
        )

    def vera_shrink_by_descriptor(
        self, x_TI: Tensor, pool: Tensor, step: StepVectors, layer: int, tables: VectorLaunch, z_TR: Tensor
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

    def vera_expand_by_descriptor(
        self,
        y_TO: Tensor,
        z_TR: Tensor,
        pool: Tensor,
        layer_offset: int,
        step: StepVectors,
        layer: int,
        tables: VectorLaunch,
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

    # -- attention -----------------------------------------------------------------------------------------------------

    def plan_attention(self, tables: AttentionTables, num_heads: int, layout: KvLayout) -> AttentionWork:
        """Plan the work of `attention`. Launches are so many that the partial sums of one fit into PARTIAL_BYTES; those
        that a step does not need find no work.
        """
        device, num, splits = tables.context_len.device, tables.decoded.num, max(1, tables.max_splits)
        room = max(splits, PARTIAL_BYTES // (4 * num_heads * (layout.head_dim + 2))) if splits > 1 else num
        most = min(num * splits, room - splits + 1)
        starts_G1 = torch.empty(1 - (-num * splits // most), dtype=torch.int64, device=device)
        work = AttentionWork(
            starts_G1,
            torch.empty(num * splits, dtype=torch.int64, device=device),
            torch.empty(num * _parts(num_heads, layout), dtype=torch.int32, device=device),
            most,
            min(num * splits, most + splits - 1),
        )
        self.launch(
            "attention_plan_fp32",
            (1, 1, 1),
            _THREADS,
            (
                tables.decoded.data.data_ptr(),
                tables.context_len.data_ptr(),
                num,
                most,
                len(starts_G1) - 1,
                starts_G1.data_ptr(),
                work.splits.data_ptr(),
                work.arrived.data_ptr(),
                len(work.arrived),
            ),
        )
        return work

    def attention(
        self,
        q_THd: Tensor,
        out_THd: Tensor,
        pool: Tensor,
        layout: KvLayout,
        tables: AttentionTables,
        work: AttentionWork,
        scale: float,
    ) -> None:
        """Compute the attention of sequences with one query. `pool` begins at the layer's share. A launch has a number
        of blocks that does not depend on the step, and they take the splits that there are by turns.
        """
        kind, num_heads, num_kv, d = SUFFIX[pool.dtype], q_THd.shape[1], layout.num_kv_heads, layout.head_dim
        kernel = f"tensor{d}" if _by_tensors(pool, layout) else "decode"
        parts = _parts(num_heads, layout)
        blocks = max(1, min(work.room, self._num_blocks // parts))
        partial = torch.empty(work.room * num_heads * (d + 2) if tables.max_splits > 1 else 0, device=pool.device)
        for launch in range(len(work.starts_G1) - 1):
            self.launch(
                f"attention_{kernel}_{kind}",
                (blocks, parts, 1),
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
                    num_heads // num_kv,
                    tables.decoded.data.data_ptr(),
                    tables.context_len.data_ptr(),
                    tables.table_start.data_ptr(),
                    tables.blocks.data_ptr(),
                    np.float32(scale),
                    partial.data_ptr(),
                    work.starts_G1[launch:].data_ptr(),
                    work.splits.data_ptr(),
                    launch * work.most,
                    work.arrived.data_ptr(),
                ),
            )


def _parts(num_heads: int, layout: KvLayout) -> int:
    """Count the blocks among which a split's heads are divided."""
    return layout.num_kv_heads * -(-num_heads // layout.num_kv_heads // _GROUP)


def _by_tensors(pool: Tensor, layout: KvLayout) -> bool:
    """Say whether a tensor core's kernel can read the pool: 16 keys at a time of one block, 16 bytes at once."""
    return (
        pool.element_size() == 2
        and layout.head_dim in _TENSOR_HEADS
        and layout.block_tokens % _TENSOR_KEYS == 0
        and pool.data_ptr() % 16 == 0
    )
