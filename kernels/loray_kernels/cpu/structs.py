"""A step's tables and weights as C++ structs."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate
from struct import pack, unpack
from typing import Any, NamedTuple

from torch import Tensor

from loray_kernels.descriptors import RowOverrides, RowTables, row_size
from loray_kernels.kv import AttentionMeta, KvLayout
from loray_kernels.ops import (
    AdapterSegments,
    ExpertWeights,
    LayerTables,
    LayerWeights,
    LinearWeights,
    LoraTable,
    ProjectionMatrix,
    StepInputs,
    VeraTable,
)
from loray_kernels.prepare import prepare_once


class CStruct(NamedTuple):
    """`address` is passed to C; `keep` holds the memory that it points to. `widths` and `num` are for checks: C makes
    none.
    """

    address: int
    keep: Kept
    widths: tuple[int, ...] = ()
    num: int = 0


class Kept(list[Any]):
    """The memory to which the words of a struct point."""

    def words(self, values: Iterable[int]) -> int:
        """Keep int64 words; returns their address."""
        return self._array(array("q", values))

    def floats(self, values: Iterable[float]) -> int:
        """Keep fp32 numbers; returns their address."""
        return self._array(array("f", values))

    def tensor(self, x: Tensor) -> int:
        """Keep `x`, or a copy if it is not contiguous; returns its address."""
        x = x.contiguous()
        self.append(x)
        return x.data_ptr()

    def struct(self, packed: CStruct) -> int:
        self.append(packed)
        return packed.address

    def _array(self, values: array[Any]) -> int:
        self.append(values)
        return values.buffer_info()[0]


@prepare_once
def pack_rows(rows: RowTables) -> CStruct:
    """widths: (columns); num: rows."""
    kept, (num, width) = Kept(), row_size(rows)
    words = [len(rows.segments)]
    for column, columns, offsets_R in rows.segments:
        words += (column, columns, kept.tensor(offsets_R))
    return CStruct(kept.words(words), kept, (width,), num)


@prepare_once
def pack_lora(table: LoraTable) -> CStruct:
    """widths: (in, out, largest rank); num: adapters."""
    kept, a, b = Kept(), pack_rows(table.a), pack_rows(table.b)
    assert table.rank_start[-1] <= min(a.num, b.num)
    words = [kept.struct(a), kept.struct(b), kept.words(table.rank_start), kept.floats(table.scale)]
    return CStruct(kept.words(words), kept, (a.widths[0], b.widths[0], table.max_rank), len(table.scale))


@prepare_once
def pack_segments(segments: AdapterSegments) -> CStruct:
    """widths: (tokens at least); num: adapters."""
    kept, num = Kept(), len(segments.start)
    words = [num, kept.words(segments.start), kept.words(segments.stop)]
    return CStruct(kept.words(words), kept, (max(segments.stop, default=0),), num)


@prepare_once
def pack_meta(meta: AttentionMeta, block_tokens: int) -> CStruct:
    """widths: (tokens); num: sequences."""
    assert all(t.shape[0] * block_tokens >= c for t, c in zip(meta.block_table, meta.context_len, strict=True))
    kept, num = Kept(), len(meta.context_len)
    words = [num, kept.words(meta.query_start), kept.words(meta.context_len)]
    words.append(kept.words([kept.tensor(table) for table in meta.block_table]))
    return CStruct(kept.words(words), kept, (meta.query_start[-1],), num)


@cache
def pack_layout(layout: KvLayout) -> CStruct:
    kept = Kept()
    return CStruct(kept.words(layout), kept)


def pack_matrix(weights: LinearWeights, width: int | None = None) -> list[int]:
    """The words of a Matrix, or of its first `width` outputs."""
    assert isinstance(weights.data, Tensor)
    bias = 0 if weights.bias_O is None else weights.bias_O.data_ptr()
    assert width is None or width <= weights.out_features
    outputs, kind = width or weights.out_features, (weights.bits, weights.group)
    return [weights.in_features, outputs, weights.data.data_ptr(), bias, *kind]


@prepare_once
def pack_experts(weights: ExpertWeights) -> CStruct:
    """widths: (hidden)."""
    kept = Kept()
    words = pack_matrix(weights.router)
    for matrices in (weights.gate_up, weights.down):
        words.append(kept.words([word for matrix in matrices for word in pack_matrix(matrix)]))
    limit = 0.0 if weights.limit is None else weights.limit
    words += (len(weights.down), weights.per_token, weights.normalised, *unpack("q", pack("d", limit)))
    return CStruct(kept.words(words), kept, (weights.router.in_features,))


@prepare_once
def pack_layer_weights(weights: LayerWeights) -> CStruct:
    """widths: (hidden)."""
    norms = [weights.attention_norm_D, weights.q_norm_d, weights.k_norm_d, weights.mlp_norm_D]
    norms += [weights.post_attention_norm_D, weights.post_mlp_norm_D]
    words = [0 if norm is None else norm.data_ptr() for norm in norms]
    for matrix in (weights.qkv, weights.o, weights.gate_up, weights.down):
        words += pack_matrix(matrix)
    kept = Kept()
    scoring = weights.scoring
    numbers = (weights.eps, scoring.scale, weights.norm_offset, scoring.soft_cap or 0.0)
    words += [weights.num_heads, *unpack("4q", pack("4d", *numbers))]
    words += [scoring.window or 0, weights.activation == "gelu_tanh"]
    words.append(0 if scoring.sinks_H is None else scoring.sinks_H.data_ptr())
    words.append(0 if weights.experts is None else kept.struct(pack_experts(weights.experts)))
    return CStruct(kept.words(words), kept, (weights.qkv.in_features,))


class _Module(NamedTuple):
    """`width` columns of the result from `column` on."""

    name: str
    width: int
    column: int


PackPair = Callable[[ProjectionMatrix, int], LinearWeights]  # packs so many columns of a matrix of a pair


@prepare_once
def pack_layer_tables(tables: LayerTables, weights: LayerWeights, pack_pair: PackPair) -> CStruct:
    """num: adapters of each LoRA table, or 0. Column offsets are those of `weights`, the same in every layer."""
    kept, words = Kept(), list[int]()
    names = ["input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "", ""]
    if weights.post_mlp_norm_D is not None:
        names[3:] = "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
    for name in names:
        words += _own_rows(tables.norms.get(name), kept)
    q_width, kv_width = weights.num_heads * weights.head_dim, weights.num_kv_heads * weights.head_dim
    hidden, middle = weights.o.out_features, weights.down.in_features
    inputs = (
        (weights.qkv.in_features, {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}),
        (weights.o.in_features, {"o_proj": hidden}),
        (weights.gate_up.in_features, {"gate_proj": middle, "up_proj": middle}),
        (weights.down.in_features, {"down_proj": hidden}),
    )
    for in_features, widths in inputs:
        columns = accumulate(widths.values(), initial=0)
        modules = [_Module(*place) for place in zip(widths, widths.values(), columns, strict=False)]
        words += _lora_group(tables, in_features, modules, kept)
        words += _vera_group(tables, in_features, modules, kept, pack_pair)
        words += _scaled_group(tables, modules, kept)
    counts = {len(t.scale) for t in tables.lora.values()}
    assert len(counts) <= 1
    return CStruct(kept.words(words), kept, num=counts.pop() if counts else 0)


def _own_rows(own: RowOverrides | None, kept: Kept) -> list[int]:
    if own is None:
        return [0, 0, 0]
    return [own.tokens_N.shape[0], kept.tensor(own.tokens_N), kept.struct(pack_rows(own.rows))]


def _lora_group(tables: LayerTables, in_features: int, modules: list[_Module], kept: Kept) -> list[int]:
    """The first words of a Group: LoRA of the modules of one input."""
    addresses, columns, ranks = [], [], []
    for module, width, column in modules:
        table = tables.lora.get(module)
        if table is not None:
            packed = pack_lora(table)
            assert packed.widths[:2] == (in_features, width)
            addresses.append(kept.struct(packed))
            columns.append(column)
            ranks.append(packed.widths[2])
    return [len(addresses), kept.words(addresses), kept.words(columns), kept.words(ranks)]


def _vera_group(
    tables: LayerTables, in_features: int, modules: list[_Module], kept: Kept, pack_pair: PackPair
) -> list[int]:
    """The middle words of a Group: its spans of tokens that share a pair, each with its modules."""
    spans: dict[int, list[tuple[VeraTable, int, int]]] = {}
    for module, width, column in modules:
        for table in tables.vera.get(module, ()):
            spans.setdefault(id(table.a_RI), []).append((table, width, column))
    words: list[int] = []
    for inside in spans.values():
        a_RI, rank = inside[0][0].a_RI, inside[0][0].a_RI.data.shape[0]
        first, stop = min(table.start for table, _, _ in inside), max(table.stop for table, _, _ in inside)
        own: list[int] = []
        for table, width, column in inside:
            d, b = pack_rows(table.d), pack_rows(table.b)
            assert d.num == b.num == table.stop - table.start
            assert (d.widths, b.widths) == ((rank,), (width,))
            weights = pack_pair(table.b_OR, rank)
            kept.append(weights)
            own += (*pack_matrix(weights, width), kept.struct(d), kept.struct(b), table.start, d.num, column)
        weights = pack_pair(a_RI, in_features)
        kept.append(weights)
        words += (*pack_matrix(weights), first, stop - first, len(inside), kept.words(own))
    return [len(spans), kept.words(words)]


def _scaled_group(tables: LayerTables, modules: list[_Module], kept: Kept) -> list[int]:
    """The last words of a Group: the columns that are scaled, by module."""
    words: list[int] = []
    for module, width, column in modules:
        for table in tables.scales.get(module, ()):
            assert pack_rows(table.own.rows).widths == (width,)
            words += (*_own_rows(table.own, kept), column, width, table.leaves_bias)
            if table.turn is None:
                words += (0, 0)
            else:
                assert pack_rows(table.turn.rows).widths == (width,)
                words += (kept.struct(pack_rows(table.turn.rows)), kept.tensor(table.turn.distance_N))
    return [len(words) // 8, kept.words(words)]


@prepare_once
def pack_step(step: StepInputs) -> CStruct:
    """widths: (tokens); num: adapters."""
    meta, spans = pack_meta(step.attention, step.layout.block_tokens), pack_segments(step.segments)
    num_tokens = step.attention.slot_mapping_T.shape[0]
    assert meta.widths == (num_tokens,)
    assert spans.widths[0] <= num_tokens
    assert step.cos_Td.shape == step.sin_Td.shape
    assert step.cos_Td.shape[0] == num_tokens
    assert step.cos_Td.shape[1] <= step.layout.head_dim
    kept = Kept([step.pool])
    words = [
        num_tokens,
        step.pool.data_ptr(),
        kept.tensor(step.cos_Td),
        kept.tensor(step.sin_Td),
        kept.struct(pack_layout(step.layout)),
        kept.struct(meta),
        kept.tensor(step.attention.slot_mapping_T),
        kept.struct(spans),
        step.cos_Td.shape[1],
    ]
    return CStruct(kept.words(words), kept, (num_tokens,), spans.num)
