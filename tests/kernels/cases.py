"""Every backend against a dense fp64 reference, over popularity × ranks × dtypes × widths, with rows scattered in the
pool. The tests are collected where there are backends: by `test_ops` and, for cuda, by `interpreted` and `test_gpu`.

Shapes: T tokens, I input width, O output width, R rank, N adapters.
"""

from __future__ import annotations

import random
from typing import NamedTuple

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
from tests.kernels.backends import as_stored, store, turned

POPULARITY = ["distinct", "uniform", "zipf", "identical", "skewed"]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Shelf:
    """A pool in which rows are put at shuffled offsets, sixteen elements apart."""

    def __init__(self, size: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
        self._free = list(range(4096, size - 4096, 4096))  # no offset is negative
        random.Random(seed).shuffle(self._free)

    def put(self, rows: Tensor, segments: int = 1, layer_offset: int = 0) -> RowTables:
        """(rows, width), in so many segments of columns; at the offset of that layer."""
        out = []
        step = rows.shape[1] // segments
        for column in range(0, rows.shape[1], step):
            offsets = []
            for row in rows[:, column : column + step]:
                at = self._free.pop()
                self.tensor[at : at + row.shape[0]] = row.to(self.tensor.dtype)
                offsets.append(at - layer_offset)
            out.append((column, min(step, rows.shape[1] - column), torch.tensor(offsets, dtype=torch.int64)))
        return RowTables(tuple(out))


class Load(NamedTuple):
    """Which adapter each token has, as segments; ranks of the adapters."""

    segments: AdapterSegments
    ranks: list[int]


def load(popularity: str, num_tokens: int = 24) -> Load:
    rng = random.Random(popularity)
    match popularity:
        case "distinct":
            counts = [1] * num_tokens
        case "uniform":
            counts = [num_tokens // 6] * 6
        case "identical":
            counts = [num_tokens]
        case "zipf":
            counts = [12, 6, 3, 2, 1]
        case _:
            counts = [num_tokens - 4, 1, 1, 2]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    ranks = [rng.choice([0, 1, 4, 8, 16, 33, 64]) for _ in counts]
    return Load(AdapterSegments(tuple(starts), tuple(a + c for a, c in zip(starts, counts, strict=True))), ranks)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().clamp(min=1.0)
    assert float((got.double() - expected).abs().max() / scale) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(64, 48, 1), (576, 192, 1), (96, 96, 3)])
@pytest.mark.parametrize("popularity", POPULARITY)
def test_lora(ops: Ops, popularity: str, widths: tuple[int, int, int], dtype: torch.dtype) -> None:
    width_in, width_out, num_segments = widths
    (segments, ranks), layer_offset = load(popularity), 128
    generator = torch.Generator().manual_seed(3)
    shelf = Shelf(4096 * 2 * 3 * (sum(ranks) + 8), dtype)
    x_TI = torch.randn(24, width_in, generator=generator).to(dtype)
    y_TO = torch.randn(24, width_out, generator=generator).to(dtype)
    a_RI = torch.randn(sum(ranks), width_in, generator=generator).to(dtype)
    b_RO = torch.randn(sum(ranks), width_out, generator=generator).to(dtype)
    start = tuple(sum(ranks[:i]) for i in range(len(ranks) + 1))
    scale = tuple(0.5 + i for i in range(len(ranks)))
    a, b = (shelf.put(m, num_segments, layer_offset) for m in (a_RI, b_RO))
    table = LoraTable(a, b, start, scale)
    expected = y_TO.double()
    for n, rank in enumerate(ranks):
        rows, own = slice(segments.start[n], segments.stop[n]), slice(start[n], start[n] + rank)
        expected[rows] += scale[n] * (x_TI[rows].double() @ a_RI[own].double().T @ b_RO[own].double())
    (h_TR,) = ops.lora_shrink(x_TI, shelf.tensor, (table,), segments, layer_offset)
    assert h_TR.dtype == torch.float32
    ops.lora_expand((y_TO,), (h_TR,), shelf.tensor, (table,), segments, layer_offset)
    close(y_TO, expected, dtype)


def summed_rows(rank: int, columns: list[tuple[int, int]]) -> RowTables:
    """The rows of an A that is not in the pool: row r sums the columns r, r + rank, r + 2 rank, … of all segments."""
    codes = [[~(rank << 32 | (row - first) % rank) for row in range(rank)] for first, _ in columns]
    return RowTables(tuple((*own, torch.tensor(code)) for own, code in zip(columns, codes, strict=True)))


