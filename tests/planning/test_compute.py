"""FLOPs against sums by hand and masks counted out; time is what its parts say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loray.errors import SpecError
from loray.planning.compute import (
    attention_pairs,
    count_flops,
    estimate_time,
    exchange,
    exchanges,
    group_sizes,
    model_flops_per_token,
    plan_traffic,
)
from loray.planning.memory import plan_memory
from loray.planning.run import shape_of
from loray.recipes.resolve import quarter
from loray.spec import ATTENTION_MODULES
from tests.fixtures.planning import A100, known, long_run, recipe


@pytest.mark.parametrize("num_heads", [1, 2, 9])
@pytest.mark.parametrize(("num_tokens", "group"), [(24, 8), (21, 8), (3, 8), (9, 8), (16, 4)])
def test_pairs_are_those_of_the_mask(num_tokens: int, group: int, num_heads: int) -> None:
    pairs = 0
    for head in range(num_heads):
        offset = 0 if head < num_heads // 2 else group // 2
        cuts = {0, *range(offset, num_tokens, group)}
        pairs += sum(q - max(c for c in cuts if c <= q) + 1 for q in range(num_tokens))
    assert attention_pairs(num_tokens, group, num_heads) == pairs
    assert attention_pairs(num_tokens, None, num_heads) == num_heads * num_tokens * (num_tokens + 1) // 2


def test_frozen_weights_take_one_product_in_the_backward_pass() -> None:
    adapter = {"method": "lora", "rank": 8, "target_modules": ATTENTION_MODULES}
    spec = recipe(adapter=adapter, data={"train": "x", "max_length": 4096})
    run = shape_of(spec, known("Llama-2-7b-hf"))
    flops, tokens = count_flops(run), 4096
    linears = 2 * tokens * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    head = 2 * tokens * 32000 * 4096
    lora = 2 * tokens * 32 * 4 * 8 * 2 * 4096
    attention = 4 * 128 * 32 * 32 * (4096 * 4097 // 2)
    assert flops.attention == flops.dense_attention == attention
    assert flops.forward == linears + 2 * head + lora + attention
    assert flops.backward == linears + 2 * lora + 2.5 * attention
    assert flops.recompute == 0
    again = count_flops(replace(run, checkpointing=True))
    assert again.recompute == flops.forward - 2 * head
    assert again.total == flops.total + again.recompute


def test_pairs_are_two_rows_and_one_forward_pass_before_the_first_step() -> None:
    model = known("Llama-2-7b-hf")
    data = {"train": "x", "max_length": 1024}
    sft = shape_of(recipe(batch={"rows": 4}, data=data), model)
    dpo = shape_of(recipe(batch={"rows": 2}, data=data, objective={"type": "dpo"}), model)
    assert (dpo.tokens_per_worker, dpo.tokens_per_step) == (sft.tokens_per_worker, sft.tokens_per_step)
    assert plan_memory(dpo, A100).peak_bytes == plan_memory(sft, A100).peak_bytes
    plain, paired = count_flops(sft), count_flops(dpo)
    assert (paired.forward, paired.backward) == (plain.forward, plain.backward)
    tokens = 4 * 1024
    assert paired.reference == paired.forward - 2 * tokens * 32000 * 4096  # the loss's gradient is made there too
    assert (paired.total, plain.reference) == (plain.total, 0.0)
    times = [estimate_time(run, A100, plan_traffic(run)) for run in (dpo, sft)]
    assert times[0].step_s == times[1].step_s
    assert 0.3 < times[0].reference_s / times[0].step_s < 0.5
    assert times[1].reference_s == 0.0
    assert shape_of(recipe(batch={"tokens": 4096}, data=data, objective={"type": "dpo"}), model).num_rows == 2
    with pytest.raises(SpecError, match=r"batch\.tokens is 2000"):
        shape_of(recipe(batch={"tokens": 2000}, data=data, objective={"type": "dpo"}), model)


def test_answers_without_pairs_take_one_more_forward_pass_and_orpo_needs_no_reference() -> None:
    model = known("Llama-2-7b-hf")
    data = {"train": "x", "max_length": 1024}
    sft = shape_of(recipe(batch={"rows": 4}, data=data), model)
    for kind in ("orpo", "simpo"):
        pairs = shape_of(recipe(batch={"rows": 2}, data=data, objective={"type": kind}), model)
        assert pairs == replace(sft, num_rows=2, row_size=2)
    kto = shape_of(recipe(batch={"rows": 4}, data=data, objective={"type": "kto"}), model)
    assert kto == replace(sft, extra_forwards=1, has_reference=True)
    assert plan_memory(kto, A100).peak_bytes == plan_memory(sft, A100).peak_bytes
    plain, single = count_flops(sft), count_flops(kto)
    one = plain.forward - 2 * 4 * 1024 * 32000 * 4096  # the loss's gradient is made there too
    assert (single.forward - plain.forward, single.backward) == (one, plain.backward)
    assert single.reference == 2 * one  # of both sequences of a row
    slower, time = (estimate_time(run, A100, plan_traffic(run)) for run in (kto, sft))
    assert 1.3 < slower.step_s / time.step_s < 1.5
    sharded = [plan_traffic(replace(run, num_workers=4, strategy="fsdp2")).gather_bytes for run in (kto, sft)]
    assert sharded[0] == pytest.approx(1.5 * sharded[1])
    assert shape_of(recipe(batch={"tokens": 4096}, data=data, objective={"type": "kto"}), model).num_rows == 2
    options = {"group_size": None, "target_share": 1.0}
    per_token = model_flops_per_token(model, kto.adapter, {1024: 4}, extra_forwards=1, **options)
    assert per_token - model_flops_per_token(model, kto.adapter, {1024: 4}, **options) == one / (4 * 1024)


def test_s2_attention_takes_about_a_quarter() -> None:
    flops = count_flops(long_run("Llama-2-7b-hf", 32768))
    # Plain heads G/N; shifted ones have three whole groups and two halves: 3.5 of 4.
    assert flops.attention / flops.dense_attention == pytest.approx((1 + 3.5 / 4) / 2 / 4, rel=1e-3)


def test_workers_share_a_row() -> None:
    alone = count_flops(long_run("Llama-2-7b-hf", 32768))
    shared = count_flops(long_run("Llama-2-7b-hf", 32768, workers=4, sequence=4))
    assert shared.total == pytest.approx(alone.total / 4)


def test_time_adds_up() -> None:
    run = long_run("Llama-2-7b-hf", 32768, workers=8, strategy="zero2", gradient_checkpointing=True)
    time = estimate_time(run, A100, plan_traffic(run))
    flops = count_flops(run)
    products = (flops.total - 4.5 * flops.attention) / (312e12 * 0.65)
    assert time.matmul_s == pytest.approx(products)
    assert time.attention_s == pytest.approx(4.5 * flops.attention / (312e12 * 0.5))
    assert time.tokens_per_s == pytest.approx(8 * 32768 / time.step_s)
    assert time.mfu == pytest.approx((flops.forward + flops.backward) / time.step_s / 312e12)
    slow = estimate_time(run, A100.model_copy(update={"link_bandwidth": 1e9}), plan_traffic(run))
    assert slow.communication_s == pytest.approx(plan_traffic(run).gradient_bytes / 1e9)


def test_gathers_are_hidden_behind_computation_where_they_can_be() -> None:
    run = long_run("Llama-2-7b-hf", 32768, workers=8, strategy="zero3")
    traffic = plan_traffic(run)
    fast, slow = (
        estimate_time(run, A100.model_copy(update={"link_bandwidth": rate}), traffic) for rate in (300e9, 1e8)
    )
    gradients = traffic.gradient_bytes
    assert fast.communication_s == pytest.approx(gradients / 300e9)
    computed = slow.matmul_s + slow.attention_s + slow.memory_s
    assert slow.communication_s == pytest.approx((traffic.gather_bytes + gradients) / 1e8 - computed)


MB = 1e6


def test_llama_3_8b_at_131k_over_8_ranks() -> None:
    run = long_run("Meta-Llama-3-8B", 131072, workers=8, sequence=8)
    fixed, grown = exchange(run, 8, 8192), exchange(run, 8, quarter(131072))
    assert fixed.halo_bytes == 8192 * 128 * 4 * 2  # G·d·h_s in bf16: 8.4 MB
    assert grown.halo_bytes == 32768 * 128 * 4 * 2
    assert fixed.halo_bytes / MB == pytest.approx(8.4, abs=0.05)
    assert grown.halo_bytes / MB == pytest.approx(33.6, abs=0.05)
    assert (fixed.ulysses_bytes / MB, fixed.ring_bytes / MB) == pytest.approx((293.6, 469.8), abs=0.05)
    assert fixed.ulysses_bytes / fixed.halo_bytes == pytest.approx(35, abs=0.5)
    assert grown.ulysses_bytes / grown.halo_bytes == pytest.approx(8.7, abs=0.1)
    assert fixed.num_hops == grown.num_hops == 1


def test_llama_3_8b_at_a_million_over_32_ranks() -> None:
    run = long_run("Meta-Llama-3-8B", 1 << 20, workers=32, sequence=32)
    fixed, grown = exchange(run, 32, 8192), exchange(run, 32, quarter(1 << 20))
    assert fixed.halo_bytes / MB == pytest.approx(8.4, abs=0.05)
    assert fixed.ulysses_bytes / MB == pytest.approx(650, abs=0.5)
    assert fixed.ring_bytes / MB == pytest.approx(4161, abs=0.5)
    assert fixed.num_hops == 1
    assert grown.num_hops == 7  # L = G/8: back to the start of the group


def test_what_is_sent_by_several_rows_and_micro_batches_by_two_ranks_and_by_one() -> None:
    run = long_run("smollm2", 16384, workers=8, sequence=4, batch={"rows": 3, "accumulation": 5})
    traffic = plan_traffic(run)
    halo = 3 * 4096 * 64 * 2 * 2  # 9 query and 3 KV heads: two serve shifted heads
    assert traffic.exchange == exchange(run, 4, 4096)
    assert traffic.exchange.halo_bytes == halo
    assert traffic.halo_bytes == 2 * halo * 30 * 5
    assert traffic.gather_bytes == 0
    two = plan_traffic(long_run("smollm2", 16384, workers=2, sequence=2))  # one sends forward and one backward
    assert two.exchange is not None
    assert two.halo_bytes == two.exchange.halo_bytes * 30
    one = plan_traffic(long_run("smollm2", 16384))
    assert (one.halo_bytes, one.gradient_bytes, one.gather_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("strategy", "bytes_a_parameter", "gathers"), [("ddp", 8, 0), ("zero2", 6, 0), ("zero3", 4, 2), ("fsdp2", 4, 2)]
)
def test_gradients_and_gathers(strategy: str, bytes_a_parameter: int, gathers: int) -> None:
    run = long_run("Llama-2-7b-hf", 32768, workers=8, strategy=strategy)
    traffic = plan_traffic(run)
    assert traffic.gradient_bytes == int(run.trained.total * bytes_a_parameter * 7 / 8)
    assert traffic.gather_bytes == int(gathers * (run.base.total + run.trained.total) * 2 * 7 / 8)
    assert traffic.exchange is None


def test_tables_hold_the_recipes_group_a_quarter_and_a_fixed_one() -> None:
    run = long_run("Meta-Llama-3-8B", 131072, group_size=16384)
    assert group_sizes(run) == [16384, 32768, 8192]
    assert group_sizes(long_run("Meta-Llama-3-8B", 32768)) == [8192]
    table = exchanges(run, group_sizes(run))
    assert [row[0].sequence for row in table] == [2, 4, 8, 16, 32]
    assert [e.group_size for e in table[0]] == [16384, 32768, 8192]


def test_rows_that_do_not_divide_end_the_table() -> None:
    run = long_run("smollm2", 8192 * 3 // 2, data={"train": "x", "max_length": 12})
    assert [row[0].sequence for row in exchanges(run, [4])] == [2, 4]
    with pytest.raises(SpecError, match="do not divide by 8"):
        exchange(run, 8, 4)
