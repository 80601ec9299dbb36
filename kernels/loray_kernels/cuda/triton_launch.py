"""Launches of the Triton kernels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from loray_kernels.cuda import triton_kernels
from loray_kernels.cuda.attention import PARTIAL_BYTES
from loray_kernels.cuda.tables import (
    TILE_COLUMNS,
    TILE_QUERIES,
    TILE_TOKENS,
    AttentionTables,
    DeviceRows,
    Expand,
    Items,
    Shrink,
    three_outputs,
    upload,
)
from loray_kernels.kv import KvLayout
from loray_kernels.ops import Scoring

# Products and sums of CUDA cores are one operation, as NVRTC makes them. Triton's default for it is not the same in all
# versions, and results would not be either.
OPTIONS = {"enable_fp_fusion": True}

# Chosen so that the kernels compile without spilling registers (benchmarks/kernels/compile.py). No GPU has run or timed
# them yet.
SHRINK_ROWS = 64
SPLIT_COLUMNS, MAX_SPLITS = 512, 8  # of the input, that a block adds up at least, and how many blocks share a sum
_SPLIT_UNIT = 128
EXPAND_ROWS = 16
VERA_ROWS, VERA_COLUMNS = 16, 64


class Tiles:
    """Each method queues one launch; `shrink` several if partial sums would take more than PARTIAL_BYTES."""

    def __init__(self) -> None:
        self._arrived: Tensor | None = None

    def shrink(self, x_TI: Tensor, pool: Tensor, items: Items, table: Shrink, h_TR: Tensor) -> None:
        """An input's splits depend on its width alone, so that the sums do not depend on a step's other tokens."""
        rows, (block_k, options) = table.rows, shrink_turns(x_TI.element_size())
        block_r = min(SHRINK_ROWS, max(16, _power_of_2(table.max_rows)))
        row_tiles, (splits, each) = -(-table.max_rows // block_r), split_input(x_TI.shape[1])
        together, partial = items.num, h_TR  # which one split does not use
        if splits > 1:
            own = row_tiles * splits * TILE_TOKENS * block_r  # numbers of an item
            together = max(1, min(items.num, PARTIAL_BYTES // (4 * own)))
            partial = torch.empty(together * own, device=h_TR.device)
        for first in range(0, items.num, together):
            triton_kernels.lora_shrink[(min(together, items.num - first), row_tiles, splits)](
                x_TI,
                x_TI.stride(0),
                pool,
                items.data[3 * first :] if first else items.data,
                table.row_start_N1,
                rows.offsets,
                rows.num,
                rows.segments,
                rows.num_segments,
                table.h_column_R,
                h_TR,
                h_TR.stride(0),
                each,
                partial,
                self._counters(h_TR.device),
                BLOCK_T=TILE_TOKENS,
                BLOCK_R=block_r,
                BLOCK_K=block_k,
                **options,
                **OPTIONS,
            )

    def _counters(self, device: torch.device) -> Tensor:
        """Zeros, which every launch leaves as zeros: as many as there can be tiles at a time."""
        if self._arrived is None:
            self._arrived = torch.zeros(PARTIAL_BYTES // (4 * 2 * TILE_TOKENS * 16), dtype=torch.int32, device=device)
        return self._arrived

    def expand(self, outputs: tuple[Tensor, ...], h_TR: Tensor, pool: Tensor, items: Items, table: Expand) -> None:
        y = three_outputs(outputs)
        even = table.multiple_of_8 and all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in outputs)
        triton_kernels.lora_expand[(items.num, table.num_tiles)](
            *y,
            *(t.stride(0) for t in y),
            h_TR,
            h_TR.stride(0),
            pool,
            items.data,
            table.tiles,
            table.offsets,
            table.rank_start_MN1,
            table.num_adapters,
            table.scale_MN,
            table.h_column_M,
            VECTOR_Y=even,
            BLOCK_T=TILE_TOKENS,
            BLOCK_R=EXPAND_ROWS,
            BLOCK_O=TILE_COLUMNS,
            **OPTIONS,
        )

    def dense_shrink(self, x_TI: Tensor, a_RI: Tensor, h_TR: Tensor) -> None:
        """h = A[:, :I] x, by `shrink` with the rows of a matrix."""
        (num_tokens, width), rank = x_TI.shape, a_RI.shape[0]
        items, table = _dense(num_tokens, width, rank, a_RI.stride(0), x_TI.device)
        self.shrink(x_TI, a_RI, items, table, h_TR)

    def vera_expand(self, y_TO: Tensor, z_TR: Tensor, b_OR: Tensor, pool: Tensor, d: DeviceRows, b: DeviceRows) -> None:
        """y += b ⊙ (B (d ⊙ z)); each token has a row of d and b."""
        num_tokens, width = y_TO.shape
        triton_kernels.vera_expand[(-(-num_tokens // TILE_TOKENS), -(-width // VERA_COLUMNS))](
            y_TO,
            y_TO.stride(0),
            z_TR,
            z_TR.stride(0),
            num_tokens,
            width,
            b_OR,
            b_OR.stride(0),
            pool,
            d.offsets,
            d.segments,
            d.num_segments,
            b.offsets,
            b.segments,
            b.num_segments,
            BLOCK_T=TILE_TOKENS,
            BLOCK_R=VERA_ROWS,
            BLOCK_O=VERA_COLUMNS,
            **OPTIONS,
        )

    def attention(
        self,
        q_THd: Tensor,
        out_THd: Tensor,
        pool: Tensor,
        layout: KvLayout,
        tables: AttentionTables,
        scoring: Scoring,
    ) -> None:
        """Compute the attention of sequences with several queries. `pool` begins at the layer's share."""
        num_heads, d, is_int8 = q_THd.shape[1], layout.head_dim, layout.int8_per_element > 0
        triton_kernels.attention_prefill[(tables.prefilled.num, num_heads)](
            q_THd,
            q_THd.stride(0),
            out_THd,
            pool.view(torch.int8) if is_int8 else pool,
            pool.view(torch.float32) if is_int8 else None,
            layout.block_stride,
            tables.prefilled.data,
            tables.query_start,
            tables.context_len,
            tables.table_start,
            tables.blocks,
            scoring.scale,
            scoring.window or 0,
            scoring.soft_cap or 0.0,
            HAS_WINDOW=scoring.window is not None,
            HAS_CAP=scoring.soft_cap is not None,
            IS_INT8=is_int8,
            BLOCK_TOKENS=layout.block_tokens,
            NUM_KV_HEADS=layout.num_kv_heads,
            HEAD_DIM=d,
            GROUP=num_heads // layout.num_kv_heads,
            BLOCK_Q=TILE_QUERIES,
            BLOCK_K=keys_at_once(d, is_int8=is_int8),
            BLOCK_D=max(16, _power_of_2(d)),
            num_stages=attention_stages(pool.element_size()),
            **OPTIONS,
        )


