"""The ops in C++ on the CPU: csrc's kernels for bf16 and fp32.

Shapes as in `loray_kernels.ops`. A token's results are the same, bit for bit, in any batch and for any chunking of its
prompt; the C++ sources say how.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
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
from loray_kernels.cpu.dense import DenseOps, address_at
from loray_kernels.cpu.tables import (
    pack_layer_tables,
    pack_layer_weights,
    pack_lora,
    pack_matrix,
    pack_rows,
    pack_segments,
    pack_step,
    pack_words,
)
from loray_kernels.layout import token_rows
from loray_kernels.memory import huge_pages
from loray_kernels.vectors import TokenRows


class CpuOps(DenseOps):
    """Adds the ops of adapters, and decoder layers as one call."""

    def decoder_layers(
        self, x_TD: Tensor, weights: Sequence[LayerWeights], tables: TablesOf, step: StepInputs, first: int
    ) -> Tensor | None:
        """Writes `x_TD`."""
        matrices = [m.data for w in weights for m in (w.qkv, w.o, w.gate_up, w.down)]
        f = self._for(step.pool, x_TD, step.cos_Td, *matrices)
        if f is None or step.layout.head_dim % 16 or any(m.dim() != 1 for m in matrices):
            return None
        inputs = pack_step(step)
        numbers = range(first, min(first + len(weights) + 1, step.layout.num_layers))  # the next one's rows as well
        packed = [pack_layer_weights(w) for w in weights]
        own = [pack_layer_tables(tables(i), weights[0], self._pair_weights) for i in numbers]
        assert x_TD.is_contiguous()
        assert all(x_TD.shape == (*inputs.widths, *p.widths) for p in packed)
        assert all(t.num in (0, inputs.num) for t in own)
        weights_address, held = pack_words([p.address for p in packed])
        tables_address, kept = pack_words([t.address for t in own])
        f.layers(
            x_TD.data_ptr(),
            weights_address,
            tables_address,
            len(own),
            inputs.address,
            first,
            len(packed),
            torch.get_num_threads(),
        )
        del held, kept  # until here C reads them
        return x_TD

    def lora_shrink(
        self, x_TI: Tensor, pool: Tensor, tables: tuple[LoraTable, ...], segments: Segments, layer_offset: int
    ) -> tuple[Tensor, ...]:
        f = self._for(pool, x_TI)
        if f is None:
            return super().lora_shrink(x_TI, pool, tables, segments, layer_offset)
        x_TI, spans = token_rows(x_TI), pack_segments(segments)
        num_tokens, width = x_TI.shape
        assert spans.widths[0] <= num_tokens
        addresses: list[int] = []
        outputs: list[int] = []
        h = []
        for table in tables:
            packed = pack_lora(table)
            assert packed.widths[0] == width
            assert packed.num == spans.num
            h_TR = torch.zeros(num_tokens, packed.widths[2])  # the kernel does not write tokens without an adapter
            h.append(h_TR)
            addresses.append(packed.address)
            outputs += (h_TR.data_ptr(), packed.widths[2])
        num = len(tables)
        f.lora_shrink(
            x_TI.data_ptr(),
            x_TI.stride(0),
            address_at(pool, layer_offset),
            (ctypes.c_int64 * num)(*addresses),
            (ctypes.c_int64 * (2 * num))(*outputs),
            num,
            spans.address,
            torch.get_num_threads(),
        )
        return tuple(h)

    def lora_expand(
        self,
        outputs: tuple[Tensor, ...],
        h: tuple[Tensor, ...],
        pool: Tensor,
        tables: tuple[LoraTable, ...],
        segments: Segments,
        layer_offset: int,
    ) -> None:
        f = self._for(pool, *outputs)
        if f is None or any(y.stride(1) != 1 for y in outputs) or any(t.dtype is not torch.float32 for t in h):
            super().lora_expand(outputs, h, pool, tables, segments, layer_offset)
            return
        spans = pack_segments(segments)
        addresses: list[int] = []
        targets: list[int] = []
        keep = []
        for y_TO, h_TR, table in zip(outputs, h, tables, strict=True):
            h_TR, packed = token_rows(h_TR), pack_lora(table)
            assert packed.widths[1] == y_TO.shape[1]
            assert packed.widths[2] <= h_TR.shape[1]
            assert spans.widths[0] <= y_TO.shape[0] == h_TR.shape[0]
            assert packed.num == spans.num
            keep.append(h_TR)
            addresses.append(packed.address)
            targets += (y_TO.data_ptr(), y_TO.stride(0), h_TR.data_ptr(), h_TR.stride(0))
        num = len(tables)
        f.lora_expand(
            (ctypes.c_int64 * (4 * num))(*targets),
            address_at(pool, layer_offset),
            (ctypes.c_int64 * num)(*addresses),
            num,
            spans.address,
            torch.get_num_threads(),
        )

    def vera_shrink(self, x_TI: Tensor, a_RI: PairMatrix) -> Tensor:
        f = self._for(a_RI.data, x_TI)
        if f is None:
            return super().vera_shrink(x_TI, a_RI)
        return self._multiply(f.vera_shrink, x_TI, self._pair_weights(a_RI, x_TI.shape[1]), torch.float32)

    def vera_expand(self, y_TO: Tensor, z_TR: Tensor, pool: Tensor, table: VeraTable, layer_offset: int) -> None:
        f = self._for(pool, y_TO, table.b_OR.data)
        if f is None or y_TO.stride(1) != 1 or z_TR.dtype is not torch.float32:
            super().vera_expand(y_TO, z_TR, pool, table, layer_offset)
            return
        z_TR, y_TO = token_rows(z_TR), y_TO[table.start : table.stop]
        (num_tokens, rank), width = z_TR.shape, y_TO.shape[1]
        d, b = pack_rows(table.d), pack_rows(table.b)
        assert y_TO.shape[0] == num_tokens == d.num == b.num
        assert d.widths == (rank,)
        assert b.widths == (width,)
        f.vera_expand(
            y_TO.data_ptr(),
            y_TO.stride(0),
            z_TR.data_ptr(),
            z_TR.stride(0),
            num_tokens,
            (ctypes.c_int64 * 4)(*pack_matrix(self._pair_weights(table.b_OR, rank), width)),
            address_at(pool, layer_offset),
            d.address,
            b.address,
            torch.get_num_threads(),
        )

    def scale_rows(self, y_TO: Tensor, bias_O: Tensor | None, pool: Tensor, own: TokenRows, layer_offset: int) -> None:
        f = self._for(pool, y_TO, *(() if bias_O is None else (bias_O,)))
        if f is None or y_TO.stride(1) != 1:
            super().scale_rows(y_TO, bias_O, pool, own, layer_offset)
            return
        tokens_N, rows, width = own.tokens_N.contiguous(), pack_rows(own.rows), y_TO.shape[1]
        assert rows.widths == (width,)
        assert rows.num == tokens_N.shape[0]
        assert bias_O is None or (bias_O.is_contiguous() and bias_O.shape == (width,))
        f.scale_rows(
            y_TO.data_ptr(),
            y_TO.stride(0),
            width,
            None if bias_O is None else bias_O.data_ptr(),
            address_at(pool, layer_offset),
            tokens_N.data_ptr(),
            tokens_N.shape[0],
            rows.address,
            torch.get_num_threads(),
        )

    def _pair_weights(self, matrix: PairMatrix, width: int) -> LinearWeights:
        """The first `width` columns in panels, outside of the pool: made once for all layers and steps."""
        key = ("cpu", self.isa, width)
        weights: LinearWeights | None = matrix.memo.get(key)
        if weights is None:
            assert width <= matrix.data.shape[1]
            weights = matrix.memo[key] = self._packed(matrix.data[:, :width], None, huge_pages)
        return weights
