"""Launches of rows.cu: norms, SwiGLU, RoPE with keys and values, embedding rows, host pages, DoRA's scales."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from loray_kernels.cuda.launch import SUFFIX, Launcher
from loray_kernels.cuda.tables import Rows
from loray_kernels.cuda.vectors import OfInput
from loray_kernels.kv import KvLayout

_THREADS, _NORM_THREADS = 128, 256  # as in csrc/rows.cu
_WARP, _NARROW = 32, 512  # a row up to so wide has a warp
_SILU_COLUMNS = 8 * _THREADS


class RowLaunches:
    """Each method queues one launch."""

    def __init__(self, launch: Launcher) -> None:
        self.launch = launch

    def rms_norm(
        self,
        x_TD: Tensor,
        sums: tuple[Tensor, Tensor] | None,
        weight_D: Tensor,
        eps: float,
        y_TD: Tensor,
        pool: Tensor,
        own: tuple[Tensor, Rows] | None,
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
        slots_T: Tensor,
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
                slots_T.data_ptr(),
            ),
        )

    def take_rows(self, y_TD: Tensor, tokens_N: Tensor, pool: Tensor, rows: Rows) -> None:
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

    def scale_recorded(
        self, y_TO: Tensor, bias_O: Tensor | None, pool: Tensor, rows_WS: Tensor, tables: OfInput
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
