"""A step's tables and weights as C++ structs. A packed table is kept in the table's memo."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from struct import pack, unpack
from typing import Any, NamedTuple

from loray_kernels.descriptors import RowOverrides, RowTables, row_size
from loray_kernels.kv import AttentionMeta, KvLayout
from loray_kernels.ops import (
    AdapterSegments,
    LayerTables,
    LayerWeights,
    LinearWeights,
    LoraTable,
    ProjectionMatrix,
    StepInputs,
    VeraTable,
)


class CStruct(NamedTuple):
    """`address` is passed to C; `keep` holds the memory that it points to. `widths` and `num` are for checks: C makes
    none.
    """

    address: int
    keep: tuple[Any, ...]
    widths: tuple[int, ...]
    num: int


def pack_words(values: list[int]) -> tuple[int, array[int]]:
    """Pack int64 words; returns their address, and what holds them."""
    packed = array("q", values)
    return packed.buffer_info()[0], packed


def pack_rows(rows: RowTables) -> CStruct:
    """widths: (columns); num: rows."""
    packed: CStruct | None = rows.memo.get("cpu")
    if packed is None:
        words, keep, (num, width) = [len(rows.segments)], [], row_size(rows)
        for column, columns, offsets_R in rows.segments:
            offsets_R = offsets_R.contiguous()
            words += (column, columns, offsets_R.data_ptr())
            keep.append(offsets_R)
        address, held = pack_words(words)
        packed = rows.memo["cpu"] = CStruct(address, (held, *keep), (width,), num)
    return packed


def pack_lora(table: LoraTable) -> CStruct:
    """widths: (in, out, largest rank); num: adapters."""
    packed: CStruct | None = table.memo.get("cpu")
    if packed is None:
        a, b, starts = pack_rows(table.a), pack_rows(table.b), table.rank_start
        assert starts[-1] <= min(a.num, b.num)
        start_address, start = pack_words(list(starts))
        scale = array("f", table.scale)
        address, held = pack_words([a.address, b.address, start_address, scale.buffer_info()[0]])
        widths = (a.widths[0], b.widths[0], table.max_rank)
        packed = table.memo["cpu"] = CStruct(address, (held, a, b, start, scale), widths, len(table.scale))
    return packed


def pack_segments(segments: AdapterSegments) -> CStruct:
    """widths: (tokens at least); num: adapters."""
    packed: CStruct | None = segments.memo.get("cpu")
    if packed is None:
        (start_address, start), (stop_address, stop) = pack_words(list(segments.start)), pack_words(list(segments.stop))
        address, held = pack_words([len(start), start_address, stop_address])
        last = max(segments.stop, default=0)
        packed = segments.memo["cpu"] = CStruct(address, (held, start, stop), (last,), len(start))
    return packed


def pack_meta(meta: AttentionMeta, block_tokens: int) -> CStruct:
    """widths: (tokens); num: sequences."""
    packed: CStruct | None = meta.memo.get("cpu")
    if packed is None:
        tables = [t.contiguous() for t in meta.block_table]
        assert all(t.shape[0] * block_tokens >= c for t, c in zip(tables, meta.context_len, strict=True))
        (query_address, query), (context_address, context) = (
            pack_words(list(meta.query_start)),
            pack_words(list(meta.context_len)),
        )
        table_address, pointers = pack_words([t.data_ptr() for t in tables])
        address, held = pack_words([len(context), query_address, context_address, table_address])
        keep = (held, query, context, pointers, *tables)
        packed = meta.memo["cpu"] = CStruct(address, keep, (meta.query_start[-1],), len(context))
    return packed


@cache
def pack_layout(layout: KvLayout) -> CStruct:
    address, held = pack_words([layout.num_layers, layout.block_tokens, layout.num_kv_heads, layout.head_dim])
    return CStruct(address, (held,), (), 0)


def pack_matrix(weights: LinearWeights, width: int | None = None) -> list[int]:
    """The words of a Matrix, or of its first `width` outputs."""
    bias = 0 if weights.bias_O is None else weights.bias_O.data_ptr()
    assert width is None or width <= weights.out_features
    return [weights.in_features, width or weights.out_features, weights.data.data_ptr(), bias]


def pack_layer_weights(weights: LayerWeights) -> CStruct:
    """widths: (hidden)."""
    packed: CStruct | None = weights.memo.get("cpu")
    if packed is None:
        norms = (weights.attention_norm_D, weights.q_norm_d, weights.k_norm_d, weights.mlp_norm_D)
        words = [0 if norm is None else norm.data_ptr() for norm in norms]
        for matrix in (weights.qkv, weights.o, weights.gate_up, weights.down):
            words += pack_matrix(matrix)
        words += [weights.num_heads, *unpack("qq", pack("dd", weights.eps, weights.scale))]
        address, held = pack_words(words)
        packed = weights.memo["cpu"] = CStruct(address, (held,), (weights.qkv.in_features,), 0)
    return packed


class _Module(NamedTuple):
    """`width` columns of the result from `column` on."""

    name: str
    width: int
    column: int


PackPair = Callable[[ProjectionMatrix, int], LinearWeights]  # packs so many columns of a matrix of a pair


def pack_layer_tables(tables: LayerTables, weights: LayerWeights, pack_pair: PackPair) -> CStruct:
    """num: adapters of each LoRA table, or 0. Column offsets are those of `weights`, the same in every layer."""
    packed: CStruct | None = tables.memo.get("cpu")
    if packed is None:
        keep: list[Any] = []
        words = []
        for name in ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"):
            words += _own_rows(tables.norms.get(name), keep)
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
            words += _lora_group(tables, in_features, modules, keep)
            words += _vera_group(tables, in_features, modules, keep, pack_pair)
            words += _dora_group(tables, modules, keep)
        address, held = pack_words(words)
        counts = {len(t.scale) for t in tables.lora.values()}
        assert len(counts) <= 1
        packed = tables.memo["cpu"] = CStruct(address, (held, *keep), (), counts.pop() if counts else 0)
    return packed


def _own_rows(own: RowOverrides | None, keep: list[Any]) -> list[int]:
    if own is None:
        return [0, 0, 0]
    tokens_N, rows = own.tokens_N.contiguous(), pack_rows(own.rows)
    keep += (tokens_N, rows)
    return [tokens_N.shape[0], tokens_N.data_ptr(), rows.address]


def _lora_group(tables: LayerTables, in_features: int, modules: list[_Module], keep: list[Any]) -> list[int]:
    """The first words of a Group: LoRA of the modules of one input."""
    addresses, columns, ranks = [], [], []
    for module, width, column in modules:
        table = tables.lora.get(module)
        if table is not None:
            packed = pack_lora(table)
            assert packed.widths[:2] == (in_features, width)
            addresses.append(packed.address)
            columns.append(column)
            ranks.append(packed.widths[2])
    words = [len(addresses)]
    for values in (addresses, columns, ranks):
        address, held = pack_words(values)
        keep.append(held)
        words.append(address)
    return words


def _vera_group(
    tables: LayerTables, in_features: int, modules: list[_Module], keep: list[Any], pack_pair: PackPair
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
            keep += (d, b, weights)
            own += (*pack_matrix(weights, width), d.address, b.address, table.start, d.num, column)
        weights, (address, held) = pack_pair(a_RI, in_features), pack_words(own)
        keep += (held, weights)
        words += (*pack_matrix(weights), first, stop - first, len(inside), address)
    address, held = pack_words(words)
    keep.append(held)
    return [len(spans), address]


def _dora_group(tables: LayerTables, modules: list[_Module], keep: list[Any]) -> list[int]:
    """The last words of a Group: the columns that DoRA scales, by module."""
    words: list[int] = []
    for module, width, column in modules:
        if (own := tables.dora.get(module)) is not None:
            assert pack_rows(own.rows).widths == (width,)
            words += (*_own_rows(own, keep), column, width)
    address, held = pack_words(words)
    keep.append(held)
    return [len(words) // 5, address]


def pack_step(step: StepInputs) -> CStruct:
    """widths: (tokens); num: adapters."""
    packed: CStruct | None = step.memo.get("cpu")
    if packed is None:
        meta, spans = pack_meta(step.attention, step.layout.block_tokens), pack_segments(step.segments)
        slot_mapping_T, cos_Td, sin_Td = (
            step.attention.slot_mapping_T.contiguous(),
            step.cos_Td.contiguous(),
            step.sin_Td.contiguous(),
        )
        num_tokens = slot_mapping_T.shape[0]
        assert meta.widths == (num_tokens,)
        assert spans.widths[0] <= num_tokens
        assert cos_Td.shape == sin_Td.shape == (num_tokens, step.layout.head_dim)
        layout = pack_layout(step.layout)
        pointers = (step.pool.data_ptr(), cos_Td.data_ptr(), sin_Td.data_ptr())
        words = [num_tokens, *pointers, layout.address, meta.address, slot_mapping_T.data_ptr(), spans.address]
        address, held = pack_words(words)
        keep = (held, meta, spans, slot_mapping_T, cos_Td, sin_Td, layout, step.pool)
        packed = step.memo["cpu"] = CStruct(address, keep, (num_tokens,), spans.num)
    return packed
