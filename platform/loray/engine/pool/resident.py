"""What the pool holds beside KV cache: adapters, and VeRA pairs that several adapters share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from loray.engine.memory.blocks import Extent
from loray.engine.memory.rows import AdapterShape, Role, RowTable
from loray.engine.pool.packed import PackedAdapter
from loray.spec import AdapterRef, RopeParameters
from loray_kernels import PairMatrix, Parts, RowTables


class Record(NamedTuple):
    """An adapter's words on the device, [start, start + size), and in them where its LoRA rows, its vectors and the
    words of its pair begin; None, or 0 for vectors: it has none.
    """

    start: int
    size: int
    parts: Parts
    lora: int | None
    vectors: int
    pair: int | None


@dataclass(slots=True, eq=False)
class ResidentAdapter:
    """An adapter in the pool. The pool may move it between steps: `table`, `rows`, `extents` and `token_row` change.

    rows       the table as tensors, by (group, module, role); group -1 holds rows without a layer
    scales     LoRA's alpha/r by (group, module)
    num_blocks  that its rows fill, counting parts of shared blocks; wherever they are
    token_row  {token: offset of the adapter's embedding row for it}
    record     on the device; None without one, see `records`
    pending    the rows on the host while only those of the first `num_layers` layers are in the pool; else None
    """

    ref: AdapterRef
    shape: AdapterShape
    table: RowTable
    rows: Mapping[tuple[int, str, Role], RowTables]
    scales: Mapping[tuple[int, str], float]
    extents: tuple[Extent, ...]
    num_blocks: float
    token_row: Mapping[int, int]
    rope: RopeParameters | None
    pair: ResidentPair | None
    pending: PackedAdapter | None = None
    num_layers: int = 0
    record: Record | None = None


@dataclass(slots=True, eq=False)
class ResidentPair:
    """A VeRA pair in a run of blocks, shared by all resident adapters that were trained with it."""

    digest: str
    first_block: int
    num_blocks: int
    a_RI: PairMatrix
    b_OR: PairMatrix
    references: int = 0
