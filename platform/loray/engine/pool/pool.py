"""`Pool`: the tensor of all blocks, the adapters that reside in it, and their descriptors for kernels.

`packed` turns AdapterWeights into rows in host memory, in a loader's thread. `Pool.place` copies them into blocks and
`Pool.remove` frees the blocks, in the engine's thread. Only the allocator knows which block holds what.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray.bases.config import ModelConfig
from loray.engine.memory.adapter_layout import AdapterShape, Matrix, RowTable, Table, columns, place
from loray.engine.memory.blocks import BlockAllocator, BlockKind, Extent, Geometry
from loray.engine.memory.limits import pool_geometry
from loray.engine.pool.block_copies import TensorCopies
from loray.engine.pool.packed import PackedAdapter, row_order
from loray.methods.weights import Role, SharedProjection
from loray.spec import AdapterRef, RopeParameters, ServeSpec
from loray_kernels import (
    INPUTS,
    MAX_PAIR_RANK,
    DescriptorAllocator,
    InputShape,
    KvLayout,
    LoraRows,
    PageCopy,
    PageWriter,
    Pair,
    Parts,
    ProjectionMatrix,
    RowTables,
    VectorShape,
    descriptor_words,
    to_device,
    vector_words,
)
from loray_kernels.kv import DirectWriter
from loray_kernels.memory import huge_pages

RopeNumbers = Callable[[RopeParameters], npt.NDArray[np.float32]]  # inverse frequencies, the factor of cos and sin

_LORA = {"lora_a", "lora_b"}
_PARTS: dict[Role, Parts] = {
    "lora_a": Parts.LORA,
    "lora_b": Parts.LORA,
    "vera_d": Parts.VERA,
    "vera_b": Parts.VERA,
    "dora": Parts.SCALE,
    "scale": Parts.SCALE,
    "turn": Parts.SCALE,
    "norm": Parts.OWN,
    "embedding": Parts.OWN,
}


class AdapterDescriptor(NamedTuple):
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

    rows        the table as tensors, by (group, module, role); group -1 holds rows without a layer
    scales      the scale of Matrix, by (group, module)
    num_blocks  that its rows fill, counting parts of shared blocks; wherever they are
    token_row   {token: offset of the adapter's embedding row for it}
    descriptor  on the device; None without one, see PoolDescriptors
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
    pair: ResidentProjection | None
    descriptor: AdapterDescriptor | None = None


@dataclass(slots=True, eq=False)
class ResidentProjection:
    """A VeRA pair in a run of blocks, shared by all resident adapters that were trained with it."""

    digest: str
    first_block: int
    num_blocks: int
    a_RI: ProjectionMatrix
    b_OR: ProjectionMatrix
    references: int = 0


def input_shapes(config: ModelConfig, capacity: int) -> tuple[InputShape, ...]:
    """Give the shapes of adapters' rows, which are cut at `capacity`: elements of a layer's share of a block."""
    shapes = [[config.module_shape(module) for module in modules] for modules in INPUTS]
    firsts = {module: rows.start for parts in config.fused.values() for module, rows in parts.items()}
    return tuple(
        InputShape(
            tuple(columns(of_input[0][1], capacity)),
            tuple(tuple(columns(o, capacity)) for o, _ in of_input),
            pair_rows=tuple(firsts.get(module, 0) for module in modules),
        )
        for modules, of_input in zip(INPUTS, shapes, strict=True)
    )


class Allocation(NamedTuple):
    """The allocator gave this for an adapter. `pair_block`: the first of the run for its pair; None: it has none, or
    the pool has it already.
    """

    extents: tuple[Extent, ...]
    pair_block: int | None


class _Words(NamedTuple):
    lora: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.int64]


class PoolDescriptors:
    """Writes `descriptor` of residents. An adapter has none if an input has more than MAX_ROWS rows of it, if its pair
    has more than MAX_PAIR_RANK ranks or too many for a row of one segment, or if the table is full.
    """

    def __init__(
        self, allocator: DescriptorAllocator, vectors: VectorShape, *, block_size: int, rope: RopeNumbers
    ) -> None:
        self._allocator, self._vectors = allocator, vectors
        self._block_size, self._rope = block_size, rope

    def placed(self, adapter: ResidentAdapter) -> None:
        adapter.descriptor = None
        words = self._words(adapter)
        start = None if words is None else self._allocator.add(np.concatenate(words))
        if words is None or start is None:
            return
        lora, vectors = map(len, words)
        adapter.descriptor = AdapterDescriptor(
            start,
            lora + vectors,
            _parts(adapter),
            start if lora else None,
            start + lora if vectors else 0,
            None if adapter.pair is None else start + lora + vectors - len(Pair._fields),
        )

    def moved(self, adapter: ResidentAdapter) -> None:
        """Write the descriptor anew, as the rows are elsewhere. It stays where it is, since it is as long as before."""
        if adapter.descriptor is not None and (words := self._words(adapter)) is not None:
            self._allocator.write(adapter.descriptor.start, np.concatenate(words))

    def removed(self, adapter: ResidentAdapter) -> None:
        if adapter.descriptor is not None:
            self._allocator.remove(adapter.descriptor.start, adapter.descriptor.size)
            adapter.descriptor = None

    def _words(self, adapter: ResidentAdapter) -> _Words | None:
        """Make the words of LoRA and of vectors, each empty if it has none."""
        table, parts, none = adapter.table, _parts(adapter), np.array([], dtype=np.int64)
        lora: npt.NDArray[np.int64] | None = none
        if Parts.LORA in parts:
            groups = [_lora_rows(table, group, adapter.scales) for group in range(len(table.groups))]
            lora = descriptor_words(groups, table.layer_group, self._allocator.table.inputs)
        vectors = self._vector_words(adapter) if parts & ~Parts.LORA else none
        return None if lora is None or vectors is None else _Words(lora, vectors)

    def _vector_words(self, adapter: ResidentAdapter) -> npt.NDArray[np.int64] | None:
        table, pair = adapter.table, None
        own = [_vectors(group) for group in table.groups]
        if adapter.pair is not None:
            a_RI = adapter.pair.a_RI.data
            first, (rank, width) = adapter.pair.first_block * self._block_size, a_RI.shape
            cut = any(len(offsets) > 1 for group in own for (_, role), offsets in group.items() if role == "vera_d")
            if rank > MAX_PAIR_RANK or cut:
                return None
            pair = Pair(first, first + rank * width, rank, width)
        rope = None if adapter.rope is None else self._rope(adapter.rope)
        scaling = _scaling(adapter)
        return vector_words(self._vectors, own, table.layer_group, _vectors(table.flat), rope, pair, scaling)


def _parts(adapter: ResidentAdapter) -> Parts:
    parts = Parts.NONE if adapter.rope is None else Parts.OWN
    for table in (*adapter.table.groups, adapter.table.flat):
        for _, role in table:
            parts |= _PARTS[role]
    return parts


def _scaling(adapter: ResidentAdapter) -> int:
    """Say what its scales of outputs scale, see `descriptors`: an adapter has those of one method."""
    found = {role: (g, module) for g, table in enumerate(adapter.table.groups) for module, role in table}
    if "turn" in found:
        return int(adapter.scales[found["turn"]])
    return -1 if "scale" in found else 0


def _vectors(table: Table) -> dict[tuple[str, str], tuple[int, ...]]:
    """Find the offsets of each segment of what has one row. Embedding rows are named by steps."""
    return {
        (module, "scale" if role == "dora" else role): tuple(s.offsets[0] for s in segments)
        for (module, role), segments in table.items()
        if role not in _LORA and role != "embedding"
    }


def _lora_rows(table: RowTable, group: int, scales: Mapping[tuple[int, str], float]) -> dict[str, LoraRows]:
    rows = table.groups[group]
    return {
        module: LoraRows(
            tuple(s.offsets for s in segments),
            tuple(s.offsets for s in rows[module, "lora_b"]),
            scales[group, module],
        )
        for (module, role), segments in rows.items()
        if role == "lora_a"
    }


def row_tensors(table: RowTable, device: torch.device) -> dict[tuple[int, str, Role], RowTables]:
    """Make `ResidentAdapter.rows`. All are parts of one tensor, copied at once."""
    found = {
        (group, module, role): segments
        for group, tables in ((-1, table.flat), *enumerate(table.groups))
        for (module, role), segments in tables.items()
        if role != "embedding"
    }
    offsets = [segment.offsets for segments in found.values() for segment in segments]
    joined = torch.tensor([*chain.from_iterable(offsets)], dtype=torch.int64)
    own = iter(torch.split(to_device(joined, device), [len(o) for o in offsets]))
    return {key: RowTables(tuple((s.column, s.width, next(own)) for s in segments)) for key, segments in found.items()}


def token_row(token_ids: Sequence[int], table: RowTable) -> dict[int, int]:
    """Make `ResidentAdapter.token_row`."""
    if not token_ids:
        return {}
    (segment,) = table.flat["embed_tokens", "embedding"]
    return dict(zip(token_ids, segment.offsets, strict=True))


def cut_pool(spec: ServeSpec, config: ModelConfig) -> tuple[KvLayout, int]:
    """Give a block's layout, and how many blocks the pool has. SpecError if it is too small, see `limits`."""
    heads = config.num_kv_heads, config.head_dim
    layout = KvLayout(config.num_layers, spec.block_tokens, *heads, spec.int8_per_element)
    return layout, pool_geometry(spec, config).num_blocks


