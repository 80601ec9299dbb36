"""What is particular to the cuda backend: several modules in a launch, both paths in a step, splits, padding, pages.

The tests are collected where there is a backend: by `interpreted` without a GPU, by `test_gpu` with one.

Shapes: T tokens, I input width, O output width, R ranks of an adapter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray_kernels import (
    AdapterSegments,
    AttentionMeta,
    KvLayout,
    LoraTable,
    Ops,
    ProjectionMatrix,
    RowOverrides,
    RowTables,
    Scoring,
)
from loray_kernels.reference import ReferenceOps, kv_parts
from tests.kernels.backends import store, turned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
REFERENCE = ReferenceOps()
KINDS = ((None, None), (40, None), (300, 0.5))  # windows and soft caps


def randn(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    expected = expected.double()
    scale = expected.abs().max().clamp(min=1.0)
    assert float((got.double() - expected).abs().max() / scale) < TOLERANCE[dtype]


def rows(num: int, width: int, first: int, step: int = 512, num_segments: int = 1) -> RowTables:
    """Row n of segment s at first + n · step, plus s times more than a row."""
    each = width // num_segments
    at = torch.arange(num) * step + first
    return RowTables(tuple((s * each, each, at + s * (each + 8)) for s in range(num_segments)))


def kv_pool(seed: int, dtype: torch.dtype, num_blocks: int, layout: KvLayout) -> Tensor:
    """Random keys and values."""
    pool = randn(seed, dtype, num_blocks * layout.num_layers * layout.layer_share)
    slots_T = torch.arange(num_blocks * layout.block_tokens)
    shape = (len(slots_T), layout.num_kv_heads, layout.head_dim)
    for layer in range(layout.num_layers if layout.int8_per_element else 0):
        k_TKd, v_TKd = (randn(seed + 20 * layer + i, dtype, *shape) for i in (1, 2))
        store(REFERENCE, pool, layout, layer, k_TKd, v_TKd, AttentionMeta((0, len(slots_T)), (), (), slots_T))
    return pool


def lora(
    ops: Ops, dtype: torch.dtype, counts: list[int], ranks: dict[str, list[int]], widths: dict[str, int], odd: int = 0
) -> tuple[Tensor, ...]:
    """Modules of one input over adapters with `counts` tokens; two tokens of the base before and one after them."""
    num_tokens, width_in = sum(counts) + 3, 72
    starts = [2 + sum(counts[:n]) for n in range(len(counts))]
    segments = AdapterSegments(tuple(starts), tuple(a + c for a, c in zip(starts, counts, strict=True)))
    tables, first = [], 128 + odd
    for module, own in ranks.items():
        total, rank_start = sum(own), tuple(sum(own[:n]) for n in range(len(own) + 1))
        a = rows(total, width_in, first, num_segments=3)
        b = rows(total, widths[module], first + total * 512)
        tables.append(LoraTable(a, b, rank_start, tuple(0.5 + n for n in range(len(own)))))
        first += 2 * total * 512
    pool, layer_offset = randn(1, dtype, first + 1024), 256
    x_TI, fused = randn(2, dtype, num_tokens, width_in), randn(3, dtype, num_tokens, sum(widths.values()))
    outputs = torch.split(fused, list(widths.values()), dim=1)
    h = ops.lora_shrink(x_TI, pool, tuple(tables), segments, layer_offset)
    ops.lora_expand(outputs, h, pool, tuple(tables), segments, layer_offset)
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [0, 3])
def test_modules_of_one_input_in_a_mixed_step(ops: Ops, odd: int, dtype: torch.dtype) -> None:
    """Adapters with one token, a few and many; modules that some adapters lack; rows at odd offsets."""
    case = (
        [1, 20, 3, 40, 6],
        {"q": [8, 16, 0, 4, 33], "k": [0, 16, 5, 4, 1], "v": [0, 70, 2, 0, 8]},
        {"q": 160, "k": 48, "v": 24},
    )
    got, expected = lora(ops, dtype, *case, odd), lora(REFERENCE, dtype, *case, odd)
    for y_TO, want_TO in zip(got, expected, strict=True):
        near(y_TO, want_TO, dtype)


def test_neighbours_change_no_bit(ops: Ops) -> None:
    """The base's rows and the first adapter's do not depend on the second adapter's rank, nor on where its rows are."""
    for count in (3, 20):
        before, after = (
            lora(ops, torch.float32, [count, 4], {"q": [8, other]}, {"q": 160}, odd=odd)[0]
            for other, odd in ((0, 0), (64, 1))
        )
        assert not torch.equal(before[2 + count :], after[2 + count :])
        assert torch.equal(before[:2], after[:2])
        assert torch.equal(before[-1], after[-1])
    # A row of A that can be read 16 bytes at once and one that cannot give the same bits.
    pool = randn(1, torch.float32, 2048)
    pool[1001 : 1001 + 72] = pool[64 : 64 + 72]
    x_TI = randn(2, torch.float32, 20, 72)
    for count in (3, 20):
        h = [
            ops.lora_shrink(
                x_TI,
                pool,
                (LoraTable(*(RowTables(((0, 72, torch.tensor([at])),)),) * 2, (0, 1), (1.0,)),),
                AdapterSegments((0,), (count,)),
                0,
            )[0]
            for at in (64, 1001)
        ]
        assert torch.equal(*h)


