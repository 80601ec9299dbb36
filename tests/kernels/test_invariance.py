"""The C++ kernels give a token the same bits in any batch and for any chunking of its prompt.

Shapes: T tokens, Q some of them, I input width, O output width, R rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable

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
    VeraTable,
)
from loray_kernels.cpu.ops import CpuOps
from tests.kernels import emulated
from tests.kernels.backends import NATIVE, as_stored, make_ops, store, turned

DTYPES = [torch.float32, torch.bfloat16]
WIDTH = 100  # no multiple of any vector's width
RANKS = [8, 1, 33, 0, 16]


@pytest.fixture(params=NATIVE)
def ops(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def randn(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(num: int, first: int, segments: int = 2) -> RowTables:
    """Rows of WIDTH at odd offsets, in segments of columns."""
    step = WIDTH // segments
    return RowTables(
        tuple(
            (s * step, step, torch.tensor([(first + r) * 307 + 1 + s * step for r in range(num)], dtype=torch.int64))
            for s in range(segments)
        )
    )


def lora(ops: Ops, dtype: torch.dtype, x_TI: Tensor, y_TO: Tensor, ranks: list[int], counts: list[int]) -> Tensor:
    """Two modules of one input with `counts` tokens for each adapter; returns what the second adds to y."""
    pool = randn(dtype, 1, 307 * 400)
    start = tuple(sum(counts[:i]) for i in range(len(counts)))
    segments = AdapterSegments(start, tuple(a + n for a, n in zip(start, counts, strict=True)))
    rank_start = tuple(sum(ranks[:i]) for i in range(len(ranks) + 1))
    scale = tuple(0.5 + i for i in range(len(ranks)))
    total = rank_start[-1]
    tables = tuple(
        LoraTable(rows(total, 2 * total * k), rows(total, 2 * total * k + total), rank_start, scale) for k in range(2)
    )
    out = y_TO.clone()
    _, h_TR = ops.lora_shrink(x_TI, pool, tables, segments, 3)
    ops.lora_expand((out,), (h_TR,), pool, (tables[1],), segments, 3)
    return out


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_of_a_token_is_the_same_alone_and_among_many(ops: Ops, dtype: torch.dtype) -> None:
    """One token, some, and enough for tiles and threads, of the same adapters."""
    num_tokens = 70
    x_TI, y_TO = randn(dtype, 2, num_tokens, WIDTH), randn(dtype, 3, num_tokens, WIDTH)
    for n, rank in enumerate(RANKS):
        counts = [0] * len(RANKS)
        counts[n] = num_tokens
        whole = lora(ops, dtype, x_TI, y_TO, RANKS, counts)
        assert torch.equal(whole, y_TO) == (rank == 0)
        for first, stop in [(0, 1), (5, 6), (7, 10), (1, 70)]:
            counts[n] = stop - first
            part = lora(ops, dtype, x_TI[first:stop], y_TO[first:stop], RANKS, counts)
            assert torch.equal(part, whole[first:stop])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_adapters_change_nothing(ops: Ops, dtype: torch.dtype) -> None:
    counts = [3, 2, 9, 4, 6]
    total = sum(counts)
    # Columns of a wider matrix, as modules stand side by side in a fused linear; and base tokens at both ends.
    fused = randn(dtype, 4, total + 5, 3 * WIDTH)
    before = fused.clone()
    y_TO, x_TI = fused[:, WIDTH : 2 * WIDTH], randn(dtype, 5, total + 5, WIDTH)
    pool = randn(dtype, 1, 307 * 400)
    start = tuple(2 + sum(counts[:i]) for i in range(len(counts)))
    segments = AdapterSegments(start, tuple(a + n for a, n in zip(start, counts, strict=True)))
    alone = []
    for active in (range(len(RANKS)), *([n] for n in range(len(RANKS)))):
        ranks = [rank if n in active else 0 for n, rank in enumerate(RANKS)]
        kept = torch.tensor([i for n in active for i in range(sum(RANKS[:n]), sum(RANKS[: n + 1]))], dtype=torch.int64)
        tables = []
        for first in (0, 100):
            every = rows(sum(RANKS), first)
            tables.append(RowTables(tuple((c, w, offsets[kept]) for c, w, offsets in every.segments)))
        rank_start = tuple(sum(ranks[:i]) for i in range(len(ranks) + 1))
        table = LoraTable(tables[0], tables[1], rank_start, (1.5,) * len(ranks))
        fused.copy_(before)
        (h_TR,) = ops.lora_shrink(x_TI, pool, (table,), segments, 3)
        ops.lora_expand((y_TO,), (h_TR,), pool, (table,), segments, 3)
        assert torch.equal(fused[:, :WIDTH], before[:, :WIDTH])
        assert torch.equal(fused[:, 2 * WIDTH :], before[:, 2 * WIDTH :])
        alone.append(fused.clone())
    together, *singles = alone
    touched = torch.zeros(total + 5, dtype=torch.bool)
    for n, single in enumerate(singles):
        own = slice(segments.start[n], segments.stop[n])
        assert torch.equal(together[own], single[own])
        touched[own] = True
        others = torch.ones(total + 5, dtype=torch.bool)
        others[own] = False
        assert torch.equal(single[others], before[others])
    assert torch.equal(together[~touched], before[~touched])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_vera_of_a_token_is_the_same_alone_and_among_many(ops: Ops, dtype: torch.dtype) -> None:
    num_tokens, rank = 530, WIDTH  # more than the kernel holds at once
    x_TI, y_TO = randn(dtype, 2, num_tokens, 72), randn(dtype, 3, num_tokens, WIDTH)
    a, b = ProjectionMatrix(randn(dtype, 4, rank, 80)), ProjectionMatrix(randn(dtype, 5, WIDTH, rank))
    pool = randn(dtype, 1, 307 * 1100)

    def run(first: int, stop: int) -> Tensor:
        out = y_TO[first:stop].clone()
        z_TR = ops.vera_shrink(x_TI[first:stop], a)
        num = stop - first
        table = VeraTable(a, b, rows(num, first), rows(num, 540 + first), 0, num)
        ops.vera_expand(out, z_TR, pool, table, 0)
        return out

    whole = run(0, num_tokens)
    for first, stop in [(0, 1), (3, 6), (1, 530), (511, 513)]:
        assert torch.equal(run(first, stop), whole[first:stop])


class Sequence:
    """Keys and values of one sequence in a pool, in shuffled blocks, and its queries."""

    window: int | None = None
    soft_cap: float | None = None

    def __init__(
        self, ops: Ops, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, length: int, *, is_int8: bool = False
    ) -> None:
        self.layout = KvLayout(2, 16, heads[1], head_dim, int8_per_element=dtype.itemsize if is_int8 else 0)
        num_blocks = -(-length // 16)
        self.pool = randn(dtype, 6, (num_blocks + 3) * 2 * self.layout.layer_share)
        order = list(range(num_blocks + 3))
        random.Random(1).shuffle(order)
        self.blocks = torch.tensor(order[:num_blocks])
        self.slot_mapping_T = self.blocks.repeat_interleave(16)[:length] * 16 + torch.arange(length) % 16
        self.q_THd = randn(dtype, 7, length, heads[0], head_dim)
        self.k, self.v = (randn(dtype, s, length, heads[1], head_dim) for s in (8, 9))
        store(ops, self.pool, self.layout, 1, self.k, self.v, self.meta((0, length)))

    def meta(self, *chunks: tuple[int, int]) -> AttentionMeta:
        """The same sequence again and again, each time from one position to another."""
        starts = [0]
        for first, stop in chunks:
            starts.append(starts[-1] + stop - first)
        slot_mapping_T = torch.cat([self.slot_mapping_T[a:b] for a, b in chunks])
        return AttentionMeta(tuple(starts), tuple(b for _, b in chunks), (self.blocks,) * len(chunks), slot_mapping_T)

    def attend(self, ops: Ops, *chunks: tuple[int, int]) -> Tensor:
        q_THd = torch.cat([self.q_THd[a:b] for a, b in chunks])
        kind = self.window, self.soft_cap
        return ops.paged_attention(q_THd, self.pool, self.layout, 1, self.meta(*chunks), Scoring(0.2, *kind))

    def expected(self, at_Q: Tensor) -> Tensor:
        """Of the queries at these positions."""
        k, v = (as_stored(x, self.layout).transpose(0, 1) for x in (self.k, self.v))
        repeat = self.q_THd.shape[1] // k.shape[0]
        scores = self.q_THd[at_Q].double().transpose(0, 1) @ k.repeat_interleave(repeat, 0).transpose(1, 2) * 0.2
        behind = at_Q[:, None] - torch.arange(k.shape[1])
        hidden = (behind < 0) | (behind >= (self.window or len(k[0])))
        if self.soft_cap is not None:
            scores = self.soft_cap * (scores / self.soft_cap).tanh()
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(repeat, 0)).transpose(0, 1)


# Dtypes, and whether keys and values are in int8: each with the first of several shapes, two of them with the others.
KINDS = [(torch.float32, False), (torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False)]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "is_int8"),
    [
        *(((9, 3), 64, *kind) for kind in KINDS),
        *((*shape, *kind) for shape in (((4, 4), 80), ((8, 1), 128)) for kind in KINDS[:2]),
        *((*shape, *kind) for shape in (((5, 1), 64), ((2, 1), 48)) for kind in KINDS[2:]),
    ],
)
def test_attention_over_a_long_context_in_any_chunks(
    ops: Ops, is_int8: bool, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """A query's result is the same in a prompt, in a chunk of one, decoded alone, and decoded in a batch."""
    if isinstance(ops, CpuOps) and ops.isa == emulated.ISA and heads != (4, 4):
        pytest.skip("one shape takes half a minute where it is emulated")
    _check_any_chunks(ops, Sequence(ops, dtype, heads, head_dim, length := 1200, is_int8=is_int8), length, dtype)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("window", "soft_cap", "dtype", "is_int8"),
    [
        *((100, None, *kind) for kind in KINDS),
        *((*own, *kind) for own in ((1, None), (None, 2.0)) for kind in KINDS[:2]),
        *((700, 2.0, *kind) for kind in KINDS[2:]),
    ],
)
def test_attention_with_a_window_or_a_soft_cap_in_any_chunks(
    ops: Ops, is_int8: bool, window: int | None, soft_cap: float | None, dtype: torch.dtype
) -> None:
    sequence = Sequence(ops, dtype, (4, 2), 64, length := 1200, is_int8=is_int8)
    sequence.window, sequence.soft_cap = window, soft_cap
    _check_any_chunks(ops, sequence, length, dtype)
    if window is not None:  # blocks behind it are others' by now, and hold what is no number
        first = 1000
        whole, own = sequence.attend(ops, (first, length)), sequence.blocks.clone()
        free = min(set(range(len(own) + 1)) - set(own.tolist()))
        sequence.pool.view(-1, 2 * sequence.layout.layer_share)[free] = torch.nan
        sequence.blocks[: (first - window + 1) // 16] = free
        assert torch.equal(sequence.attend(ops, (first, length)), whole)
        assert torch.equal(sequence.attend(ops, (length - 1, length))[0], whole[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
def test_attention_with_a_window_in_a_block_that_is_not_full(ops: Ops, is_int8: bool, dtype: torch.dtype) -> None:
    """What is not written yet may be no number, and is not read in place of blocks behind the window."""
    sequence = Sequence(ops, dtype, (4, 2), 64, length := 49, is_int8=is_int8)
    sequence.pool.fill_(torch.nan)
    store(ops, sequence.pool, sequence.layout, 1, sequence.k, sequence.v, sequence.meta((0, length)))
    sequence.window = 1
    error = (sequence.attend(ops, (48, length)).double() - sequence.expected(torch.tensor([48]))).abs().max()
    assert error < (1e-5 if dtype is torch.float32 else 2e-2)


def _check_any_chunks(ops: Ops, sequence: Sequence, length: int, dtype: torch.dtype) -> None:
    whole = sequence.attend(ops, (0, length))
    some_Q = torch.arange(0, length, 7)  # the oracle takes longer than all else
    error = (whole[some_Q].double() - sequence.expected(some_Q)).abs().max()
    assert error < (1e-5 if dtype is torch.float32 else 2e-2)
    chunks = [(0, 7), (7, 500), (500, 512), (512, 513), (513, 1025), (1025, 1027), (1027, length)]
    assert torch.equal(torch.cat([sequence.attend(ops, chunk) for chunk in chunks]), whole)
    assert torch.equal(sequence.attend(ops, *chunks), whole)
    decoded = [0, 63, 64, 511, 512, 700, 1023, 1199]
    for position in decoded:
        assert torch.equal(sequence.attend(ops, (position, position + 1))[0], whole[position])
    batch = [(p, p + 1) for p in decoded * 3]
    assert torch.equal(sequence.attend(ops, *batch), whole[decoded * 3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_is_not_a_number_spoils_itself_alone(ops: Ops, dtype: torch.dtype) -> None:
    sequence = Sequence(ops, dtype, (6, 2), 64, 100)
    good = sequence.attend(ops, (0, 100), (50, 51))
    sequence.q_THd[40] = torch.nan
    bad = sequence.attend(ops, (0, 100), (50, 51))
    assert bad[40].isnan().all()
    kept = [t for t in range(101) if t != 40]
    assert torch.equal(bad[kept], good[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_thread_and_two_agree(ops: Ops, dtype: torch.dtype) -> None:
    sequence = Sequence(ops, dtype, (6, 2), 64, 700)
    chunks = [(0, 600), (600, 601), (649, 650), (699, 700)]
    results = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(sequence.attend(ops, *chunks))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 64, 100])
def test_norm_and_rope_of_one_token_match_torchs_rounding(ops: Ops, width: int, dtype: torch.dtype) -> None:
    """Strided heads of a fused matrix, rows in segments; bf16 may differ in the last bit where sums are rounded
    differently.
    """
    reference = make_ops("reference")
    fused = randn(dtype, 2, 33, 5 * width + 3)
    x_THd = fused[:, width : 4 * width].view(33, 3, width)
    cos_Td, sin_Td = (torch.rand(33, width, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (3, 4))
    whole = turned(ops, x_THd, cos_Td, sin_Td)
    assert torch.equal(whole, turned(reference, x_THd, cos_Td, sin_Td))
    assert torch.equal(turned(ops, x_THd[4:5], cos_Td[4:5], sin_Td[4:5]), whole[4:5])
    own = None
    if width == WIDTH:
        own = RowOverrides(torch.tensor([0, 7, 31]), rows(3, 0))
    pool, weight_D = randn(dtype, 5, 307 * 4), randn(dtype, 6, width)
    normed = ops.rms_norm(x_THd, weight_D, 1e-5, pool, own, 1)
    expected = reference.rms_norm(x_THd, weight_D, 1e-5, pool, own, 1)
    torch.testing.assert_close(normed, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
    assert torch.equal(ops.rms_norm(x_THd[1:2], weight_D, 1e-5, pool, None, 1), normed[1:2])


FALLBACKS: list[Callable[[Ops, torch.dtype], Tensor]] = [
    lambda ops, dtype: turned(ops, randn(dtype, 1, 3, 2, 16), randn(dtype, 2, 3, 16), randn(dtype, 3, 3, 16)),
    lambda ops, dtype: ops.rms_norm(randn(dtype, 1, 3, 16), randn(dtype, 2, 16), 1e-5, randn(dtype, 3, 16), None, 0),
    lambda ops, dtype: lora(ops, dtype, randn(dtype, 1, 4, WIDTH), randn(dtype, 2, 4, WIDTH), [4], [4]),
    lambda ops, dtype: Sequence(ops, dtype, (2, 1), 16, 9).attend(ops, (4, 9)),
    lambda ops, dtype: ops.vera_shrink(randn(dtype, 1, 4, 16), ProjectionMatrix(randn(dtype, 2, 8, 16))),
]


@pytest.mark.parametrize("call", FALLBACKS)
def test_other_dtypes_are_the_references(ops: Ops, call: Callable[[Ops, torch.dtype], Tensor]) -> None:
    assert torch.equal(call(ops, torch.float16), call(make_ops("reference"), torch.float16))
