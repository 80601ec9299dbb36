"""Attention of decode steps, by the kernels of csrc/attention.cu: which work there is, and its launches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loray_kernels.cuda.launch import SUFFIX, Launcher
from loray_kernels.cuda.tables import AttentionTables
from loray_kernels.kv import KvLayout
from loray_kernels.ops import Scoring

MAX_HEAD_DIM = 256
PARTIAL_BYTES = 128 << 20  # of partial sums at a time
THREADS = 128  # as in csrc
GROUP = 8
TENSOR_HEADS, TENSOR_KEYS = (64, 128), 16
_BLOCKS = 8  # for each multiprocessor: some times as many as stand there at once, so that all are busy


class AttentionWork(NamedTuple):
    """The work of attention in each layer, made once for all layers with the same window: which splits of decoding
    sequences each launch computes; see attention.cu.

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


class DecodeAttention:
    """`num_processors`: the device's multiprocessors."""

    def __init__(self, launch: Launcher, num_processors: int = 132) -> None:
        self._launch = launch
        self._num_blocks = _BLOCKS * num_processors

    def plan(
        self, tables: AttentionTables, num_heads: int, layout: KvLayout, window: int | None = None
    ) -> AttentionWork:
        """Plan the work of a call. Launches are so many that the partial sums of one fit into PARTIAL_BYTES; those
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
        self._launch(
            "attention_plan_fp32",
            (1, 1, 1),
            THREADS,
            (
                tables.decoded.data.data_ptr(),
                tables.context_len.data_ptr(),
                num,
                window or 0,
                most,
                len(starts_G1) - 1,
                starts_G1.data_ptr(),
                work.splits.data_ptr(),
                work.arrived.data_ptr(),
                len(work.arrived),
            ),
        )
        return work

    def __call__(
        self,
        q_THd: Tensor,
        out_THd: Tensor,
        pool: Tensor,
        layout: KvLayout,
        tables: AttentionTables,
        work: AttentionWork,
        scoring: Scoring,
    ) -> None:
        """Compute the attention of sequences with one query. `pool` begins at the layer's share. A launch has a number
        of blocks that does not depend on the step, and they take the splits that there are by turns.
        """
        kind, num_heads, num_kv, d = SUFFIX[pool.dtype], q_THd.shape[1], layout.num_kv_heads, layout.head_dim
        kernel = "int8" if layout.int8_per_element else f"tensor{d}" if _by_tensors(pool, layout) else "decode"
        parts = _parts(num_heads, layout)
        blocks = max(1, min(work.room, self._num_blocks // parts))
        partial = torch.empty(work.room * num_heads * (d + 2) if tables.max_splits > 1 else 0, device=pool.device)
        for launch in range(len(work.starts_G1) - 1):
            self._launch(
                f"attention_{kernel}_{kind}",
                (blocks, parts, 1),
                THREADS,
                (
                    q_THd.data_ptr(),
                    q_THd.stride(0),
                    out_THd.data_ptr(),
                    pool.data_ptr(),
                    layout.block_stride,
                    layout.block_tokens,
                    num_kv,
                    d,
                    num_heads // num_kv,
                    tables.decoded.data.data_ptr(),
                    tables.context_len.data_ptr(),
                    tables.table_start.data_ptr(),
                    tables.blocks.data_ptr(),
                    np.float32(scoring.scale),
                    scoring.window or 0,
                    np.float32(scoring.soft_cap or 0.0),
                    partial.data_ptr(),
                    work.starts_G1[launch:].data_ptr(),
                    work.splits.data_ptr(),
                    launch * work.most,
                    work.arrived.data_ptr(),
                ),
            )


def _parts(num_heads: int, layout: KvLayout) -> int:
    """Count the blocks among which a split's heads are divided."""
    return layout.num_kv_heads * -(-num_heads // layout.num_kv_heads // GROUP)


def _by_tensors(pool: Tensor, layout: KvLayout) -> bool:
    """Say whether a tensor core's kernel can read the pool: 16 keys at a time of one block, 16 bytes at once."""
    return (
        pool.element_size() == 2
        and layout.head_dim in TENSOR_HEADS
        and layout.block_tokens % TENSOR_KEYS == 0
        and pool.data_ptr() % 16 == 0
    )
