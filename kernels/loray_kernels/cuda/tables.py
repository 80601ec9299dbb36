"""A step's tables on the device.

All are int64, except scales, which are fp32. Each table is uploaded from the host in one copy.
Shapes: S sequences, N adapters, M modules of one input, R rows of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from loray_kernels.descriptors import (
    INPUTS,
    Columns,
    DescriptorTable,
    RowOverrides,
    RowTables,
    StepVectors,
    VectorShape,
    row_size,
)
from loray_kernels.kv import AttentionMeta, KvLayout, to_device
from loray_kernels.ops import AdapterSegments, LoraTable
from loray_kernels.prepare import prepare_once

# If an adapter has fewer tokens in the step, they are gathered, GATHER_TOKENS at a time; else they form tiles.
GATHER_BELOW = 16
GATHER_TOKENS = 4
TILE_TOKENS = 32
TILE_COLUMNS = 128
VECTOR_TILE_COLUMNS = 64  # of VeRA's outputs
TILE_QUERIES = 64
SPLIT, MAX_SPLITS = 256, 64  # positions of a decoding sequence that one block reads, and how many of them; attention.cu
MAX_MODULES = 3  # outputs of one expand launch
_SCALE_COLUMNS = 512

Packed = TypeVar("Packed")


class DeviceRows(NamedTuple):
    """`num` rows. offsets: segment by segment, `num` each; segments: (first column, columns) of each."""

    offsets: Tensor
    segments: Tensor
    num_segments: int
    num: int
    width: int


class Items(NamedTuple):
    """(adapter, first token, tokens), `num` of them."""

    data: Tensor
    num: int


class Spans(NamedTuple):
    gathered: Items
    tiled: Items
    last_token: int


class Shrink(NamedTuple):
    """Rows of A of all modules of an input, ordered by adapter, then module.

    row_start_N1  adapter n has rows row_start[n]:row_start[n+1]
    h_column_R    the column of h that a row computes
    max_rows      the most rows of an adapter
    widths        the number of columns of h of each module
    """

    rows: DeviceRows
    row_start_N1: Tensor
    h_column_R: Tensor
    max_rows: int
    widths: tuple[int, ...]


class Expand(NamedTuple):
    """Rows of B, for lora.cu. `offsets`: module by module, segment by segment; `ranks`: the largest of each module."""

    offsets: Tensor
    tiles: Tensor
    rank_start_MN1: Tensor
    h_column_M: Tensor
    scale_MN: Tensor
    num_tiles: int
    num_adapters: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    multiple_of_8: bool


class LoraLaunch(NamedTuple):
    """The tables of one input for launches of LoRA by descriptor, equal for all adapters; see lora.cu."""

    segments: Tensor
    tiles: Tensor
    module_segments: Tensor
    num_segments: int
    num_tiles: int
    num_modules: int


class AttentionTables(NamedTuple):
    """`decoded`: (sequence, token) with one query; `prefilled`: (sequence, first query of a tile)."""

    query_start: Tensor
    context_len: Tensor
    table_start: Tensor
    blocks: Tensor
    decoded: Items
    prefilled: Items
    max_splits: int


def upload(device: torch.device, *lists: Sequence[int]) -> tuple[Tensor, ...]:
    """Upload each list as an int64 tensor; one copy for all."""
    flat = torch.tensor([v for values in lists for v in values], dtype=torch.int64)
    return torch.split(to_device(flat, device), [len(values) for values in lists])


def cut(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut `length` into parts of at most `size`: (start, length) of each."""
    for start in range(0, length, size):
        yield start, min(size, length - start)


@prepare_once
def pack_rows(rows: RowTables) -> DeviceRows:
    offsets = [o for _, _, o in rows.segments]
    num, width = row_size(rows)
    (segments,) = upload(offsets[0].device, [v for column, columns, _ in rows.segments for v in (column, columns)])
    return DeviceRows(_joined(offsets), segments, len(offsets), num, width)


@prepare_once
def pack_token_rows(own: RowOverrides, num_tokens: int) -> Tensor:
    """Find each token's row in `own.rows`; −1: it has none."""
    numbers_N = torch.arange(own.tokens_N.shape[0], device=own.tokens_N.device)
    index_T = torch.full((num_tokens,), -1, dtype=torch.int64, device=own.tokens_N.device)
    index_T[own.tokens_N] = numbers_N.masked_fill(own.rows.segments[0][2] < 0, -1)
    return index_T


