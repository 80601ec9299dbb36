"""Bytes between workers, against figures computed by hand."""

from __future__ import annotations

import pytest

from loray.errors import SpecError
from loray.planning.compute import exchange, exchanges, group_sizes, plan_traffic
from loray.recipes.resolve import quarter
from tests.planning.recipes import long_run

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


def test_at_a_fixed_group_nothing_depends_on_tokens_or_ranks() -> None:
    volumes = set()
    for context in (1 << 15, 1 << 17, 1 << 19):
        run = long_run("Meta-Llama-3-8B", context)
        volumes |= {exchange(run, p, 4096).halo_bytes for p in (4, 8)}
    assert volumes == {4096 * 128 * 4 * 2}


def test_a_recipe_of_several_rows_and_micro_batches() -> None:
    run = long_run("smollm2", 16384, workers=8, sequence=4, batch={"rows": 3, "accumulation": 5})
    traffic = plan_traffic(run)
    halo = 3 * 4096 * 64 * 2 * 2  # 9 query and 3 KV heads: two serve shifted heads
    assert traffic.exchange == exchange(run, 4, 4096)
    assert traffic.exchange.halo_bytes == halo
    assert traffic.halo_bytes == 2 * halo * 30 * 5
    assert traffic.gather_bytes == 0


def test_of_two_ranks_one_sends_forward_and_one_backward() -> None:
    traffic = plan_traffic(long_run("smollm2", 16384, workers=2, sequence=2))
    assert traffic.exchange is not None
    assert traffic.halo_bytes == traffic.exchange.halo_bytes * 30


@pytest.mark.parametrize(
    ("strategy", "bytes_a_parameter", "gathers"), [("ddp", 8, 0), ("zero2", 6, 0), ("zero3", 4, 2), ("fsdp2", 4, 2)]
)
def test_gradients_and_gathers(strategy: str, bytes_a_parameter: int, gathers: int) -> None:
    run = long_run("Llama-2-7b-hf", 32768, workers=8, strategy=strategy)
    traffic = plan_traffic(run)
    assert traffic.gradient_bytes == int(run.trained.total * bytes_a_parameter * 7 / 8)
    assert traffic.gather_bytes == int(gathers * (run.base.total + run.trained.total) * 2 * 7 / 8)
    assert traffic.exchange is None


def test_one_worker_sends_nothing() -> None:
    traffic = plan_traffic(long_run("smollm2", 16384))
    assert (traffic.halo_bytes, traffic.gradient_bytes, traffic.gather_bytes) == (0, 0, 0)


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
