"""What dense attention over a sequence group sends, holds and takes."""

from __future__ import annotations

from typing import Any

import pytest

from loray.bases.presets import preset
from loray.errors import SpecError
from loray.planning.compute import count_flops, estimate_time, plan_traffic
from loray.planning.memory import plan_memory
from loray.planning.plan import make_plan
from loray.planning.run import RunShape, shape_of
from loray.planning.sequence import DensePlan, ring_elements, ulysses_elements
from tests.planning.recipes import A100, bare, recipe


def dense_run(sequence: int, base: str = "Meta-Llama-3-8B", **fields: Any) -> RunShape:
    model = preset(base)
    assert model is not None
    data = {"train": "x", "max_length": 4096}
    return shape_of(recipe(data=data, num_workers=sequence, parallel={"sequence": sequence}, **fields), model)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "exchange"),
    [(32, 8, 8, "ulysses"), (32, 8, 16, "ulysses"), (32, 1, 4, "ulysses"), (9, 3, 2, "ring"), (9, 3, 3, "ulysses")],
)
def test_ulysses_where_the_query_heads_divide(heads: int, kv_heads: int, size: int, exchange: str) -> None:
    plan = DensePlan(size * 16, size, heads, kv_heads)
    assert plan.exchange == exchange
    assert DensePlan(16, 1, heads, kv_heads).exchange == "ulysses"


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
    ring = DensePlan(64, 4, 9, 3)
    block = 2 * 16 * 3 * 8
    assert [ring.forward_elements(rank, 8) for rank in range(4)] == [block, 2 * block, 3 * block, 0]
    assert max(ring.forward_elements(rank, 8) for rank in range(4)) == ring_elements(64, 4, 3, 8)
    assert [ring.backward_elements(rank, 8) for rank in range(4)] == [block, 3 * block, 5 * block, 3 * block]


def test_the_last_rank_of_a_ring_works_longest() -> None:
    assert DensePlan(64, 4, 9, 3).imbalance == pytest.approx(7 / 4)  # 3½ blocks of 2 on average
    assert DensePlan(64, 4, 8, 2).imbalance == 1


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(SpecError, match="do not divide by 4 ranks"):
        DensePlan(62, 4, 8, 2)
    with pytest.raises(SpecError, match="8 query heads do not divide by 3"):
        DensePlan(64, 4, 8, 3)
    model = preset("smollm2")
    assert model is not None
    short = {"train": "x", "max_length": 6}
    with pytest.raises(SpecError, match="more than the 6 tokens of a row"):
        shape_of(recipe(data=short, num_workers=8, parallel={"sequence": 8}), model)


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
    assert "activations: key-value heads of several ranks" not in shared
    twice = {i.name: i.nbytes for i in plan_memory(dense_run(16), bare()).items}
    assert twice["activations: key-value heads of several ranks"] == 32 * 2 * 2 * 8 * 256 * 128
    ring = {i.name: i.nbytes for i in plan_memory(dense_run(2, "smollm2"), bare()).items}
    assert ring["ring: keys, values and gradients"] == (4 * 2 + 2 * 4) * 2 * 3 * 64 * 2048
    assert ring["ring: gradients of queries"] == (4 + 2) * 9 * 64 * 2048


def test_time_and_plan() -> None:
    run = dense_run(4, "smollm2")
    flops, slow = count_flops(run), A100.model_copy(update={"link_bandwidth": 1e9})
    time = estimate_time(run, A100, plan_traffic(run))
    assert time.attention_s == pytest.approx(3.5 * flops.attention * 7 / 4 / (312e12 * A100.dense_attention_share))
    assert estimate_time(run, slow, plan_traffic(run)).communication_s > time.communication_s
    assert make_plan(run, A100).to_dict()["dense_exchange"] == "ring"
    assert make_plan(dense_run(4), A100).to_dict()["dense_exchange"] == "ulysses"
    assert make_plan(dense_run(1), A100).to_dict()["dense_exchange"] is None