def wide(
    dtype: torch.dtype, counts: list[int], odd: int
) -> tuple[Tensor, Tensor, tuple[LoraTable, ...], AdapterSegments]:
    """x, pool, tables of two modules and their segments: an input that several blocks add up, in three segments of
    columns. The base has the last token.
    """
    width, ranks = 2376, ([40, 3, 16], [0, 30, 1])
    starts = [sum(counts[:n]) for n in range(len(counts) + 1)]
    tables, first = [], 64 + odd
    for own in ranks:
        a = rows(sum(own), width, first, step=2408, num_segments=3)
        tables.append(LoraTable(a, a, tuple(sum(own[:n]) for n in range(len(own) + 1)), (1.0, 0.5, 2.0)))
        first += 2408 * sum(own)
    pool, x_TI = randn(1, dtype, first + 2408), randn(2, dtype, starts[-1] + 1, width)
    return x_TI, pool, tuple(tables), AdapterSegments(tuple(starts[:-1]), tuple(starts[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [0, 3])
def test_wide_inputs(ops: Ops, odd: int, dtype: torch.dtype) -> None:
    """Adapters with several tiles of tokens and of rows, and with few tokens; twice, with equal bits."""
    x_TI, pool, tables, segments = wide(dtype, [70, 3, 33], odd)
    got, again, want = (o.lora_shrink(x_TI, pool, tables, segments, 24) for o in (ops, ops, REFERENCE))
    for h_TR, same_TR, want_TR in zip(got, again, want, strict=True):
        assert h_TR.dtype == torch.float32
        assert torch.equal(h_TR, same_TR)
        near(h_TR, want_TR, dtype)


def test_neighbours_change_no_bit_of_a_wide_input(ops: Ops) -> None:
    whole, alone = (wide(torch.bfloat16, counts, 0) for counts in ([70, 3, 33], [70, 0, 0]))
    x_TI, pool, tables, segments = whole
    got = ops.lora_shrink(x_TI, pool, tables, segments, 0)
    own = ops.lora_shrink(x_TI[:71], pool, alone[2], alone[3], 0)
    for all_TR, own_TR in zip(got, own, strict=True):
        assert torch.equal(all_TR[:70], own_TR[:70])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_with_a_wide_input(ops: Ops, dtype: torch.dtype) -> None:
    x_TI, a_RI = randn(1, dtype, 45, 1560), ProjectionMatrix(randn(2, dtype, 70, 1700))
    near(ops.vera_shrink(x_TI, a_RI), REFERENCE.vera_shrink(x_TI, a_RI), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 1, 16), (4, 2, 64)])