@lru_cache(maxsize=64)
def _dense(num_tokens: int, width: int, rank: int, stride: int, device: torch.device) -> tuple[Items, Shrink]:
    tiles = [(0, t, min(TILE_TOKENS, num_tokens - t)) for t in range(0, num_tokens, TILE_TOKENS)]
    items, offsets, columns, start, segment = upload(
        device, [v for t in tiles for v in t], range(0, rank * stride, stride), range(rank), (0, rank), (0, width)
    )
    return Items(items, len(tiles)), Shrink(DeviceRows(offsets, segment, 1, rank, width), start, columns, rank, (rank,))


def shrink_turns(element_size: int) -> tuple[int, dict[str, int]]:
    """Choose the columns of a turn of the shrink, and Triton's options: its stages (one turn less has room in shared
    memory), and the registers of a thread with which four blocks stand on a multiprocessor. Without this limit ptxas
    wants seven blocks on sm_80, and spills. In fp32 registers limit the turns.
    """
    return (64, {"num_stages": 5, "maxnreg": 128}) if element_size == 2 else (32, {"num_stages": 3})


def split_input(width: int) -> tuple[int, int]:
    """Count the splits of an input, and the columns of each, a multiple of 128."""
    splits = min(MAX_SPLITS, -(-width // SPLIT_COLUMNS))
    each = -(-width // (splits * _SPLIT_UNIT)) * _SPLIT_UNIT
    return -(-width // each), each


def attention_stages(element_size: int) -> int:
    """Triton's stages, which shared memory limits."""
    return 3 if element_size == 2 else 1


def keys_at_once(head_dim: int, *, is_int8: bool = False) -> int:
    """Keys of one turn: independent of the batch, because it decides the order in which attention adds. Of int8 half as
    many, whose conversion needs registers.
    """
    return (64 if head_dim <= 64 else 32) // (2 if is_int8 else 1)


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that is not less than `n`."""
    return 1 << max(0, n - 1).bit_length()