def joined(tables: list[RowTables]) -> RowTables:
    return RowTables(
        tuple((*own[0][:2], torch.cat([s[2] for s in own])) for own in zip(*(t.segments for t in tables), strict=True))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "columns"), [(64, [(0, 64)]), (577, [(0, 577)]), (96, [(0, 40), (40, 40), (80, 16)])]
)
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_rows_that_sum_columns(
    ops: Ops, num_tokens: int, width: int, columns: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    """Beside an adapter with rows in the pool, whose results are those without them, bit for bit."""
    generator = torch.Generator().manual_seed(num_tokens)
    ranks, layer_offset = [5, 16, 33, 64], 128
    x_TI, a_RI = (torch.randn(n, width, generator=generator).to(dtype) for n in (5 * num_tokens, 5))
    shelf = Shelf(4096 * 160, dtype)
    own = RowTables(tuple((c, w, shelf.put(a_RI[:, c : c + w], 1, layer_offset).segments[0][2]) for c, w in columns))
    a = joined([own, *(summed_rows(rank, columns) for rank in ranks[1:])])
    b = shelf.put(torch.zeros(sum(ranks), 8), 1, layer_offset)
    starts = tuple(sum(ranks[:i]) for i in range(len(ranks) + 1))
    segments = AdapterSegments(*(tuple((i + k) * num_tokens for i in range(4)) for k in (0, 1)))
    table = LoraTable(a, b, starts, (1.0,) * 4)
    (h_TR,) = ops.lora_shrink(x_TI, shelf.tensor, (table,), segments, layer_offset)
    for i, rank in enumerate(ranks[1:], 1):
        rows = slice(i * num_tokens, (i + 1) * num_tokens)
        padded = torch.nn.functional.pad(x_TI[rows].double(), (0, -width % rank))
        close(h_TR[rows, :rank], padded.view(num_tokens, -1, rank).sum(1), torch.float32)
    alone = LoraTable(own, RowTables(tuple((c, w, o[:5]) for c, w, o in b.segments)), (0, 5), (1.0,))
    (expected_TR,) = ops.lora_shrink(x_TI, shelf.tensor, (alone,), AdapterSegments((0,), (num_tokens,)), layer_offset)
    assert torch.equal(h_TR[:num_tokens, :5], expected_TR[:num_tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_segments", [1, 2])
def test_vera(ops: Ops, num_segments: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    num_tokens, rank, width_in, width_out = 10, 32, 48, 64

    def random_(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x_TI, y_TO = random_(num_tokens, width_in), random_(num_tokens, width_out)
    a_RI, b_OR = random_(rank, width_in + 16) / 8, random_(width_out + 32, rank) / 8
    d_TR, b_TO = random_(6, rank), random_(6, width_out)
    shelf = Shelf(4096 * 40, dtype)
    a, b = ProjectionMatrix(a_RI), ProjectionMatrix(b_OR)
    table = VeraTable(a, b, shelf.put(d_TR, num_segments, 64), shelf.put(b_TO, num_segments, 64), 2, 8)
    expected = y_TO.double()
    z = x_TI[2:8].double() @ a_RI[:, :width_in].double().T
    expected[2:8] += b_TO.double() * ((z * d_TR.double()) @ b_OR[:width_out].double().T)
    z_TR = ops.vera_shrink(x_TI[2:8], a)
    assert z_TR.dtype == torch.float32
    ops.vera_expand(y_TO, z_TR, shelf.tensor, table, 64)
    close(y_TO, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 3), (8, 8), (4, 1)])
@pytest.mark.parametrize(
    ("window", "soft_cap", "has_sinks"), [(None, None, False), (5, None, False), (7, 0.5, False), (5, None, True)]
)
@pytest.mark.parametrize("is_int8", [False, True])
def test_paged_attention(
    ops: Ops,
    is_int8: bool,
    window: int | None,
    soft_cap: float | None,
    has_sinks: bool,
    heads: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """Decode, whole prompts and chunks in the middle of one, over shuffled blocks."""
    num_heads, num_kv = heads
    layout = KvLayout(2, 4, num_kv, 16, int8_per_element=dtype.itemsize if is_int8 else 0)
    generator = torch.Generator().manual_seed(5)
    sequences = [(1, 13), (7, 7), (5, 16), (1, 1)]  # (queries, context)
    pool = torch.randn(40 * 2 * layout.layer_share, generator=generator).to(dtype)
    free = list(range(40))
    random.Random(0).shuffle(free)
    # From heads that have next to no sink to one that leaves next to nothing.
    sinks_H = torch.linspace(-200, 200, num_heads).to(dtype) if has_sinks else None
    queries, contexts, tables, slots, keys, values, expected = [], [], [], [], [], [], []
    for num_queries, context in sequences:
        blocks = [free.pop() for _ in range(-(-context // 4))]
        q = torch.randn(num_queries, num_heads, 16, generator=generator).to(dtype)
        k, v = (torch.randn(context, num_kv, 16, generator=generator).to(dtype) for _ in range(2))
        past = context - num_queries
        at = [blocks[p // 4] * 4 + p % 4 for p in range(context)]
        earlier = AttentionMeta((0, past), (past,), (torch.tensor(blocks),), torch.tensor(at[:past], dtype=torch.int64))
        if past:
            store(ops, pool, layout, 1, k[:past], v[:past], earlier)
        queries.append(q)
        contexts.append(context)
        tables.append(torch.tensor(blocks))
        slots += at[past:]
        keys.append(k[past:])
        values.append(v[past:])
        repeat = num_heads // num_kv
        k, v = as_stored(k, layout), as_stored(v, layout)
        scores = torch.einsum("qhd,chd->hqc", q.double(), k.repeat_interleave(repeat, 1)) * 0.25
        if soft_cap is not None:
            scores = soft_cap * (scores / soft_cap).tanh()
        behind = torch.arange(past, context)[:, None] - torch.arange(context)[None]
        hidden = (behind < 0) | (behind >= (window or context))
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks_H is not None:  # one more key, whose value is 0
            sinks_HQ1 = sinks_H.double()[:, None, None].expand(-1, num_queries, 1)
            scores = torch.cat([scores, sinks_HQ1], dim=-1)
        weights = scores.softmax(-1)[..., :context]
        expected.append(torch.einsum("hqc,chd->qhd", weights, v.repeat_interleave(repeat, 1)))
    starts = tuple(sum(n for n, _ in sequences[:i]) for i in range(len(sequences) + 1))
    meta = AttentionMeta(starts, tuple(contexts), tuple(tables), torch.tensor(slots))
    store(ops, pool, layout, 1, torch.cat(keys), torch.cat(values), meta)
    got_THd = ops.paged_attention(torch.cat(queries), pool, layout, 1, meta, Scoring(0.25, window, soft_cap, sinks_H))
    close(got_THd, torch.cat(expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_rounded_as_rows(ops: Ops, dtype: torch.dtype) -> None:
    """Zeros, what is no number and infinities too. A token that attends to itself alone has its value; the rest of its
    block is not written.
    """
    layout = KvLayout(1, 4, 2, 16, int8_per_element=dtype.itemsize)
    generator = torch.Generator().manual_seed(7)
    k_TKd, v_TKd = (torch.randn(6, 2, 16, generator=generator).to(dtype) for _ in range(2))
    v_TKd[1], v_TKd[2, 0, 3], v_TKd[3, 1, 5], v_TKd[4] = 0, torch.nan, torch.inf, v_TKd[4] * 1e-3
    pool = torch.full((6 * layout.layer_share,), torch.nan, dtype=dtype)
    tables = tuple(torch.tensor([block]) for block in range(6))
    meta = AttentionMeta(tuple(range(7)), (1,) * 6, tables, 4 * torch.arange(6))
    store(ops, pool, layout, 0, k_TKd, v_TKd, meta)
    got_THd = ops.paged_attention(v_TKd.nan_to_num(0, 0, 0), pool, layout, 0, meta, 0.25)
    expected_TKd = as_stored(v_TKd, layout)
    for t in range(6):
        for head in range(2):
            if v_TKd[t, head].isfinite().all():
                close(got_THd[t, head], expected_TKd[t, head], dtype)
            else:
                assert bool(got_THd[t, head].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_turns_the_first_elements_of_a_head(ops: Ops, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    x_THd, angles_Th = (torch.randn(*shape, generator=generator) for shape in ((3, 4, 16), (3, 6)))
    x_THd = x_THd.to(dtype)
    cos_Td, sin_Td = (torch.cat((f(angles_Th), f(angles_Th)), dim=1).to(dtype) for f in (torch.cos, torch.sin))
    got_THd = turned(ops, x_THd, cos_Td, sin_Td)
    first, second = x_THd[..., :12].double().chunk(2, dim=-1)
    cos_T1d, sin_T1d = cos_Td.double().unsqueeze(1), sin_Td.double().unsqueeze(1)
    expected = x_THd.double()
    expected[..., :12] = torch.cat((first, second), -1) * cos_T1d + torch.cat((-second, first), -1) * sin_T1d
    close(got_THd, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_embedding_take_an_adapters_rows(ops: Ops, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    shelf = Shelf(4096 * 20, dtype)
    own_ND = torch.randn(2, 32, generator=generator).to(dtype)
    own = RowOverrides(torch.tensor([1, 4]), shelf.put(own_ND, layer_offset=0))
    table_VD = torch.randn(9, 32, generator=generator).to(dtype)
    ids_T = torch.tensor([3, 3, 0, 8, 1])
    x_TD = ops.embed(table_VD, ids_T, shelf.tensor, own)
    expected = table_VD[ids_T]
    expected[[1, 4]] = own_ND
    assert torch.equal(x_TD, expected)
    weight_D = torch.randn(32, generator=generator).to(dtype)
    for x in (x_TD, torch.randn(5, 3, 32, generator=generator).to(dtype)):
        normal = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5)
        want = normal * weight_D.double()
        rows = own_ND.double() if x.dim() == 2 else own_ND.double().unsqueeze(1)
        want[[1, 4]] = normal[[1, 4]] * rows
        close(ops.rms_norm(x, weight_D, 1e-5, shelf.tensor, own, 0), want, dtype)
        close(ops.rms_norm(x, weight_D, 1e-5, shelf.tensor, None, 0), normal * weight_D.double(), dtype)
        close(ops.rms_norm(x, weight_D, 1e-5, shelf.tensor, own, 0, 1.0), want + normal, dtype)  # 1 + weight
    half_TD = torch.randn(5, 32, generator=generator).to(dtype)
    for rows in (own, None):
        sum_TD, norm_TD = ops.add_rms_norm(x_TD, half_TD, weight_D, 1e-5, shelf.tensor, rows, 0)
        assert torch.equal(sum_TD, x_TD + half_TD)
        assert torch.equal(norm_TD, ops.rms_norm(sum_TD, weight_D, 1e-5, shelf.tensor, rows, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "num_segments"), [(48, 1), (70, 2)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_scale_outputs(ops: Ops, has_bias: bool, width: int, num_segments: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    shelf = Shelf(4096 * 20, dtype)
    wide_TM = torch.randn(5, width + 8, generator=generator).to(dtype)  # columns of a wider result
    bias_O = torch.randn(width, generator=generator).to(dtype) if has_bias else None
    rows_NO = torch.randn(3, width, generator=generator).to(dtype)
    own = RowOverrides(torch.tensor([0, 2, 4]), shelf.put(rows_NO, num_segments, 64))
    expected = wide_TM.double()
    plain = expected[[0, 2, 4], 8:] - (0 if bias_O is None else bias_O.double())
    expected[[0, 2, 4], 8:] += rows_NO.double() * plain
    ops.scale_rows(wide_TM[:, 8:], bias_O, shelf.tensor, own, 64)
    close(wide_TM, expected, dtype)
    assert torch.equal(wide_TM[:, :8].double(), expected[:, :8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "num_segments"), [(48, 1), (96, 2)])
def test_pairs_of_outputs_are_turned(ops: Ops, width: int, num_segments: int, dtype: torch.dtype) -> None:
    """Each token has a distance of its own, less and more than a vector's width, and the whole width in one case."""
    generator = torch.Generator().manual_seed(10)
    shelf, distances = Shelf(4096 * 40, dtype), [1, 3, 24, width // 2]
    wide_TM = torch.randn(6, width + 8, generator=generator).to(dtype)  # columns of a wider result
    rows_NO, turn_NO = (torch.randn(4, width, generator=generator).to(dtype) for _ in range(2))
    tokens = torch.tensor([0, 2, 3, 5])
    own = RowOverrides(tokens, shelf.put(rows_NO, num_segments, 64))
    turn = shelf.put(turn_NO, num_segments, 64)
    expected = wide_TM.double()
    for n, (token, distance) in enumerate(zip(tokens.tolist(), distances, strict=True)):
        y_O = expected[token, 8:].clone()
        partners_O = y_O.view(-1, 2, distance).flip(1).flatten()
        expected[token, 8:] = y_O + rows_NO[n].double() * y_O + turn_NO[n].double() * partners_O
    ops.turn_rows(wide_TM[:, 8:], shelf.tensor, own, turn, torch.tensor(distances), 64)
    close(wide_TM, expected, dtype)
    assert torch.equal(wide_TM[:, :8].double(), expected[:, :8])
    assert torch.equal(wide_TM[[1, 4]].double(), expected[[1, 4]])


def test_rope_turns_pairs_of_halves(ops: Ops) -> None:
    x_THd = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(7))
    angle_Th = torch.rand(3, 4, generator=torch.Generator().manual_seed(8))
    cos, sin = torch.cat([angle_Th] * 2, -1).cos(), torch.cat([angle_Th] * 2, -1).sin()
    complex_ = torch.complex(x_THd[..., :4], x_THd[..., 4:]) * torch.polar(torch.ones(3, 4), angle_Th).unsqueeze(1)
    torch.testing.assert_close(turned(ops, x_THd, cos, sin), torch.cat((complex_.real, complex_.imag), -1))
