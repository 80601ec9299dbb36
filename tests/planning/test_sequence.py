"""The halo of S2-Attn against its definition: sets of tokens, found by walking over cuts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from loray.errors import SpecError
from loray.planning.compute import count_flops, estimate_time, plan_traffic
from loray.planning.memory import plan_memory
from loray.planning.plan import make_plan
from loray.planning.run import RunShape, shape_of
from loray.planning.sequence import DensePlan, HaloMessage, HaloPlan, padded_length, ulysses_elements
from tests.fixtures.planning import A100, bare, closed_form_elements, known, recipe

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
    for rank in range(4):
        assert plan.elements_sent(rank, 64) == sum(map(num_elements, plan.sent(rank)))
        assert plan.elements_received(rank, 64) == sum(map(num_elements, plan.received(rank)))


def num_elements(transfer: HaloMessage) -> int:
    """Keys and values of heads of 64."""
    return 2 * (transfer.span.stop - transfer.span.start) * len(transfer.half.kv_heads) * 64


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


def dense_run(sequence: int, base: str = "Meta-Llama-3-8B", **fields: Any) -> RunShape:
    data = {"train": "x", "max_length": 4096}
    return shape_of(recipe(data=data, num_workers=sequence, parallel={"sequence": sequence}, **fields), known(base))


def test_every_head_is_on_one_rank_with_the_key_value_heads_that_serve_it() -> None:
    plan = DensePlan(64, 4, 12, 3)
    assert [plan.query_heads(rank) for rank in range(4)] == [range(3), range(3, 6), range(6, 9), range(9, 12)]
    assert [plan.kv_heads(rank) for rank in range(4)] == [range(1), range(2), range(1, 3), range(2, 3)]
    shared = DensePlan(64, 8, 16, 4)
    assert [shared.kv_heads(rank).start for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_bytes_are_those_of_the_closed_formulas() -> None:
    plan = DensePlan(131072, 8, 32, 8)
    formula = ulysses_elements(131072, 8, 32, 8, 128)
    assert formula * 2 / 1e6 == pytest.approx(293.6, abs=0.05)
    for rank in range(8):
        assert plan.forward_elements(rank, 128) == plan.backward_elements(rank, 128) == formula
    uneven = DensePlan(64, 4, 9, 3)  # 2, 2, 2 and 3 query heads, served by 1, 2, 1 and 1 KV heads
    assert [uneven.forward_elements(rank, 8) for rank in range(4)] == [21 * 128, 19 * 128, 21 * 128, 23 * 128]
    assert [uneven.backward_elements(rank, 8) for rank in range(4)] == [19 * 128, 25 * 128, 19 * 128, 21 * 128]


def test_the_rank_with_most_heads_works_longest() -> None:
    assert DensePlan(64, 4, 9, 3).imbalance == pytest.approx(3 / (9 / 4))
    assert DensePlan(64, 4, 8, 2).imbalance == 1
    assert DensePlan(64, 4, 1, 1).imbalance == 4
    assert [len(DensePlan(64, 4, 3, 1).query_heads(rank)) for rank in range(4)] == [0, 1, 1, 1]
    assert [len(DensePlan(64, 4, 3, 1).kv_heads(rank)) for rank in range(4)] == [0, 1, 1, 1]


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(SpecError, match="do not divide by 4 ranks"):
        DensePlan(62, 4, 8, 2)
    with pytest.raises(SpecError, match="8 query heads do not divide by 3"):
        DensePlan(64, 4, 8, 3)
    short = {"train": "x", "max_length": 6}
    with pytest.raises(SpecError, match="more than the 6 tokens of a row"):
        shape_of(recipe(data=short, num_workers=8, parallel={"sequence": 8}), known("smollm2"))


def test_traffic_of_a_step() -> None:
    once = ulysses_elements(4096, 4, 32, 8, 128) * 2 * 32
    plain, again = (plan_traffic(dense_run(4, gradient_checkpointing=x)) for x in (False, True))
    assert (plain.dense_bytes, again.dense_bytes) == (2 * once, 3 * once)
    assert plain.halo_bytes == 0
    assert plain.exchange is None
    assert plan_traffic(dense_run(1)).dense_bytes == 0


def test_memory_of_the_exchange() -> None:
    alone, shared = ({i.name: i.nbytes for i in plan_memory(dense_run(p), bare()).items} for p in (1, 4))
    assert shared["activations: mlp"] == alone["activations: mlp"] // 4
    assert shared["ulysses: gradients of q, k and v"] == 3 * 2 * (32 + 16) * 1024 * 128
    assert "activations: heads beyond an equal share" not in shared
    twice = {i.name: i.nbytes for i in plan_memory(dense_run(16), bare()).items}
    assert twice["activations: heads beyond an equal share"] == 32 * 2 * 2 * 8 * 256 * 128
    uneven = {i.name: i.nbytes for i in plan_memory(dense_run(2, "smollm2"), bare()).items}
    assert uneven["ulysses: gradients of q, k and v"] == 3 * 2 * (10 + 2 * 4) * 64 * 2048
    # One more query head with its output, and one more key-value head, in each of 30 layers.
    assert uneven["activations: heads beyond an equal share"] == 30 * 2 * 2 * (1 + 1) * 64 * 2048


def test_time_and_plan() -> None:
    run = dense_run(4, "smollm2")
    flops, slow = count_flops(run), A100.model_copy(update={"link_bandwidth": 1e9})
    time = estimate_time(run, A100, plan_traffic(run))
    assert time.attention_s == pytest.approx(3.5 * flops.attention * 12 / 9 / (312e12 * A100.dense_attention_share))
    assert estimate_time(run, slow, plan_traffic(run)).communication_s > time.communication_s
    assert make_plan(run, A100).to_dict()["dense_exchange"] == "ulysses"
    assert make_plan(dense_run(4), A100).to_dict()["dense_exchange"] == "ulysses"
    assert make_plan(dense_run(1), A100).to_dict()["dense_exchange"] is None
