"""The ops in C++. Shapes are those of `loray_kernels.ops`.

Each call with another dtype, with mixed dtypes, or with attention heads whose width is no multiple of 16, goes to the
reference. A token's results are the same, bit for bit, in any batch and for any chunking of its prompt; the C++ sources
say how.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loray_kernels.cpu.build import functions, pack_integers, packed_bytes, packed_size, sample_function, supported
from loray_kernels.cpu.structs import (
    pack_experts,
    pack_layer_tables,
    pack_layer_weights,
    pack_layout,
    pack_lora,
    pack_matrix,
    pack_meta,
    pack_rows,
    pack_segments,
    pack_step,
)
from loray_kernels.descriptors import RowOverrides, RowTables, token_rows
from loray_kernels.experts import has_expert_lora
from loray_kernels.kv import AttentionMeta, KvLayout
from loray_kernels.memory import SharedPages, huge_pages
from loray_kernels.ops import (
    AdapterSegments,
    ExpertWeights,
    LayerWeights,
    LinearWeights,
    LoraTable,
    ProjectionMatrix,
    QuantizedWeight,
    Scoring,
    StepInputs,
    TablesOf,
    VeraTable,
    Weight,
    join_weights,
)
from loray_kernels.reference import ReferenceOps
from loray_kernels.sampling import Drawn, Draws, TokenSlots, log_share

_CHOICE = np.dtype([("row", "i8"), ("mask", "i8"), ("temperature", "f8"), ("log_min_p", "f8"), ("uniform", "f8")])


class CpuOps(ReferenceOps):
    """The ops of one instruction set, with decoder layers as one call. `embed` is torch's: it is called once in a step,
    and copies rows.
    """

    def __init__(self, isa: str | None = None) -> None:
        """`isa`: "generic", "avx2", "avxvnni", "avx512" or "amx"; by default the fastest that this CPU has.

        BackendUnavailable if the library cannot be built, ValueError if the CPU lacks `isa`.
        """
        self.isa = isa or supported()[-1]
        self._functions = functions(self.isa)
        self._pages = SharedPages()

    def is_batch_invariant(self, dtype: torch.dtype) -> bool:
        return dtype in self._functions

    def _for(self, pool: Tensor, *others: Tensor) -> SimpleNamespace | None:
        """The kernels for these tensors; None if the call goes to the reference."""
        dtype = pool.dtype
        for other in others:
            if other.dtype != dtype:
                return None
        assert pool.is_cpu
        return self._functions.get(dtype)

    def has_kernel(self, weight: QuantizedWeight) -> bool:
        """Integers have kernels, with a scale a row or one for 16 columns or a multiple, and with whole zeros."""
        if weight.q_OI.dtype.is_floating_point or (weight.group % 16 and weight.scale_OG.shape[1] > 1):
            return False
        zero_OG, lowest = weight.zeros(), 0 if weight.is_int4 else -128
        return bool(((zero_OG == zero_OG.round()) & (zero_OG >= lowest) & (zero_OG <= lowest + 255)).all())

    def pack_linear(self, weights: Sequence[Weight], bias_O: Tensor | None = None) -> LinearWeights:
        joined = join_weights(weights)
        if not isinstance(joined, QuantizedWeight):
            return self._packed(joined, bias_O, self._pages.zeros)
        if not self.has_kernel(joined):
            return super().pack_linear([joined], bias_O)
        (out_features, in_features), bits, group = joined.shape, 4 if joined.is_int4 else 8, joined.group
        packed = self._pages.zeros(packed_bytes(self.isa, in_features, out_features, bits, group), torch.uint8)
        q_OI, scale_OG, zero_OG = (x.contiguous() for x in (joined.q_OI, joined.scale_OG, joined.zeros()))
        assert scale_OG.dtype is zero_OG.dtype is torch.float32
        pack_integers(self.isa)(
            q_OI.data_ptr(),
            scale_OG.data_ptr(),
            zero_OG.data_ptr(),
            in_features,
            out_features,
            bits,
            group,
            packed.data_ptr(),
            torch.get_num_threads(),
        )
        bias_O = None if bias_O is None else bias_O.contiguous()
        return LinearWeights(in_features, out_features, packed, bias_O, bits, group)

    def _packed(self, weight_OI: Tensor, bias_O: Tensor | None, zeros: Callable[..., Tensor]) -> LinearWeights:
        f = self._for(weight_OI)
        if f is None:
            return super().pack_linear([weight_OI], bias_O)
        weight_OI = weight_OI.contiguous()
        out_features, in_features = weight_OI.shape
        packed = zeros(packed_size(self.isa, in_features, out_features, weight_OI.itemsize), weight_OI.dtype)
        f.pack_linear(weight_OI.data_ptr(), in_features, out_features, packed.data_ptr(), torch.get_num_threads())
        return LinearWeights(in_features, out_features, packed, None if bias_O is None else bias_O.contiguous())

    def _reads(self, weights: LinearWeights, x_TI: Tensor) -> SimpleNamespace | None:
        """The kernels for a product with these weights; None if it goes to the reference."""
        if weights.bits:
            return self._functions.get(x_TI.dtype)
        data = weights.data
        return None if isinstance(data, QuantizedWeight) or data.dim() != 1 else self._for(data, x_TI)

    def _reads_all(self, weights: LayerWeights | ExpertWeights, x_TD: Tensor) -> bool:
        key = (self.isa, x_TD.dtype)
        found: bool | None = weights.prepared.get(key)
        if found is None:
            found = weights.prepared[key] = all(self._reads(m, x_TD) is not None for m in weights.matrices)
        return found

    def linear(self, x_TI: Tensor, weights: LinearWeights) -> Tensor:
        f = self._reads(weights, x_TI)
        if f is None and weights.bits:  # activations of another dtype
            bias_O = None if weights.bias_O is None else weights.bias_O.float()
            return self.linear(x_TI.float(), replace(weights, bias_O=bias_O)).to(x_TI.dtype)
        if f is None:
            return super().linear(x_TI, weights)
        return self._multiply(f.linear, x_TI, weights, x_TI.dtype)

    def logits(self, x_TD: Tensor, weights: LinearWeights) -> Tensor:
        f = self._reads(weights, x_TD)
        if f is None:
            return super().logits(x_TD, weights)
        return self._multiply(f.logits, x_TD, weights, torch.float32)

    def _multiply(self, function: Any, x_TI: Tensor, weights: LinearWeights, dtype: torch.dtype) -> Tensor:
        x_TI = token_rows(x_TI)
        num_tokens, width = x_TI.shape
        assert width == weights.in_features
        assert weights.bias_O is None or weights.bias_O.dtype is x_TI.dtype
        y_TO = torch.empty(num_tokens, weights.out_features, dtype=dtype)
        matrix, threads = _words(pack_matrix(weights)), torch.get_num_threads()
        function(x_TI.data_ptr(), x_TI.stride(0), num_tokens, matrix, y_TO.data_ptr(), threads)
        return y_TO

    def sample(self, logits_SV: Tensor, draws: Draws, slots: TokenSlots | None = None) -> Drawn:
        if logits_SV.dtype is not torch.float32 or logits_SV.stride(1) != 1 or slots is not None:
            return super().sample(logits_SV, draws, slots)
        num, words_MW = len(draws.rows), draws.words_MW
        choices = np.empty(num, dtype=_CHOICE)
        choices["row"], choices["mask"] = draws.rows, draws.masks
        choices["temperature"], choices["uniform"] = draws.temperature, draws.uniform
        choices["log_min_p"] = [log_share(p) for p in draws.min_p]
        assert max(draws.rows) < len(logits_SV)
        assert max(draws.masks) < (0 if words_MW is None else len(words_MW))
        assert words_MW is None or (32 * words_MW.shape[1] >= logits_SV.shape[1] and words_MW.stride(1) == 1)
        tokens, best = np.empty(num, dtype=np.int64), np.empty(num, dtype=np.float32)
        sample_function(self.isa)(
            logits_SV.data_ptr(),
            logits_SV.stride(0),
            logits_SV.shape[1],
            choices.ctypes.data,
            num,
            None if words_MW is None else words_MW.data_ptr(),
            0 if words_MW is None else words_MW.stride(0),
            tokens.ctypes.data,
            best.ctypes.data,
            torch.get_num_threads(),
        )
        drawn = tokens.tolist(), best.tolist()
        return lambda: drawn

    def silu_mul(self, gate_up_TM: Tensor) -> Tensor:
        f = self._for(gate_up_TM)
        return super().silu_mul(gate_up_TM) if f is None else _gated(f.silu_mul, gate_up_TM)

    def gelu_mul(self, gate_up_TM: Tensor) -> Tensor:
        f = self._for(gate_up_TM)
        return super().gelu_mul(gate_up_TM) if f is None else _gated(f.gelu_mul, gate_up_TM)

    def clamped_mul(self, gate_up_TM: Tensor, limit: float) -> Tensor:
        f = self._for(gate_up_TM)
        return super().clamped_mul(gate_up_TM, limit) if f is None else _gated(f.clamped_mul, gate_up_TM, limit)

    def choose_experts(self, logits_TE: Tensor, per_token: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
        f, logits_TE = self._functions[torch.float32], logits_TE.float().contiguous()
        num_tokens, num_experts = logits_TE.shape
        experts_TK = torch.empty(num_tokens, per_token, dtype=torch.int64)
        shares_TK = torch.empty(num_tokens, per_token)
        f.choose_experts(
            logits_TE.data_ptr(),
            num_tokens,
            num_experts,
            per_token,
            normalised,
            experts_TK.data_ptr(),
            shares_TK.data_ptr(),
            torch.get_num_threads(),
        )
        return experts_TK, shares_TK

    def experts(
        self,
        x_TD: Tensor,
        weights: ExpertWeights,
        pool: Tensor,
        lora: Mapping[str, LoraTable],
        segments: AdapterSegments,
        layer_offset: int,
    ) -> Tensor:
        f = self._for(x_TD)
        if f is None or not self._reads_all(weights, x_TD) or has_expert_lora(lora):
            return super().experts(x_TD, weights, pool, lora, segments, layer_offset)
        x_TD = x_TD.contiguous()
        packed = pack_experts(weights)
        assert packed.widths == x_TD.shape[1:]
        y_TD = torch.empty_like(x_TD)
        f.experts(x_TD.data_ptr(), x_TD.shape[0], packed.address, y_TD.data_ptr(), torch.get_num_threads())
        return y_TD

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
        f = self._for(pool, x_TD, weight_D)
        if f is None:
            return super().rms_norm(x_TD, weight_D, eps, pool, own, layer_offset, weight_offset)
        x_TD = token_rows(x_TD)
        num_heads = x_TD.shape[1] if x_TD.dim() == 3 else 1
        width = x_TD.shape[-1]
        y_TD = _like(x_TD)
        tokens, num_own, rows = None, 0, None
        if own is not None:
            tokens_N, packed = own.tokens_N.contiguous(), pack_rows(own.rows)
            tokens, num_own, rows = tokens_N.data_ptr(), tokens_N.shape[0], packed.address
            assert packed.widths == (width,)
        f.rms_norm(
            x_TD.data_ptr(),
            x_TD.stride(0),
            x_TD.shape[0],
            num_heads,
            width,
            weight_D.data_ptr(),
            eps,
            weight_offset,
            y_TD.data_ptr(),
            _address_at(pool, layer_offset),
            tokens,
            num_own,
            rows,
            torch.get_num_threads(),
        )
        return y_TD

    def rope_kv(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, step: StepInputs, layer: int) -> Tensor:
        pool, layout = step.pool, step.layout
        f = self._for(pool, q_THd, k_TKd, v_TKd, step.cos_Td, step.sin_Td)
        if f is None or layout.head_dim % 16:  # as in `paged_attention`, which reads the keys as they are written
            return super().rope_kv(q_THd, k_TKd, v_TKd, step, layer)
        q_THd, k_TKd, v_TKd = token_rows(q_THd), token_rows(k_TKd), token_rows(v_TKd)
        cos_Td, sin_Td = step.cos_Td.contiguous(), step.sin_Td.contiguous()
        slot_mapping_T, threads = step.attention.slot_mapping_T.contiguous(), torch.get_num_threads()
        (num_tokens, _, d), turned = q_THd.shape, cos_Td.shape[1]
        assert cos_Td.shape == sin_Td.shape
        assert cos_Td.shape[0] == num_tokens
        assert turned <= d
        assert turned % 2 == 0
        assert k_TKd.shape == v_TKd.shape == (num_tokens, layout.num_kv_heads, layout.head_dim)
        assert slot_mapping_T.shape == (num_tokens,)
        out_THd, keys_TKd = _like(q_THd), _like(k_TKd)
        for x, y in ((q_THd, out_THd), (k_TKd, keys_TKd)):
            tables = cos_Td.data_ptr(), sin_Td.data_ptr()
            f.rope(x.data_ptr(), x.stride(0), num_tokens, x.shape[1], d, turned, *tables, y.data_ptr(), threads)
        f.write_kv(
            _address_at(pool, layer * layout.layer_share),
            pack_layout(layout).address,
            keys_TKd.data_ptr(),
            keys_TKd.stride(0),
            v_TKd.data_ptr(),
            v_TKd.stride(0),
            slot_mapping_T.data_ptr(),
            num_tokens,
            threads,
        )
        return out_THd

    def paged_attention(
        self,
        q_THd: Tensor,
        pool: Tensor,
        layout: KvLayout,
        layer: int,
        meta: AttentionMeta,
        scoring: Scoring,
    ) -> Tensor:
        sinks_H = scoring.sinks_H
        f = self._for(pool, q_THd, *(() if sinks_H is None else (sinks_H,)))
        if f is None or layout.head_dim % 16:
            return super().paged_attention(q_THd, pool, layout, layer, meta, scoring)
        assert sinks_H is None or (sinks_H.is_contiguous() and sinks_H.shape == q_THd.shape[1:2])
        q_THd = token_rows(q_THd)
        packed = pack_meta(meta, layout.block_tokens)
        num_heads = q_THd.shape[1]
        assert q_THd.shape[2] == layout.head_dim
        assert num_heads % layout.num_kv_heads == 0
        assert packed.widths == (q_THd.shape[0],)
        out_THd = _like(q_THd)
        f.paged_attention(
            q_THd.data_ptr(),
            q_THd.stride(0),
            out_THd.data_ptr(),
            num_heads,
            pool.data_ptr(),
            pack_layout(layout).address,
            layer,
            packed.address,
            scoring.scale,
            scoring.window or 0,
            scoring.soft_cap or 0.0,
            None if sinks_H is None else sinks_H.data_ptr(),
            torch.get_num_threads(),
        )
        return out_THd

    def decoder_layers(
        self, x_TD: Tensor, weights: Sequence[LayerWeights], tables: TablesOf, step: StepInputs, first: int
    ) -> Tensor | None:
        f = self._for(step.pool, x_TD, step.cos_Td)
        if f is None or step.layout.head_dim % 16 or not all(self._reads_all(w, x_TD) for w in weights):
            return None
        if any(w.experts is not None and has_expert_lora(tables(i).lora) for i, w in enumerate(weights, first)):
            return None
        inputs = pack_step(step)
        numbers = range(first, min(first + len(weights) + 1, step.layout.num_layers))  # the next one's rows as well
        packed = [pack_layer_weights(w) for w in weights]
        own = [pack_layer_tables(tables(i), weights[0], self._pair_weights) for i in numbers]
        assert x_TD.is_contiguous()
        assert all(x_TD.shape == (*inputs.widths, *p.widths) for p in packed)
        assert all(t.num in (0, inputs.num) for t in own)
        f.layers(
            x_TD.data_ptr(),
            _words([p.address for p in packed]),
            _words([t.address for t in own]),
            len(own),
            inputs.address,
            first,
            len(packed),
            torch.get_num_threads(),
        )
        return x_TD

    def lora_shrink(
        self, x_TI: Tensor, pool: Tensor, tables: tuple[LoraTable, ...], segments: AdapterSegments, layer_offset: int
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
        f.lora_shrink(
            x_TI.data_ptr(),
            x_TI.stride(0),
            _address_at(pool, layer_offset),
            _words(addresses),
            _words(outputs),
            len(tables),
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
        segments: AdapterSegments,
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
        f.lora_expand(
            _words(targets),
            _address_at(pool, layer_offset),
            _words(addresses),
            len(tables),
            spans.address,
            torch.get_num_threads(),
        )

    def vera_shrink(self, x_TI: Tensor, a_RI: ProjectionMatrix) -> Tensor:
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
            _words(pack_matrix(self._pair_weights(table.b_OR, rank), width)),
            _address_at(pool, layer_offset),
            d.address,
            b.address,
            torch.get_num_threads(),
        )

    def scale_rows(
        self, y_TO: Tensor, bias_O: Tensor | None, pool: Tensor, own: RowOverrides, layer_offset: int
    ) -> None:
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
            _address_at(pool, layer_offset),
            tokens_N.data_ptr(),
            tokens_N.shape[0],
            rows.address,
            torch.get_num_threads(),
        )

    def turn_rows(
        self, y_TO: Tensor, pool: Tensor, own: RowOverrides, turn: RowTables, distance_N: Tensor, layer_offset: int
    ) -> None:
        f = self._for(pool, y_TO)
        if f is None or y_TO.stride(1) != 1:
            super().turn_rows(y_TO, pool, own, turn, distance_N, layer_offset)
            return
        tokens_N, distance_N, width = own.tokens_N.contiguous(), distance_N.contiguous(), y_TO.shape[1]
        rows, turns = pack_rows(own.rows), pack_rows(turn)
        assert rows.widths == turns.widths == (width,)
        assert rows.num == turns.num == tokens_N.shape[0] == distance_N.shape[0]
        f.turn_rows(
            y_TO.data_ptr(),
            y_TO.stride(0),
            width,
            _address_at(pool, layer_offset),
            tokens_N.data_ptr(),
            tokens_N.shape[0],
            rows.address,
            turns.address,
            distance_N.data_ptr(),
            torch.get_num_threads(),
        )

    def _pair_weights(self, matrix: ProjectionMatrix, width: int) -> LinearWeights:
        """The first `width` columns in panels, outside of the pool: made once for all layers and steps."""
        key = (self.isa, width)
        weights: LinearWeights | None = matrix.prepared.get(key)
        if weights is None:
            assert width <= matrix.data.shape[1]
            weights = matrix.prepared[key] = self._packed(matrix.data[:, :width], None, huge_pages)
        return weights


def _gated(function: Any, gate_up_TM: Tensor, *limit: float) -> Tensor:
    gate_up_TM = token_rows(gate_up_TM)
    num_tokens, width = gate_up_TM.shape[0], gate_up_TM.shape[1] // 2
    y_TM = gate_up_TM.new_empty(num_tokens, width)
    x = gate_up_TM.data_ptr(), gate_up_TM.stride(0), num_tokens, width
    function(*x, *limit, y_TM.data_ptr(), torch.get_num_threads())
    return y_TM


def _words(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """An argument that C reads during the call."""
    return (ctypes.c_int64 * len(values))(*values)


def _address_at(pool: Tensor, offset: int) -> int:
    return pool.data_ptr() + offset * pool.element_size()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
