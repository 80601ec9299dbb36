"""An adapter's matrices as rows of the pool, and where the rows are.

A LoRA pair is r rows of A (width in) and r rows of Bᵀ (width out). A VeRA vector, scales of a module's outputs less
one, RoAd's factors of the other of a pair, and a norm weight are one row each. A matrix of the role SUMMED is an A that
sums columns of its input and is not in the pool: it takes no rows, and its table says what kernels compute.

A row is at the same offset of every layer's share, so layers that have the same matrices form a group and share one
table. Groups have different layers, so all groups use the same rows of the pool. A row that is wider than a layer's
share is cut into segments of columns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loray.engine.memory.blocks import BlockKind, Extent, Geometry
from loray.methods.weights import Role

SUMMED: Role = "summed_a"
OF_INPUTS: frozenset[Role] = frozenset({"lora_a", SUMMED, "vera_d"})  # the parts of a fused module have them alike


class Matrix(NamedTuple):
    """`rows` rows of `width` elements. `scale` is that of PoolRows, and of vera_b the row of B that its first element
    multiplies, which is not 0 for parts of a fused module.
    """

    module: str
    role: Role
    rows: int
    width: int
    scale: float = 1.0


class LayerGroup(NamedTuple):
    layers: tuple[int, ...]
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """The matrices of an adapter without their values: what must be placed."""

    groups: tuple[LayerGroup, ...]
    flat: tuple[Matrix, ...]

    @classmethod
    def of(cls, layers: Mapping[int, Iterable[Matrix]], flat: Iterable[Matrix] = ()) -> AdapterShape:
        grouped: dict[tuple[Matrix, ...], list[int]] = defaultdict(list)
        for layer in sorted(layers):
            grouped[tuple(sorted(layers[layer]))].append(layer)
        groups = tuple(LayerGroup(tuple(ls), m) for m, ls in grouped.items() if m)
        return cls(groups=groups, flat=tuple(flat))

    def demand(self, geometry: Geometry) -> dict[BlockKind, dict[int, int]]:
        """Return the rows by kind and width; of layered rows the most that any group has."""
        layered: Counter[int] = Counter()
        for group in self.groups:
            layered |= rows_by_width(group.matrices, geometry.capacity(BlockKind.LAYERED))
        flat = rows_by_width(self.flat, geometry.capacity(BlockKind.FLAT))
        return {kind: dict(c) for kind, c in ((BlockKind.LAYERED, layered), (BlockKind.FLAT, flat)) if c}

    def num_blocks(self, geometry: Geometry) -> int:
        """Return the most blocks that the adapter takes, which is what it takes in an empty pool."""
        total = 0
        for kind, demand in self.demand(geometry).items():
            capacity = geometry.capacity(kind)
            tails: list[int] = []
            for width in sorted(demand, reverse=True):
                rows = demand[width]
                for i, tail in enumerate(tails):
                    n = min(tail // width, rows)
                    tails[i] -= n * width
                    rows -= n
                while rows:
                    n = min(capacity // width, rows)
                    tails.append(capacity - n * width)
                    rows -= n
            total += len(tails)
        return total


class Segment(NamedTuple):
    """Columns [column, column + width) of a matrix. `offsets`: each row's first element in the pool, for layer 0."""

    column: int
    width: int
    offsets: tuple[int, ...]


Table = Mapping[tuple[str, Role], tuple[Segment, ...]]


@dataclass(frozen=True, slots=True)
class RowTable:
    """Where an adapter's rows are. Layer l of a layered row is at its offset + l · layer_share.

    groups       one table for each group of the shape
    layer_group  the group of each layer of the base; -1 if the adapter has nothing there
    flat         rows without a layer
    """

    groups: tuple[Table, ...]
    layer_group: tuple[int, ...]
    flat: Table


def columns(width: int, capacity: int) -> list[tuple[int, int]]:
    """Return (column, width) of each segment of a row; one segment unless the row is wider than `capacity`."""
    num_segments = -(-width // capacity)
    step = -(-width // num_segments)
    return [(c, min(step, width - c)) for c in range(0, width, step)]


def pooled(m: Matrix, capacity: int) -> list[tuple[int, int]]:
    """Return the segments of a matrix's rows, as `columns`; none where the pool does not have them."""
    return columns(m.width, capacity) if m.role != SUMMED else []


def rows_by_width(matrices: Iterable[Matrix], capacity: int) -> Counter[int]:
    """Return {width of a segment: number of rows} of the matrices that are in the pool."""
    count: Counter[int] = Counter()
    for m in matrices:
        for _, width in pooled(m, capacity):
            count[width] += m.rows
    return count


def place(shape: AdapterShape, extents: Sequence[Extent], geometry: Geometry) -> RowTable:
    """Assign the rows of `extents`, which the allocator gave for `shape.demand(geometry)`, to the matrices."""
    layered = _offsets((e for e in extents if e.kind is BlockKind.LAYERED), geometry)
    flat = _offsets((e for e in extents if e.kind is BlockKind.FLAT), geometry)
    layer_group = [-1] * geometry.num_layers
    groups: list[Table] = []
    for i, group in enumerate(shape.groups):
        for layer in group.layers:
            layer_group[layer] = i
        groups.append(_table(group.matrices, layered, geometry.capacity(BlockKind.LAYERED)))
    return RowTable(tuple(groups), tuple(layer_group), _table(shape.flat, flat, geometry.capacity(BlockKind.FLAT)))


def _offsets(extents: Iterable[Extent], geometry: Geometry) -> dict[int, list[int]]:
    by_width: dict[int, list[int]] = defaultdict(list)
    for e in extents:
        first = e.block * geometry.block_size + e.offset
        by_width[e.width].extend(range(first, first + e.rows * e.width, e.width))
    return by_width


def _table(matrices: Iterable[Matrix], offsets: Mapping[int, Sequence[int]], capacity: int) -> Table:
    used: Counter[int] = Counter()
    table: dict[tuple[str, Role], tuple[Segment, ...]] = {}
    for m in matrices:
        segments = []
        for column, width in columns(m.width, capacity):
            if m.role == SUMMED:
                segments.append(Segment(column, width, _summed_rows(m.rows, column)))
                continue
            first = used[width]
            segments.append(Segment(column, width, tuple(offsets[width][first : first + m.rows])))
            used[width] += m.rows
        table[m.module, "lora_a" if m.role == SUMMED else m.role] = tuple(segments)
    return table


def _summed_rows(period: int, column: int) -> tuple[int, ...]:
    """Make the offsets of rows that are not in the pool (see `loray_kernels.ops`), in the segment from `column` on."""
    return tuple(~(period << 32 | (row - column) % period) for row in range(period))