@pytest.mark.parametrize("is_int8", [False, True])
def test_long_contexts(ops: Ops, is_int8: bool, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Several splits, their edges, more query heads than one block takes, prompts of several tiles."""
    num_heads, num_kv, d = heads
    layout = KvLayout(2, 16, num_kv, d, int8_per_element=dtype.itemsize if is_int8 else 0)
    sequences = [(1, 600), (70, 130), (1, 256), (1, 257), (2, 70), (1, 5)]
    lengths = [-(-context // 16) for _, context in sequences]
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(5))
    pool = kv_pool(6, dtype, len(order), layout)
    start = [sum(n for n, _ in sequences[:i]) for i in range(len(sequences) + 1)]
    meta = AttentionMeta(
        tuple(start), tuple(c for _, c in sequences), order.split(lengths), torch.zeros(start[-1], dtype=torch.int64)
    )
    q_THd = randn(7, dtype, start[-1], num_heads, d)
    alone = AttentionMeta((0, 1), (600,), order.split(lengths)[:1], torch.zeros(1, dtype=torch.int64))
    for kind in KINDS:
        got, want = (o.paged_attention(q_THd, pool, layout, 1, meta, Scoring(d**-0.5, *kind)) for o in (ops, REFERENCE))
        near(got, want, dtype)
        if kind[0] is not None:  # blocks behind it are others' by now, and hold what is no number
            freed = pool.clone()
            for (num, context), table in zip(sequences, meta.block_table, strict=True):
                blocks = table[: max(0, context - num - kind[0] + 1) // 16]
                freed.view(-1, 2 * layout.layer_share)[blocks] = torch.nan
            assert torch.equal(ops.paged_attention(q_THd, freed, layout, 1, meta, Scoring(d**-0.5, *kind)), got)
        # Alone, a sequence has the same bits.
        assert torch.equal(ops.paged_attention(q_THd[:1], pool, layout, 1, alone, Scoring(d**-0.5, *kind)), got[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_a_prompt_have_the_whole_prompts_bits(ops: Ops, dtype: torch.dtype) -> None:
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=16)
    pool, q_THd, table = randn(8, dtype, 10 * layout.layer_share), randn(9, dtype, 100, 4, 16), torch.arange(10)

    def attend(start: int, stop: int) -> Tensor:
        meta = AttentionMeta((0, stop - start), (stop,), (table,), torch.zeros(stop - start, dtype=torch.int64))
        return ops.paged_attention(q_THd[start:stop], pool, layout, 0, meta, Scoring(0.25))

    assert torch.equal(torch.cat((attend(0, 37), attend(37, 100))), attend(0, 100))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_activations(ops: Ops, dtype: torch.dtype) -> None:
    """Inputs that are columns of a wider matrix; RoPE of nine heads; more columns than a tile; embedding rows."""
    fused = randn(10, dtype, 5, 9 * 16 + 8)
    x_THd = fused[:, : 9 * 16].view(5, 9, 16)
    cos, sin = randn(11, dtype, 5, 16), randn(12, dtype, 5, 16)
    for width in (16, 12):  # of a head
        near(
            turned(ops, x_THd, cos[:, :width], sin[:, :width]),
            turned(REFERENCE, x_THd, cos[:, :width], sin[:, :width]),
            dtype,
        )
    for gate_up_TM in (fused[:, :140], randn(16, dtype, 3, 2200)):
        near(ops.silu_mul(gate_up_TM), REFERENCE.silu_mul(gate_up_TM), dtype)
        near(ops.gelu_mul(gate_up_TM), REFERENCE.gelu_mul(gate_up_TM), dtype)
    pool, own = randn(13, dtype, 4096), RowOverrides(torch.tensor([3, 0]), rows(2, 48, 7, num_segments=2))
    table_VD, ids_T = randn(15, dtype, 6, 48), torch.tensor([5, 0, 2, 2, 1])
    assert torch.equal(ops.embed(table_VD, ids_T, pool, own), REFERENCE.embed(table_VD, ids_T, pool, own))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 512, 514, 1300])
def test_norms(ops: Ops, width: int, dtype: torch.dtype) -> None:
    """Of few columns and of many, of heads, and of sums; weights of adapters in two segments; not of all tokens."""
    fused, pool, weight_D = randn(10, dtype, 11, 3 * width + 8), randn(13, dtype, 8192), randn(14, dtype, width)
    own = RowOverrides(torch.tensor([3, 0]), rows(2, width, 7, step=2048, num_segments=2))
    x_TD, more_TD, x_THd = fused[:, :width], fused[:, width : 2 * width], fused[:, : 3 * width].view(11, 3, width)
    for adapters in (own, None):
        args = weight_D, 1e-5, pool, adapters, 64
        for x in (x_TD, x_THd, x_TD[:1] if adapters is None else x_TD):
            near(ops.rms_norm(x, *args), REFERENCE.rms_norm(x, *args), dtype)
            near(ops.rms_norm(x, *args, 1.0), REFERENCE.rms_norm(x, *args, 1.0), dtype)
        got, want = (o.add_rms_norm(x_TD, more_TD, *args) for o in (ops, REFERENCE))
        assert torch.equal(got[0], want[0])
        near(got[1], want[1], dtype)


def test_mixed_dtypes_go_to_the_reference(ops: Ops) -> None:
    x_TI, pool = randn(2, torch.float32, 24, 72), randn(1, torch.bfloat16, 8192)
    table = LoraTable(rows(12, 72, 0), rows(12, 48, 0), (0, 8, 12), (1.0, 2.0))
    (got,), (want,) = (
        o.lora_shrink(x_TI, pool, (table,), AdapterSegments((0, 1), (1, 21)), 0) for o in (ops, REFERENCE)
    )
    near(got, want, torch.float32)


def decoding(dtype: torch.dtype, contexts: list[int], layout: KvLayout) -> tuple[Tensor, AttentionMeta]:
    """A pool, and a step in which each sequence has one query; its blocks are scattered over the pool."""
    size = layout.block_tokens
    lengths = [-(-context // size) for context in contexts]
    blocks = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(1)).split(lengths)
    slots = [int(b[(c - 1) // size]) * size + (c - 1) % size if c else 0 for b, c in zip(blocks, contexts, strict=True)]
    pool = kv_pool(2, dtype, sum(lengths), layout)
    return pool, AttentionMeta(tuple(range(len(contexts) + 1)), tuple(contexts), blocks, torch.tensor(slots))


def decode_step(dtype: torch.dtype, contexts: list[int], layout: KvLayout) -> tuple[Tensor, AttentionMeta]:
    """The same; what no sequence has is no number."""
    pool, meta = decoding(dtype, contexts, layout)
    for own, context in zip(meta.block_table, contexts, strict=True):
        if used := context % layout.block_tokens:
            blocks, scales = kv_parts(pool, layout)
            if scales is None:
                blocks[own[-1], :, :, used:] = torch.nan
            else:
                scales[own[-1], ..., used:] = torch.nan
    return pool, meta


@pytest.mark.parametrize(
    ("dtype", "block_tokens", "is_int8"),  # each two of them together
    [(torch.bfloat16, 16, False), (torch.float16, 48, False), (torch.bfloat16, 48, True), (torch.float16, 16, True)],
)
@pytest.mark.parametrize(("num_heads", "num_kv", "d"), [(9, 3, 64), (8, 2, 128), (12, 1, 128), (2, 2, 64), (20, 1, 64)])
def test_heads_of_a_decode_step(
    ops: Ops, is_int8: bool, num_heads: int, num_kv: int, d: int, block_tokens: int, dtype: torch.dtype
) -> None:
    layout = KvLayout(2, block_tokens, num_kv, d, int8_per_element=dtype.itemsize if is_int8 else 0)
    pool, meta = decode_step(dtype, [1, 15, 16, 63, 255, 256, 257, 530, 700], layout)
    q_THd = 2 * randn(5, dtype, 9, num_heads, d)
    for kind in KINDS:
        got = ops.paged_attention(q_THd, pool, layout, 1, meta, Scoring(d**-0.5, *kind))
        near(got, REFERENCE.paged_attention(q_THd, pool, layout, 1, meta, Scoring(d**-0.5, *kind)), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_that_begin_anywhere(ops: Ops, dtype: torch.dtype) -> None:
    """As a slice of a wider row, whose address is no multiple of 16 bytes."""
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=2, head_dim=64)
    pool, meta = decode_step(dtype, [5, 40], layout)
    q_THd = randn(5, dtype, 2, 4 * 64 + 3)[:, 3:].unflatten(1, (4, 64))
    near(
        ops.paged_attention(q_THd, pool, layout, 0, meta, Scoring(0.125)),
        REFERENCE.paged_attention(q_THd, pool, layout, 0, meta, Scoring(0.125)),
        dtype,
    )


def test_padding_has_no_keys(ops: Ops) -> None:
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=1, head_dim=128)
    pool, meta = decode_step(torch.float16, [3, 0, 300], layout)
    got = ops.paged_attention(randn(5, torch.float16, 3, 2, 128), pool, layout, 0, meta, Scoring(0.125))
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert bool(got.isfinite().all())
