"""The pool: one tensor for KV cache and adapters, and where each adapter is in it.

`packed` turns AdapterWeights into rows in host memory, in a loader's thread. `Pool.place` and `Pool.take` copy the rows
into blocks and `Pool.remove` frees the blocks, in the engine's thread. Only the allocator knows which block holds what.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from loray.adapters.weights import ProjectionPair
from loray.bases.config import ModelConfig
from loray.engine.memory.blocks import BlockAllocator, Extent, Geometry, Kind
from loray.engine.memory.compaction import close_gaps
from loray.engine.memory.limits import pool_geometry
from loray.engine.memory.rows import Matrix, place
from loray.engine.pool.packed import PackedAdapter, row_order
from loray.engine.pool.records import AdapterRecords
from loray.engine.pool.resident import ResidentAdapter, ResidentPair
from loray.engine.pool.tables import row_tensors, token_row
from loray.spec import AdapterRef, ServeSpec
from loray_kernels import KvLayout, PageWriter, PairMatrix, Piece
from loray_kernels.memory import huge_pages
from loray_kernels.pages import DirectWriter


def cut_pool(spec: ServeSpec, config: ModelConfig) -> tuple[KvLayout, int]:
    """Layout of a block, and how many blocks the pool has. SpecError if it is too small, see `limits`."""
    layout = KvLayout(config.num_layers, spec.block_tokens, config.num_kv_heads, config.head_dim)
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
        self._pairs: dict[str, ResidentPair] = {}
        self._residents: dict[ResidentAdapter, None] = {}
        self._arriving: dict[ResidentAdapter, Callable[[], bool]] = {}  # whose rows steps may not read yet
        self._compact = False  # True: nothing to compact until adapters are placed or removed
        self.records: AdapterRecords | None = None  # where decode steps are recorded
        self.on_kv_moved: Callable[[Mapping[int, int]], None] = lambda moves: None

    @property
    def residents(self) -> Collection[ResidentAdapter]:
        return self._residents.keys()

    @property
    def pairs(self) -> Mapping[str, ResidentPair]:
        """By digest."""
        return self._pairs

    @property
    def block_bytes(self) -> int:
        return self.geometry.block_size * self.tensor.itemsize

    def num_blocks_for(self, packed: PackedAdapter) -> int:
        """The most blocks that the adapter takes, with its pair, which may be resident already."""
        blocks = packed.shape.num_blocks(self.geometry)
        if packed.pair is not None:
            blocks += self._pair_blocks(packed.pair)
        return blocks

    def place(self, ref: AdapterRef, packed: PackedAdapter) -> ResidentAdapter | None:
        """Copy an adapter into blocks; None, and nothing changed, if blocks are short. Writes the pool."""
        pair = self._place_pair(packed.pair)
        if packed.pair is not None and pair is None:
            return None
        extents: list[Extent] = []
        for kind, demand in packed.shape.demand(self.geometry).items():
            taken = self.allocator.allocate_rows(kind, demand)
            if taken is None:
                self.allocator.free_rows(extents)
                self._release_pair(pair)
                return None
            extents.extend(taken)
        try:
            return self._fill(ref, packed, pair, extents)
        except BaseException:  # such as a device that is out of memory: free the blocks
            self._compact = False
            self.wait_for_rows()
            self.allocator.free_rows(extents)
            self._release_pair(pair)
            raise

    def _fill(
        self, ref: AdapterRef, packed: PackedAdapter, pair: ResidentPair | None, extents: Sequence[Extent]
    ) -> ResidentAdapter:
        table = place(packed.shape, extents, self.geometry)
        own_rows = token_row(packed.token_ids, table)
        scales = {
            (i, m.module): m.scale
            for i, group in enumerate(packed.shape.groups)
            for m in group.matrices
            if m.role == "lora_b"
        }
        tensors = row_tensors(table, self.tensor.device)
        num_blocks = sum(e.width * e.rows / self.geometry.capacity(e.kind) for e in extents)
        resident = ResidentAdapter(
            ref, packed.shape, table, tensors, scales, tuple(extents), num_blocks, own_rows, packed.rope, pair, packed
        )
        self._write(resident, Kind.FLAT, packed.flat[None], packed.shape.flat, [0])
        complete = packed.partial is None or packed.partial.complete
        num_layers = self.geometry.num_layers if packed.partial is None or complete else packed.partial.num_layers
        self._take(resident, min(num_layers, self.geometry.num_layers))
        if complete:
            resident.pending = None
        if self.records is not None:
            self.records.placed(resident)
        self._arriving[resident] = self._writer.arrival()
        self._residents[resident] = None
        self._compact = False
        return resident

    def take(self, adapter: ResidentAdapter, num_layers: int) -> None:
        """Copy the rows of the first `num_layers` layers that are not in the pool yet; the next layer that is computed
        reads them. Writes the pool.
        """
        self._take(adapter, num_layers)
        self.wait_for_rows()

    def wait_for_rows(self) -> None:
        """Whatever is queued after this call sees all rows that have been placed."""
        self._writer.wait()
        self._arriving.clear()

    def wait_for(self, adapters: Iterable[ResidentAdapter]) -> None:
        """Likewise, the rows of these."""
        if self._arriving and not all(map(self.has_arrived, adapters)):
            self.wait_for_rows()

    def has_arrived(self, adapter: ResidentAdapter) -> bool:
        """Whether steps read its rows without waiting for them."""
        arrived = self._arriving.get(adapter)
        if arrived is not None and not arrived():
            return False
        self._arriving.pop(adapter, None)
        return True

    def _take(self, adapter: ResidentAdapter, num_layers: int) -> None:
        if adapter.pending is None:
            return
        for group, rows_LE in zip(adapter.shape.groups, adapter.pending.layered, strict=True):
            new = slice(bisect_left(group.layers, adapter.num_layers), bisect_left(group.layers, num_layers))
            self._write(adapter, Kind.LAYERED, rows_LE[new], group.matrices, group.layers[new])
        adapter.num_layers = max(adapter.num_layers, num_layers)

    def remove(self, adapter: ResidentAdapter) -> None:
        self.wait_for([adapter])  # its rows must not come over what will be in their place
        del self._residents[adapter]
        self._compact = False
        if self.records is not None:
            self.records.removed(adapter)
        self.allocator.free_rows(adapter.extents)
        self._release_pair(adapter.pair)

    def _write(
        self, adapter: ResidentAdapter, kind: Kind, rows_LE: Tensor, matrices: Sequence[Matrix], layers: Sequence[int]
    ) -> None:
        """Copy packed rows, (layers, elements), to the adapter's extents."""
        capacity = self.geometry.capacity(kind)
        pieces = [
            Piece(p.start, p.block * self.geometry.block_size + p.offset, p.num_elements)
            for p in row_order(matrices, capacity).pieces(adapter.extents, kind)
        ]
        self._writer.write(rows_LE, [layer * capacity for layer in layers], pieces)

    # -- shared pairs -------------------------------------------------------------------------------------------------

    def _pair_blocks(self, pair: ProjectionPair) -> int:
        return self.geometry.blocks_for_elements(pair.a_RI.numel() + pair.b_OR.numel())

    def _place_pair(self, pair: ProjectionPair | None) -> ResidentPair | None:
        if pair is None:
            return None
        resident = self._pairs.get(pair.digest)
        if resident is None:
            num_blocks = self._pair_blocks(pair)
            first = self.allocator.allocate_run(num_blocks)
            if first is None and self._clear_run(num_blocks):
                first = self.allocator.allocate_run(num_blocks)
            if first is None:
                return None
            start = first * self.geometry.block_size
            a_RI, b_OR = self._write_matrix(pair.a_RI, start), self._write_matrix(pair.b_OR, start + pair.a_RI.numel())
            resident = self._pairs[pair.digest] = ResidentPair(pair.digest, first, num_blocks, a_RI, b_OR)
        resident.references += 1
        return resident

    def _write_matrix(self, values: Tensor, start: int) -> PairMatrix:
        """As adapters' rows are, in their order."""
        num = values.numel()
        self._writer.write(values.to(self.tensor.dtype).reshape(1, num), [0], [Piece(0, start, num)])
        return PairMatrix(self.tensor[start : start + num].view_as(values))

    def _release_pair(self, pair: ResidentPair | None) -> None:
        if pair is None:
            return
        pair.references -= 1
        if not pair.references:
            self.wait_for_rows()  # it may have been written a moment ago
            del self._pairs[pair.digest]
            self.allocator.free_run(pair.first_block)

    # -- moving adapters and KV blocks, between steps -----------------------------------------------------------------

    def size_of(self, adapter: ResidentAdapter) -> float:
        """Blocks that its removal would free, counting parts of shared blocks; with its pair if no other uses that."""
        blocks = adapter.num_blocks
        if adapter.pair is not None and adapter.pair.references == 1:
            blocks += adapter.pair.num_blocks
        return max(blocks, 1 / self.geometry.block_size)  # an adapter that changes only RoPE has no rows

    def compact(self, num_blocks: int) -> bool:
        """Free up to `num_blocks` blocks by moving rows into the gaps that evictions left; False if none is freed."""
        if self._compact:
            return False
        owned = [list(adapter.extents) for adapter in self._residents]
        copies = close_gaps(self.allocator, owned, num_blocks)
        self.wait_for_rows()
        for old, new in copies:
            self._rows_of(new).copy_(self._rows_of(old))
        self._moved(owned)
        self._compact = not copies
        return bool(copies)

    def _clear_run(self, num_blocks: int) -> bool:
        """Free neighbouring blocks for a run by moving others, KV blocks too; False if that is impossible."""
        moves = self.allocator.clear_run(num_blocks)
        if moves is None:
            return False
        self.wait_for_rows()
        blocks = self.tensor.view(self.geometry.num_blocks, -1)
        for old, new in moves.items():
            blocks[new].copy_(blocks[old])
        self._moved([[e._replace(block=moves.get(e.block, e.block)) for e in a.extents] for a in self._residents])
        self.on_kv_moved(moves)
        return True

    def _rows_of(self, extent: Extent) -> Tensor:
        """(layers or 1, elements)"""
        shares = self.tensor.view(self.geometry.num_blocks, -1, self.geometry.capacity(extent.kind))
        return shares[extent.block, :, extent.offset : extent.offset + extent.width * extent.rows]

    def _moved(self, owned: Sequence[Sequence[Extent]]) -> None:
        """Rebuild the tables of residents whose extents have changed."""
        for adapter, extents in zip(self._residents, owned, strict=True):
            if tuple(extents) != adapter.extents:
                adapter.extents = tuple(extents)
                adapter.table = place(adapter.shape, extents, self.geometry)
                adapter.rows = row_tensors(adapter.table, self.tensor.device)
                adapter.token_row = token_row(tuple(adapter.token_row), adapter.table)
                if self.records is not None:
                    self.records.moved(adapter)

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
