"""The row table: counts that follow from the specification, groups that overlay each other, rows in segments."""

from __future__ import annotations

from loray.engine.memory.adapter_layout import AdapterShape, Matrix, columns, place
from loray.engine.memory.blocks import BlockAllocator, BlockKind, Extent, Geometry

# SmolLM2-135M: hidden 576, 9 query and 3 key/value heads of 64, 30 layers, blocks of 16 tokens.
SMOLLM2 = Geometry(num_blocks=64, num_layers=30, block_tokens=16, layer_share=2 * 16 * 3 * 64)
WIDTHS = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}


def lora(rank: int, modules: dict[str, tuple[int, int]]) -> list[Matrix]:
    matrices = []
    for module, (width_in, width_out) in modules.items():
        matrices.append(Matrix(module, "lora_a", rank, width_in))
        matrices.append(Matrix(module, "lora_b", rank, width_out, 2.0))
    return matrices


def vera(rank: int, modules: dict[str, tuple[int, int]]) -> list[Matrix]:
    d = [Matrix(m, "vera_d", 1, rank) for m in modules]
    return d + [Matrix(m, "vera_b", 1, out) for m, (_, out) in modules.items()]


def shape(matrices: list[Matrix], num_layers: int = 30) -> AdapterShape:
    return AdapterShape.of(dict.fromkeys(range(num_layers), matrices))


def take(allocator: BlockAllocator, adapter: AdapterShape) -> list[Extent]:
    extents: list[Extent] = []
    for kind, demand in adapter.demand(allocator.geometry).items():
        taken = allocator.allocate_rows(kind, demand)
        assert taken is not None
        extents += taken
    return extents


def test_lora_r16_on_attention_fills_ten_blocks_exactly() -> None:
    adapter = shape(lora(16, WIDTHS))
    assert adapter.num_blocks(SMOLLM2) == 10
    allocator = BlockAllocator(SMOLLM2)
    extents = take(allocator, adapter)
    assert allocator.occupancy().layered == 10
    assert sum(e.width * e.rows for e in extents) == 10 * SMOLLM2.layer_share


def test_two_vera_r256_adapters_share_one_block() -> None:
    allocator = BlockAllocator(SMOLLM2)
    take(allocator, shape(vera(256, WIDTHS)))
    take(allocator, shape(vera(256, WIDTHS)))
    assert allocator.occupancy().layered == 1


def test_groups_of_layers_overlay_each_other() -> None:
    """Layers are disjoint, so a second set of ranks costs only what it needs beyond the first."""
    mixed = AdapterShape.of({0: lora(16, WIDTHS), 1: lora(8, WIDTHS), 2: []})
    assert mixed.demand(SMOLLM2) == shape(lora(16, WIDTHS)).demand(SMOLLM2)
    table = place(mixed, take(BlockAllocator(SMOLLM2), mixed), SMOLLM2)
    assert table.layer_group[:4] == (0, 1, -1, -1)
    assert len(table.groups[1]["q_proj", "lora_a"][0].offsets) == 8


def test_a_row_wider_than_a_layers_share_is_cut_into_segments() -> None:
    mqa = Geometry(num_blocks=16, num_layers=2, block_tokens=16, layer_share=2 * 16 * 128)
    assert columns(8192, mqa.layer_share) == [(0, 4096), (4096, 4096)]
    assert columns(9000, mqa.layer_share) == [(0, 3000), (3000, 3000), (6000, 3000)]
    adapter = shape([Matrix("q_proj", "lora_a", 3, 8192), Matrix("q_proj", "lora_b", 3, 128)], 2)
    table = place(adapter, take(BlockAllocator(mqa), adapter), mqa)
    a = table.groups[0]["q_proj", "lora_a"]
    assert [(s.column, s.width, len(s.offsets)) for s in a] == [(0, 4096, 3), (4096, 4096, 3)]


def test_flat_rows_fill_whole_blocks_across_layers() -> None:
    rows_per_block = SMOLLM2.block_size // 576
    adapter = AdapterShape.of({}, [Matrix("embed_tokens", "embedding", rows_per_block + 1, 576)])
    assert adapter.demand(SMOLLM2) == {BlockKind.FLAT: {576: rows_per_block + 1}}
    assert adapter.num_blocks(SMOLLM2) == 2


def test_an_a_that_sums_columns_takes_no_rows() -> None:
    """Its offsets are negative, and say for each segment of columns which are summed."""
    mqa = Geometry(num_blocks=16, num_layers=2, block_tokens=16, layer_share=2 * 16 * 128)
    d = [Matrix("down_proj", "lora_b", 3, 64)]
    summed = shape([Matrix("down_proj", "summed_a", 3, 8192), *d], 2)
    assert summed.demand(mqa) == shape(d, 2).demand(mqa)
    table = place(summed, take(BlockAllocator(mqa), summed), mqa).groups[0]
    for column, width, offsets in table["down_proj", "lora_a"]:
        codes = [divmod(~offset, 1 << 32) for offset in offsets]
        assert all(offset < 0 for offset in offsets)
        assert [(period, (first + column) % 3) for period, first in codes] == [(3, 0), (3, 1), (3, 2)]
        assert 0 < width < 8192
