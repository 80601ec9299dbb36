"""The halo of S2-Attn against its definition: sets of tokens, found by walking over cuts."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from loray.errors import SpecError
from loray.planning.sequence import HaloMessage, HaloPlan, padded_length, ring_elements, ulysses_elements
from tests.planning.closed_form import closed_form_elements

HEADS = [(9, 3), (8, 2), (8, 8), (3, 1), (1, 1), (2, 1), (32, 8)]
GROUP = 16


def keys_needed(num_tokens: int, group: int, shifted: bool, queries: range) -> set[int]:
    """Every token that some query of `queries` attends to."""
    cuts = sorted({0, *range(group // 2 if shifted else 0, num_tokens, group)})
    return {t for q in queries for t in range(max(c for c in cuts if c <= q), q + 1)}


def kv_heads_of(num_heads: int, num_kv_heads: int, shifted: bool) -> set[int]:
    heads = range(num_heads // 2, num_heads) if shifted else range(num_heads // 2)
    return {h // (num_heads // num_kv_heads) for h in heads}


@pytest.mark.parametrize("length", [32, 16, 24, 8, 4, 10, 1, 17])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_every_rank_gets_exactly_the_keys_that_it_lacks(heads: int, kv_heads: int, num_ranks: int, length: int) -> None:
    plan = HaloPlan(num_ranks * length, num_ranks, GROUP, heads, kv_heads)
    for rank, (shifted, half) in itertools.product(range(num_ranks), enumerate(plan.halves)):
        assert set(half.kv_heads) == kv_heads_of(heads, kv_heads, bool(shifted))
        halo = plan.halo(rank, half)
        own = range(rank * length, (rank + 1) * length)
        needed = keys_needed(plan.num_tokens, GROUP, bool(shifted), own) - set(own) if half.query_heads else set()
        assert set(range(halo.start, halo.stop)) == needed
        supplied = [t for span in halo.spans for t in range(span.start, span.stop)]
        assert supplied == sorted(needed)
        assert all(t // length == span.rank < rank for span in halo.spans for t in range(span.start, span.stop))
        assert halo.num_hops == len(halo.spans)


@pytest.mark.parametrize("length", [32, 8, 4, 10])
def test_what_one_sends_another_receives(length: int) -> None:
    plan = HaloPlan(4 * length, 4, GROUP, 9, 3)
    sent = [t for rank in range(4) for t in plan.sent(rank)]
    received = [t for rank in range(4) for t in plan.received(rank)]
    assert sorted(sent, key=key) == sorted(received, key=key)
    assert all(t.span.rank == rank for rank in range(4) for t in plan.sent(rank))
    assert sum(plan.elements_sent(r, 64) for r in range(4)) == sum(plan.elements_received(r, 64) for r in range(4))


def key(transfer: HaloMessage) -> tuple[int, int, str, int]:
    return transfer.to, transfer.span.rank, transfer.half.name, transfer.span.start


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("halves", [1, 2, 3, 4, 6])
def test_a_multiple_of_half_a_group_carries_the_closed_formula(heads: int, kv_heads: int, halves: int) -> None:
    length, d = halves * GROUP // 2, 64
    plan = HaloPlan(8 * length, 8, GROUP, heads, kv_heads)
    plain, shifted = (len(half.kv_heads) for half in plan.halves)
    assert shifted == kv_heads - (heads // 2) * kv_heads // heads
    assert plan.num_hops == 1
    assert plan.elements_received(0, d) == plan.elements_sent(7, d) == 0
    for rank in range(1, 8):
        splits_shifted = rank * length % GROUP == 0
        expected = closed_form_elements(GROUP, shifted if splits_shifted else plain, d)
        assert plan.elements_received(rank, d) == plan.elements_sent(rank - 1, d) == expected
        assert plan.elements_received(rank, d, num_rows=3) == 3 * expected


@pytest.mark.parametrize(
    ("length", "hops"), [(32, 1), (17, 1), (16, 1), (13, 2), (12, 1), (8, 1), (4, 3), (10, 2), (1, 15)]
)
def test_hops(length: int, hops: int) -> None:
    assert HaloPlan(32 * length, 32, GROUP, 8, 2).num_hops == hops
    assert HaloPlan(length, 1, GROUP, 8, 2).num_hops == 0


def test_traffic_at_a_fixed_group_depends_neither_on_tokens_nor_on_ranks() -> None:
    plans = [HaloPlan(n, p, GROUP, 9, 3) for n in (256, 512, 4096) for p in (2, 4, 16)]
    assert {plan.elements_sent(0, 64) for plan in plans} == {closed_form_elements(GROUP, 2, 64)}


def test_figures_of_llama_3_8b() -> None:
    """131,072 tokens over 8 ranks in bf16, in MB: 35 times under Ulysses with G = 8192, 8.7 times with G = N/4."""
    n, heads, kv_heads, d = 131072, 32, 8, 128
    fixed, quarter = HaloPlan(n, 8, 8192, heads, kv_heads), HaloPlan(n, 8, n // 4, heads, kv_heads)
    volumes = [
        fixed.bytes_sent(3, d, "bfloat16"),
        quarter.bytes_sent(3, d, "bfloat16"),
        2 * ulysses_elements(n, 8, heads, kv_heads, d),
        2 * ring_elements(n, 8, kv_heads, d),
    ]
    assert [round(v / 1e6, 1) for v in volumes] == [8.4, 33.6, 293.6, 469.8]
    million = HaloPlan(1 << 20, 32, 8192, heads, kv_heads)
    assert round(million.bytes_sent(3, d, "bfloat16") / 1e6, 1) == 8.4
    assert round(2 * ulysses_elements(1 << 20, 32, heads, kv_heads, d) / 1e6) == 650
    assert round(2 * ring_elements(1 << 20, 32, kv_heads, d) / 1e6) == 4161
    assert HaloPlan(1 << 20, 32, 1 << 18, heads, kv_heads).num_hops == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 2, 7, 8, 2), "even"),
        ((32, 2, 0, 8, 2), "even"),
        ((33, 2, 8, 8, 2), "pad rows to 34"),
        ((32, 0, 8, 8, 2), "at least 1"),
        ((0, 1, 8, 8, 2), "at least 1"),
        ((32, 2, 8, 8, 3), "do not divide"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[int, int, int, int, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        HaloPlan(*arguments)


def test_a_rank_that_is_not_there() -> None:
    with pytest.raises(SpecError, match="no rank 2"):
        HaloPlan(32, 2, 8, 8, 2).sent(2)


def test_padding_of_a_row() -> None:
    assert [padded_length(n, 4) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]


def test_planning_imports_no_torch() -> None:
    code = "import sys, loray.planning.sequence; assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