class Pool:
    """The only owner of the pool's tensor and of the shared pairs in it.

    `page_writer` makes the page writer that copies adapters' rows, see Ops.page_writer. It may copy while steps run:
    whatever else reads or writes the tensor calls `wait_for_rows` first.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        page_writer: Callable[[Tensor], PageWriter] = DirectWriter,
    ) -> None:
        self.layout = layout
        self.geometry = Geometry(num_blocks, layout.num_layers, layout.block_tokens, layout.layer_share)
        self.allocator = BlockAllocator(self.geometry)
        size = num_blocks * self.geometry.block_size
        self.tensor = huge_pages(size, dtype) if device.type == "cpu" else torch.empty(size, dtype=dtype, device=device)
        self.tensor.zero_()  # touches the memory now, not during the first request
        self._writer = page_writer(self.tensor)
        self.copies = TensorCopies(self.tensor, self.geometry.block_size)
        self._pairs: dict[str, ResidentProjection] = {}
        self._residents: dict[ResidentAdapter, None] = {}
        self._copying: dict[ResidentAdapter, Callable[[], bool]] = {}  # whose rows steps may not read yet
        self.descriptors: PoolDescriptors | None = None  # where decode steps are captured
        self.on_kv_moved: Callable[[Mapping[int, int]], None] = lambda moves: None

    @property
    def residents(self) -> Collection[ResidentAdapter]:
        return self._residents.keys()

    @property
    def pairs(self) -> Mapping[str, ResidentProjection]:
        """The shared pairs in the pool, by digest."""
        return self._pairs

    @property
    def block_bytes(self) -> int:
        return self.geometry.block_size * self.tensor.itemsize

    def num_blocks_for(self, packed: PackedAdapter) -> int:
        """Count the most blocks that the adapter takes, with its pair, which may be resident already."""
        blocks = packed.shape.num_blocks(self.geometry)
        if packed.pair is not None:
            blocks += self._pair_blocks(packed.pair)
        return blocks

    def place(self, ref: AdapterRef, packed: PackedAdapter) -> ResidentAdapter | None:
        """Copy an adapter into blocks; None if blocks are short. Writes the pool."""
        allocation = self._allocate(packed)
        return None if allocation is None else self.fill(ref, packed, allocation)

    def _allocate(self, packed: PackedAdapter) -> Allocation | None:
        """Find blocks for an adapter. For a pair's run other blocks may move, KV blocks too."""
        pair, first = packed.pair, None
        if pair is not None and pair.digest not in self._pairs:
            num_blocks = self._pair_blocks(pair)
            first = self.allocator.allocate_run(num_blocks)
            if first is None and (moves := self.allocator.clear_run(num_blocks)) is not None:
                self.move(moves)
                first = self.allocator.allocate_run(num_blocks)
            if first is None:
                return None
        extents: list[Extent] = []
        for kind, demand in packed.shape.demand(self.geometry).items():
            taken = self.allocator.allocate_rows(kind, demand)
            if taken is None:
                self._free(extents, first)
                return None
            extents.extend(taken)
        return Allocation(tuple(extents), first)

    def fill(self, ref: AdapterRef, packed: PackedAdapter, allocation: Allocation) -> ResidentAdapter:
        """Copy an adapter into the blocks that it was given."""
        extents, first = allocation
        pair: ResidentProjection | None = None
        try:
            if packed.pair is not None:
                if first is not None:
                    self._pairs[packed.pair.digest] = self._write_pair(packed.pair, first)
                pair, first = self._pairs[packed.pair.digest], None
                pair.references += 1
            resident = self._write(ref, packed, pair, extents)
            if self.descriptors is not None:
                self.descriptors.placed(resident)
            self._copying[resident] = self._writer.arrival()
        except BaseException:  # such as a device that is out of memory: free the blocks
            self.wait_for_rows()
            self._free(extents, first if pair is None else self._release_pair(pair))
            raise
        self._residents[resident] = None
        return resident

    def _write(
        self, ref: AdapterRef, packed: PackedAdapter, pair: ResidentProjection | None, extents: tuple[Extent, ...]
    ) -> ResidentAdapter:
        table = place(packed.shape, extents, self.geometry)
        own_rows = token_row(packed.token_ids, table)
        scales = {
            (i, m.module): m.scale
            for i, group in enumerate(packed.shape.groups)
            for m in group.matrices
            if m.role in ("lora_b", "turn", "vera_b")
        }
        tensors = row_tensors(table, self.tensor.device)
        num_blocks = sum(e.width * e.rows / self.geometry.capacity(e.kind) for e in extents)
        resident = ResidentAdapter(
            ref, packed.shape, table, tensors, scales, extents, num_blocks, own_rows, packed.rope, pair
        )
        self._write_rows(extents, BlockKind.FLAT, packed.flat[None], packed.shape.flat, [0])
        for group, rows_LE in zip(packed.shape.groups, packed.layered, strict=True):
            self._write_rows(extents, BlockKind.LAYERED, rows_LE, group.matrices, group.layers)
        return resident

    def wait_for_rows(self) -> None:
        """Let whatever is queued after this call see all rows that have been placed, and blocks that have come back."""
        self._writer.wait()
        self.copies.wait()
        self._copying.clear()

    def wait_for(self, adapters: Iterable[ResidentAdapter]) -> None:
        """Let whatever is queued after this call see the rows of `adapters`."""
        if self._copying and not all(map(self.copy_is_done, adapters)):
            self.wait_for_rows()

    def copy_is_done(self, adapter: ResidentAdapter) -> bool:
        """Say whether steps read its rows without waiting for them."""
        is_done = self._copying.get(adapter)
        if is_done is not None and not is_done():
            return False
        self._copying.pop(adapter, None)
        return True

    def remove(self, adapter: ResidentAdapter) -> None:
        self.wait_for([adapter])  # its rows must not come over what will be in their place
        del self._residents[adapter]
        if self.descriptors is not None:
            self.descriptors.removed(adapter)
        self._free(adapter.extents, self._release_pair(adapter.pair))

    def _free(self, extents: Iterable[Extent], pair_block: int | None) -> None:
        """Give blocks back to the allocator."""
        self.allocator.free_rows(extents)
        if pair_block is not None:
            self.allocator.free_run(pair_block)

    def _write_rows(
        self,
        extents: Sequence[Extent],
        kind: BlockKind,
        rows_LE: Tensor,
        matrices: Sequence[Matrix],
        layers: Sequence[int],
    ) -> None:
        """Copy packed rows, (layers, elements), to an adapter's extents."""
        capacity = self.geometry.capacity(kind)
        pieces = [
            PageCopy(p.start, p.block * self.geometry.block_size + p.offset, p.num_elements)
            for p in row_order(matrices, capacity).pieces(extents, kind)
        ]
        self._writer.write(rows_LE, [layer * capacity for layer in layers], pieces)

    # -- shared pairs -------------------------------------------------------------------------------------------------

    def _pair_blocks(self, pair: SharedProjection) -> int:
        return self.geometry.blocks_for_elements(pair.a_RI.numel() + pair.b_OR.numel())

    def _write_pair(self, pair: SharedProjection, first: int) -> ResidentProjection:
        start = first * self.geometry.block_size
        a_RI, b_OR = self._write_matrix(pair.a_RI, start), self._write_matrix(pair.b_OR, start + pair.a_RI.numel())
        return ResidentProjection(pair.digest, first, self._pair_blocks(pair), a_RI, b_OR)

    def _write_matrix(self, values: Tensor, start: int) -> ProjectionMatrix:
        num = values.numel()
        self._writer.write(values.to(self.tensor.dtype).reshape(1, num), [0], [PageCopy(0, start, num)])
        return ProjectionMatrix(self.tensor[start : start + num].view_as(values))

    def _release_pair(self, pair: ResidentProjection | None) -> int | None:
        """An adapter that has it goes. Returns the first block of its run if that was the last one."""
        if pair is None:
            return None
        pair.references -= 1
        if pair.references:
            return None
        self.wait_for_rows()  # it may have been written a moment ago
        del self._pairs[pair.digest]
        return pair.first_block

    # -- moving adapters and KV blocks, between steps -----------------------------------------------------------------

    def size_of(self, adapter: ResidentAdapter) -> float:
        """Count the blocks that its removal would free, with parts of shared blocks, and with its pair if no other
        adapter uses that.
        """
        blocks = adapter.num_blocks
        if adapter.pair is not None and adapter.pair.references == 1:
            blocks += adapter.pair.num_blocks
        return max(blocks, 1 / self.geometry.block_size)  # an adapter that changes only RoPE has no rows

    def move(self, moves: Mapping[int, int]) -> None:
        """Copy blocks, of KV too, from the keys of `moves` to its values, as the allocator has renamed them."""
        self.wait_for_rows()
        blocks = self.tensor.view(self.geometry.num_blocks, -1)
        for old, new in moves.items():
            blocks[new].copy_(blocks[old])
        for adapter in self._residents:
            extents = tuple(e._replace(block=moves.get(e.block, e.block)) for e in adapter.extents)
            if extents != adapter.extents:
                adapter.extents = extents
                adapter.table = place(adapter.shape, extents, self.geometry)
                adapter.rows = row_tensors(adapter.table, self.tensor.device)
                adapter.token_row = token_row(tuple(adapter.token_row), adapter.table)
                if self.descriptors is not None:
                    self.descriptors.moved(adapter)
        self.on_kv_moved(moves)

    def check_integrity(self, kv_references: Mapping[int, int], residents: list[ResidentAdapter]) -> None:
        """AssertionError unless the pool holds exactly these KV blocks and adapters, and their pairs."""
        pairs: dict[str, int] = {}
        for adapter in residents:
            if adapter.pair is not None:
                pairs[adapter.pair.digest] = pairs.get(adapter.pair.digest, 0) + 1
        assert set(residents) == set(self._residents), "the pool's residents differ from the adapters in the pool"
        assert pairs == {d: p.references for d, p in self._pairs.items()}, "a pair's references are wrong"
        self.allocator.check_integrity(
            kv_references,
            [e for adapter in residents for e in adapter.extents],
            {p.first_block: p.num_blocks for p in self._pairs.values()},
        )
