"""LoRA, VeRA, scales, norms, embedding rows and RoPE by descriptors, as captured decode steps do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pytest
import torch

from loray_kernels import (
    INPUTS,
    AdapterSegments,
    DescriptorAllocator,
    InputShape,
    LoraRows,
    LoraTable,
    Ops,
    Pair,
    Parts,
    RowTables,
    StepDescriptors,
    VectorShape,
    descriptor_words,
    vector_words,
)
from loray_kernels.cuda.tables import CapturedVectors, pack_token_rows
from tests.kernels.cases import summed_rows
from tests.kernels.cuda.cases import REFERENCE, near, randn


@pytest.fixture
def ops(gathers: Ops) -> Ops:
    return gathers


A_COLUMNS = ((0, 24), (24, 16))
B_COLUMNS = (((0, 100), (100, 36)), ((0, 24),), ((0, 8),))
LORA_SHAPES = (InputShape(A_COLUMNS, B_COLUMNS), *(InputShape(((0, 8),), (((0, 8),),)),) * 3)
RANKS = ((5, 0, 1), (0, 0, 0), (2, 70, 0), (0, 3, 3))  # of q, k and v, for each adapter
SPANS = ((1, 4), (4, 5), (5, 9), (9, 11))  # their tokens; 0 and 11 are the base's
LAYER_SHARE = 40_000


def table(adapters: Sequence[Sequence[LoraRows]], module: int) -> LoraTable:
    def rows(columns: Sequence[tuple[int, int]], side: str) -> RowTables:
        offsets = [[o for own in adapters for o in getattr(own[module], side)[s]] for s in range(len(columns))]
        return RowTables(tuple((c, w, torch.tensor(o)) for (c, w), o in zip(columns, offsets, strict=True)))

    starts = tuple(accumulate((ranks[module] for ranks in RANKS), initial=0))
    scales = tuple(own[module].scale for own in adapters)
    return LoraTable(rows(A_COLUMNS, "a"), rows(B_COLUMNS[module], "b"), starts, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_what_a_steps_tables_give(ops: Ops, dtype: torch.dtype) -> None:
    """Bit for bit. Rows are cut into segments; adapters lack modules or have nothing in a layer; one has no A in the
    pool; the last item is padding.
    """
    places = iter(range(0, LAYER_SHARE - 200, 101))

    def rows(rank: int, columns: Sequence[tuple[int, int]]) -> tuple[list[int], ...]:
        return tuple([next(places) for _ in range(rank)] for _ in columns)

    def inputs(adapter: int, rank: int) -> tuple[list[int], ...]:
        if adapter != 2:
            return rows(rank, A_COLUMNS)
        return tuple(offsets.tolist() for _, _, offsets in summed_rows(rank, list(A_COLUMNS)).segments)

    adapters = [
        [LoraRows(inputs(n, rank), rows(rank, B_COLUMNS[m]), 0.5 + m + n) for m, rank in enumerate(ranks)]
        for n, ranks in enumerate(RANKS)
    ]
    allocator = DescriptorAllocator(LORA_SHAPES, torch.device("cpu"), num_words=2000)
    items = []
    for own, (first, stop) in zip(adapters, SPANS, strict=True):
        found = {name: lora for name, lora in zip(INPUTS[0], own, strict=True) if lora.a[0]}
        words = descriptor_words([found], [-1, 0], LORA_SHAPES)
        assert words is not None
        items.append((allocator.add(words), first, stop - first))
    step = StepDescriptors(allocator.table, torch.tensor([*items, (0, 0, 0)]))
    segments = AdapterSegments(tuple(first for first, _ in SPANS), tuple(stop for _, stop in SPANS))
    tables = tuple(table(adapters, module) for module in range(3))
    pool, x_TI, y_TO = randn(2, dtype, 2 * LAYER_SHARE), randn(3, dtype, 12, 40), randn(4, dtype, 12, 168)
    got, want, expected = (y_TO.clone() for _ in range(3))
    ops.add_adapters(x_TI, got, None, pool, step, 4, LAYER_SHARE)
    h = ops.lora_shrink(x_TI, pool, tables, segments, LAYER_SHARE)
    ops.lora_expand(torch.split(want, (136, 24, 8), dim=1), h, pool, tables, segments, LAYER_SHARE)
    REFERENCE.add_adapters(x_TI, expected, None, pool, step, 4, LAYER_SHARE)
    assert torch.equal(got, want)
    for y, close in zip(*(torch.split(both, (136, 24, 8), dim=1) for both in (got, expected)), strict=True):
        near(y, close, dtype)
    ops.add_adapters(x_TI, got, None, pool, step, 0, 0)  # nobody has anything in this layer
    assert torch.equal(got, want)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HIDDEN = ((0, 24), (24, 16))
Q, K, V = ((0, 100), (100, 36)), ((0, 24),), ((0, 8),)
OTHERS = (InputShape(((0, 8),), (((0, 8),),) * num) for num in (1, 2, 1))
SHAPES = (InputShape(HIDDEN, (Q, K, V)), *OTHERS)
SHARE, NUM_LAYERS = 20_000, 2
PAIRS = (Pair(40_000, 42_000, 21, 48), Pair(48_003, 49_001, 5, 40))  # beyond the layers' rows; B of 136 rows


class Step(NamedTuple):
    descriptors: StepDescriptors
    starts: list[int]


def step(parts: Parts = Parts.OWN) -> Step:
    """Tokens 0 and 10 are the base's; 1 to 4 have two adapters of the first pair, 5 one of the second; 6 and 7 have
    DoRA, 8 LongLoRA; 9 has nothing in layer 1. Token 11 and the last item are padding.
    """
    shape = VectorShape.of(SHAPES, NUM_LAYERS, head_dim=16)
    places = iter(range(3, SHARE - 200, 103))

    def vera(*modules: str) -> dict[tuple[str, str], list[int]]:
        named = [(m, role) for m in modules for role in ("vera_d", "vera_b")]
        return {name: [next(places) for _ in shape.slots[name].columns] for name in named}

    q_k, q, v = vera("q_proj", "k_proj"), vera("q_proj"), vera("v_proj")
    dora = {("q_proj", "scale"): [next(places), next(places)], ("v_proj", "scale"): [next(places)]}
    norms = {("input_layernorm", "norm"): [next(places), next(places)], ("self_attn.q_norm", "norm"): [next(places)]}
    rope = np.array([*np.linspace(1, 0.1, 8), 1.25], dtype=np.float32)
    allocator = DescriptorAllocator(SHAPES, torch.device("cpu"), num_words=1000, reserved=shape.head)

    def start(words: np.ndarray) -> int:
        at = allocator.add(words)
        assert at is not None
        return at

    own = [
        start(vector_words(shape, [q_k], [-1, 0], {}, None, PAIRS[0])),
        start(vector_words(shape, [{}, q], [0, 1], {}, None, PAIRS[0])),
        start(vector_words(shape, [v], [0, 0], {}, None, PAIRS[1])),
        start(vector_words(shape, [dora], [-1, 0], {}, None, None)),
        start(vector_words(shape, [norms], [0, 0], {("norm", "norm"): [next(places)]}, rope, None)),
        start(vector_words(shape, [dora], [0, -1], {}, None, None)),
    ]
    starts = [0, own[0], own[1], own[1], own[1], own[2], own[3], own[3], own[4], own[5], 0, 0]
    words = allocator.table.words
    pairs = [at + int(words[at + shape.pair_word]) for at in (own[0], own[2])]
    items = [(pairs[0], 1, 4), (pairs[1], 5, 1)]
    vectors = CapturedVectors(allocator.table, shape, torch.tensor(starts), torch.tensor([*items, (0, 0, 0)]))
    return Step(StepDescriptors(allocator.table, torch.zeros(3, 3, dtype=torch.int64), parts, vectors), starts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vera_of_two_pairs(ops: Ops, dtype: torch.dtype) -> None:
    pool, x_TI, y_TO = randn(2, dtype, 60_000) / 4, randn(3, dtype, 12, 40), randn(4, dtype, 12, 168)
    descriptors = step(Parts.VERA).descriptors
    for layer in range(NUM_LAYERS):
        got, want = y_TO.clone(), y_TO.clone()
        for o, y in ((ops, got), (REFERENCE, want)):
            o.add_adapters(x_TI, y, None, pool, descriptors, 4 * layer, layer * SHARE)
        near(got, want, dtype)
        changed = (want != y_TO).any(dim=1).tolist()
        assert changed == [False] + [layer == 1] * 4 + [True] + [False] * 6
        assert torch.equal(got[[0, *range(6, 12)]], y_TO[[0, *range(6, 12)]])


def test_the_reference_adds_what_the_equation_says() -> None:
    pool, x_TI = randn(2, torch.float32, 60_000) / 4, randn(3, torch.float32, 12, 40)
    descriptors = step(Parts.VERA).descriptors
    y_TO, pair = torch.zeros(12, 168), PAIRS[0]
    REFERENCE.add_adapters(x_TI, y_TO, None, pool, descriptors, 4, SHARE)
    vectors = descriptors.vectors
    assert vectors is not None
    slots, own_WS = vectors.shape.slots, vectors.rows_LWS[1] + SHARE
    d_at, b_at = (int(own_WS[slots["k_proj", role].word, 1]) for role in ("vera_d", "vera_b"))
    a_RI = pool[pair.a :][: pair.rank * pair.width].view(pair.rank, pair.width)[:, :40].double()
    b_OR = pool[pair.b :][: 24 * pair.rank].view(24, pair.rank).double()
    d_R, b_O = pool[d_at : d_at + pair.rank].double(), pool[b_at : b_at + 24].double()
    near(y_TO[1, 136:160], b_O * (b_OR @ (d_R * (a_RI @ x_TI[1].double()))), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_doras_scales(ops: Ops, has_bias: bool, dtype: torch.dtype) -> None:
    pool, x_TI, y_TO = randn(2, dtype, 60_000), randn(3, dtype, 12, 40), randn(4, dtype, 12, 168)
    bias_O, descriptors = randn(5, dtype, 168) if has_bias else None, step(Parts.SCALE).descriptors
    got, want = y_TO.clone(), y_TO.clone()
    for o, y in ((ops, got), (REFERENCE, want)):
        o.add_adapters(x_TI, y, bias_O, pool, descriptors, 4, SHARE)
    near(got, want, dtype)
    assert (got != y_TO).any(dim=1).tolist() == [t in (6, 7) for t in range(12)]
    assert torch.equal(got[:, 136:160], y_TO[:, 136:160])  # k has none


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_every_kind_in_one_step(ops: Ops, dtype: torch.dtype) -> None:
    """DoRA's leave the bias out, IA³'s do not; RoAd's pairs are on both sides of a cut between segments."""
    shape = VectorShape.of(SHAPES, NUM_LAYERS, head_dim=16)
    places = iter(range(3, SHARE - 200, 103))
    allocator = DescriptorAllocator(SHAPES, torch.device("cpu"), num_words=1000, reserved=shape.head)
    starts, rows = [0], list[dict[tuple[str, str], list[int]]]()
    for scaling, modules in (
        (0, ("q_proj", "v_proj")),
        (-1, ("q_proj", "k_proj")),
        (34, ("q_proj",)),
        (4, ("v_proj",)),
    ):
        roles = ("scale", "turn") if scaling > 0 else ("scale",)
        named = [(module, role) for module in modules for role in roles]
        rows.append({name: [next(places) for _ in shape.slots[name].columns] for name in named})
        at = allocator.add(vector_words(shape, [rows[-1]], [-1, 0], {}, None, None, scaling))
        assert at is not None
        starts.append(at)
    vectors = CapturedVectors(allocator.table, shape, torch.tensor(starts), torch.zeros(1, 3, dtype=torch.int64))
    descriptors = StepDescriptors(allocator.table, torch.zeros(1, 3, dtype=torch.int64), Parts.SCALE, vectors)
    pool, x_TI, y_TO, bias_O = (randn(i, dtype, *size) for i, size in enumerate([(60_000,), (5, 40), (5, 168), (168,)]))
    got, want, expected = y_TO.clone(), y_TO.clone(), y_TO.double()
    for o, y in ((ops, got), (REFERENCE, want)):
        o.add_adapters(x_TI, y, bias_O, pool, descriptors, 4, SHARE)
    for token, (own, distance) in enumerate(zip(rows, (0, 0, 34, 4), strict=True), 1):
        for module, first in (("q_proj", 0), ("k_proj", 136), ("v_proj", 160)):
            if (module, "scale") not in own:
                continue
            columns = shape.slots[module, "scale"].columns
            cut = [own.get((module, role), []) for role in ("scale", "turn")]
            parts = [[pool[at + SHARE :][:w].double() for at, (_, w) in zip(o, columns, strict=False)] for o in cut]
            scale_O, turn_O = torch.cat(parts[0]), torch.cat([*parts[1], torch.zeros(0 if distance else 1)])
            y_O = y_TO[token, first : first + len(scale_O)].double()
            plain_O = y_O - bias_O[first : first + len(scale_O)].double() if token == 1 else y_O
            partners_O = y_O.view(-1, 2, distance).flip(1).flatten() if distance else torch.zeros(1)
            expected[token, first : first + len(scale_O)] = y_O + scale_O * plain_O + turn_O * partners_O
    near(want, expected, dtype)
    near(got, want, dtype)
    unchanged = expected == y_TO.double()
    assert unchanged[0].all()
    assert torch.equal(got[unchanged], y_TO[unchanged])