@prepare_once
def pack_spans(segments: AdapterSegments, device: torch.device) -> Spans:
    gathered, tiled = list[int](), list[int]()
    for n, (start, stop) in enumerate(zip(segments.start, segments.stop, strict=True)):
        few = stop - start < GATHER_BELOW
        items, size = (gathered, GATHER_TOKENS) if few else (tiled, TILE_TOKENS)
        for first, num in cut(stop - start, size):
            items += (n, start + first, num)
    gathered_data, tiled_data = upload(device, gathered, tiled)
    both = Items(gathered_data, len(gathered) // 3), Items(tiled_data, len(tiled) // 3)
    return Spans(*both, max(segments.stop, default=0))


def pack_shrink(tables: tuple[LoraTable, ...]) -> Shrink:
    return _prepared(_shrink, tables)


def pack_expand(tables: tuple[LoraTable, ...]) -> Expand:
    return _prepared(_expand, tables)


def _prepared(make: Callable[[tuple[LoraTable, ...]], Packed], tables: tuple[LoraTable, ...]) -> Packed:
    """make(tables), kept in the first table. Its key has the others' ids, so these are kept as well."""
    kept: dict[object, tuple[object, Packed]] = tables[0].prepared
    key = (make, *map(id, tables[1:]))
    if key not in kept:
        kept[key] = (tables[1:], make(tables))
    return kept[key][1]


def _shrink(tables: tuple[LoraTable, ...]) -> Shrink:
    device = tables[0].a.segments[0][2].device
    widths = tuple(table.max_rank for table in tables)
    # The first row of each module, among the rows of all tables and among the columns of h.
    base, h_base = [0], [0]
    for table, width in zip(tables, widths, strict=True):
        assert len(table.rank_start) == len(tables[0].rank_start)
        base.append(base[-1] + table.a.segments[0][2].shape[0])
        h_base.append(h_base[-1] + width)
    order: list[int] = []
    h_column: list[int] = []
    row_start = [0]
    for n in range(len(tables[0].scale)):
        for m, table in enumerate(tables):
            first, last = table.rank_start[n], table.rank_start[n + 1]
            order += range(base[m] + first, base[m] + last)
            h_column += range(h_base[m], h_base[m] + last - first)
        row_start.append(len(order))
    layout = [(column, width) for column, width, _ in tables[0].a.segments]
    for table in tables:
        assert [(column, width) for column, width, _ in table.a.segments] == layout
    order_R, h_column_R, row_start_N1, segments = upload(
        device, order, h_column, row_start, [v for pair in layout for v in pair]
    )
    offsets = [_joined([t.a.segments[s][2] for t in tables])[order_R] for s in range(len(layout))]
    rows = DeviceRows(_joined(offsets), segments, len(layout), len(order), sum(width for _, width in layout))
    most = max((stop - start for start, stop in pairwise(row_start)), default=0)
    return Shrink(rows, row_start_N1, h_column_R, most, widths)


def _expand(tables: tuple[LoraTable, ...]) -> Expand:
    device = tables[0].b.segments[0][2].device
    tiles: list[int] = []
    offsets: list[Tensor] = []
    rank_start: list[int] = []
    ranks = tuple(table.max_rank for table in tables)
    start = 0
    for m, table in enumerate(tables):
        for column, width, offsets_R in table.b.segments:
            for first, num in cut(width, TILE_COLUMNS):
                tiles += (m, start, first, column + first, num)
            offsets.append(offsets_R)
            start += offsets_R.shape[0]
        rank_start += table.rank_start
    h_column = [sum(ranks[:m]) for m in range(len(ranks))]
    tiles_C5, rank_start_MN1, h_column_M = upload(device, tiles, rank_start, h_column)
    scale_MN = to_device(torch.tensor([table.scale for table in tables], dtype=torch.float32), device)
    widths = tuple(sum(width for _, width, _ in table.b.segments) for table in tables)
    even = all(width % 8 == 0 for table in tables for _, width, _ in table.b.segments)
    return Expand(
        _joined(offsets),
        tiles_C5,
        rank_start_MN1,
        h_column_M,
        scale_MN,
        len(tiles) // 5,
        len(tables[0].scale),
        widths,
        ranks,
        even,
    )


@prepare_once
def pack_inputs(table: DescriptorTable) -> list[LoraLaunch]:
    """Make the tables of each input."""
    launches = []
    for a, b, *_ in table.inputs:
        tiles: list[int] = []
        for m, columns in enumerate(b):
            for s, (column, width) in enumerate(columns):
                for first, num in cut(width, TILE_COLUMNS):
                    tiles += (m, s, first, column + first, num)
        lists = [v for pair in a for v in pair], tiles, [len(s) for s in b]
        segments, tiles_C5, module_segments = upload(table.words.device, *lists)
        launches.append(LoraLaunch(segments, tiles_C5, module_segments, len(a), len(tiles) // 5, len(b)))
    return launches


def num_splits(longest: int) -> int:
    """Count the most splits that a decoding sequence of up to `longest` positions has."""
    return min(MAX_SPLITS, -(-longest // SPLIT))


@prepare_once
def pack_attention(meta: AttentionMeta, layout: KvLayout) -> AttentionTables:
    decoded, prefilled = list[int](), list[int]()
    lengths = [t.shape[0] for t in meta.block_table]
    longest = 0
    for i, (start, stop) in enumerate(pairwise(meta.query_start)):
        context = meta.context_len[i]
        assert lengths[i] * layout.block_tokens >= context
        if stop - start == 1:
            decoded += (i, start)
            longest = max(longest, context)
        else:
            prefilled += [v for first, _ in cut(stop - start, TILE_QUERIES) for v in (i, first)]
    table_start = list(accumulate(lengths, initial=0))[:-1]
    query, context_len, tables, decoded_data, prefilled_data = upload(
        meta.slot_mapping_T.device, meta.query_start, meta.context_len, table_start, decoded, prefilled
    )
    return AttentionTables(
        query,
        context_len,
        tables,
        _joined(list(meta.block_table)),
        Items(decoded_data, len(decoded) // 2),
        Items(prefilled_data, len(prefilled) // 2),
        num_splits(longest),
    )


def three_outputs(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Pad `outputs` with the first: the expand kernels take MAX_MODULES of them."""
    return [*outputs, *outputs[:1] * (MAX_MODULES - 1)][:MAX_MODULES]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) != 1 else parts[0].contiguous()


class VectorLaunch(NamedTuple):
    """The tables of one input for launches of VeRA and of scales by descriptor; see vera.cu and rows.cu."""

    words_M: Tensor
    tiles: Tensor
    num_tiles: int
    scale_tiles: Tensor
    num_scale_tiles: int


@prepare_once
def pack_vectors(table: DescriptorTable, shape: VectorShape) -> list[VectorLaunch]:
    """Make the tables of each input."""
    launches = []
    for modules, own in zip(INPUTS, table.inputs, strict=False):
        words, tiles, scale_tiles = list[int](), list[int](), list[int]()
        column = scale_column = 0
        for module, row in zip(modules, own.pair_rows, strict=False):  # of B, the first of this rank
            d, (b, segments) = shape.slots[module, "vera_d"].word, shape.slots[module, "vera_b"]
            words.append(d)
            for s, (first, width) in enumerate(segments):
                for at, num in cut(width, VECTOR_TILE_COLUMNS):
                    tiles += (d, b + s, at, row + first + at, column + first + at, num)
            column += sum(width for _, width in segments)
            (scale, segments), turn = shape.slots[module, "scale"], shape.slots[module, "turn"].word
            for s, (first, width) in enumerate(segments):
                for at, num in cut(width, _SCALE_COLUMNS):
                    scale_tiles += (scale + s, at, scale_column + first + at, num)
                    scale_tiles += (scale, turn, segments[0][1], first + at)
            scale_column += sum(width for _, width in segments)
        words_M, tiles_C6, scale_tiles_C8 = upload(table.words.device, words, tiles, scale_tiles)
        launches.append(VectorLaunch(words_M, tiles_C6, len(tiles) // 6, scale_tiles_C8, len(scale_tiles) // 8))
    return launches


@prepare_once
def pack_columns(table: DescriptorTable, shape: VectorShape) -> dict[Columns, Tensor]:
    """Upload the segments of each kind of vector."""
    kinds = {columns for _, columns in shape.slots.values()}
    return {columns: upload(table.words.device, [v for pair in columns for v in pair])[0] for columns in kinds}


class CapturedVectors(StepVectors):
    """StepVectors whose rows are packed already, so that a capture uploads nothing."""

    def __init__(self, table: DescriptorTable, shape: VectorShape, starts_S: Tensor, items_S3: Tensor) -> None:
        super().__init__(shape, table.words, starts_S, items_S3)
        self._segments = pack_columns(table, shape)
        self._index_LWS = torch.where(self.rows_LWS >= 0, self.tokens_S, -1)

    def token_rows(self, layer: int | None, module: str, role: str) -> RowOverrides:
        word, columns = self.shape.slots[module, role]
        at = self.shape.num_layers if layer is None else layer
        own = super().token_rows(layer, module, role)
        own.prepared[pack_token_rows] = self._index_LWS[at, word]
        return self._packed(own, self.rows_LWS[at, word : word + len(columns)].view(-1), columns)

    def embedding_rows(self, offsets_S: Tensor) -> RowOverrides:
        columns = self.shape.slots["norm", "norm"].columns
        return self._packed(super().embedding_rows(offsets_S), offsets_S, columns)

    def _packed(self, own: RowOverrides, offsets: Tensor, columns: Columns) -> RowOverrides:
        width, num = sum(width for _, width in columns), self.tokens_S.shape[0]
        own.rows.prepared[pack_rows] = DeviceRows(offsets, self._segments[columns], len(columns), num, width)
        return own