def test_norms_rope_and_embedding_rows(ops: Ops) -> None:
    """What a token has, and the base's where it has none."""
    pool, x_TD, weight_D = randn(2, torch.float32, 60_000), randn(3, torch.float32, 12, 40), randn(4, torch.float32, 40)
    vectors = step().descriptors.vectors
    assert isinstance(vectors, CapturedVectors)
    plain = REFERENCE.rms_norm(x_TD, weight_D, 1e-5, pool, None, SHARE)
    for layer, name in ((1, "input_layernorm"), (None, "norm")):
        own, offset = vectors.token_rows(layer, name, "norm"), 0 if layer is None else SHARE
        y_TD = REFERENCE.rms_norm(x_TD, weight_D, 1e-5, pool, own, offset)
        parts = [pool[int(o[8]) + offset :][:w] for _, w, o in own.rows.segments]
        near(y_TD[8], plain[8] / weight_D * torch.cat(parts), torch.float32)
        others = [t for t in range(12) if t != 8]
        assert torch.equal(y_TD[others], plain[others])
        assert own.prepared[pack_token_rows].tolist() == [t if t == 8 else -1 for t in range(12)]
    inverse_h = torch.linspace(2, 3, 8)
    inverse_Th, factor_T = vectors.rope(inverse_h, 1.0)
    assert torch.equal(inverse_Th[8], torch.from_numpy(np.linspace(1, 0.1, 8, dtype=np.float32)))
    assert torch.equal(inverse_Th[[0, 7, 11]], inverse_h.expand(3, -1))
    assert factor_T.tolist() == [1.25 if t == 8 else 1.0 for t in range(12)]
    table_VD, ids_T = randn(6, torch.float32, 9, 40), torch.arange(12) % 9
    rows = vectors.embedding_rows(torch.tensor([-1, 70, -1, 0] + [-1] * 8))
    got, want = (o.embed(table_VD, ids_T, pool, rows) for o in (ops, REFERENCE))
    assert torch.equal(got, want)
    assert torch.equal(got[:4], torch.stack([table_VD[0], pool[70:110], table_VD[2], pool[:40]]))
    assert torch.equal(got[4:], table_VD[ids_T[4:]])
