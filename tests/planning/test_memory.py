"""A worker's memory, against sums by hand."""

from __future__ import annotations

import pytest

from loray.bases.presets import preset, preset_names
from loray.planning.compute import estimate_time, plan_traffic
from loray.planning.devices import host
from loray.planning.memory import CHECKPOINT, MOMENTS, TrainingMemory, plan_memory
from loray.planning.run import RunShape, count_base
from tests.planning.recipes import A100, MACHINE, bare, long_run

TOTALS = {
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-2-13b-hf": 13_015_864_320,
    "Llama-2-70b-hf": 68_976_648_192,
    "Meta-Llama-3-8B": 8_030_261_248,
    "smollm2": 134_515_008,
}
EMBEDDING, NORMS, LORA = 32000 * 4096, 65 * 4096, 32 * 4 * 8 * 2 * 4096  # Llama-2-7B, rank 8 on q, k, v, o
TRAINED = EMBEDDING + NORMS + LORA


def sizes(run: RunShape) -> dict[str, int]:
    return {item.name: item.nbytes for item in plan_memory(run, bare()).items}


def test_well_known_bases_have_the_published_number_of_parameters() -> None:
    assert preset_names() == sorted(TOTALS)
    for name, total in TOTALS.items():
        config = preset(name)
        assert config is not None
        assert count_base(config).total == total
    assert preset("nothing") is None


def test_what_a_replica_holds() -> None:
    held = sizes(long_run("Llama-2-7b-hf", 32768, gradient_checkpointing=True))
    assert held["base weights"] == 2 * (TOTALS["Llama-2-7b-hf"] - NORMS - EMBEDDING)
    assert held["base's embedding rows, to compare"] == 2 * EMBEDDING
    assert held["trained parameters"] == 2 * TRAINED
    assert held["gradients, fp32"] == held["master weights, fp32"] == 4 * TRAINED
    assert held["AdamW moments, fp32"] == 8 * TRAINED
    assert held["largest gradient, to be added"] == 2 * EMBEDDING
    assert held["layer inputs"] == 32 * 32768 * 4096 * 2
    assert held["one layer, recomputed: mlp"] == 32768 * 3 * 11008 * 2
    assert held["one layer, recomputed: norms"] == 32768 * 2 * (4 * 4097 + 2 * 4096)
    assert held["one layer, recomputed: attention"] == 32768 * (2 * (2 * 4096 + 2 * 4096) + 4 * 32)
    assert held["one layer, recomputed: adapter"] == 32768 * 2 * (4096 + 4 * 8)
    assert held["a chunk of logits"] == 8 << 24
    kept = sizes(long_run("Llama-2-7b-hf", 32768))
    assert kept["activations: mlp"] == 32 * held["one layer, recomputed: mlp"]
    assert "layer inputs" not in kept


@pytest.mark.parametrize(
    ("strategy", "weights", "optimizer"), [("ddp", 1, 1), ("zero2", 1, 8), ("zero3", 8, 8), ("fsdp2", 8, 8)]
)
def test_strategies_shard(strategy: str, weights: int, optimizer: int) -> None:
    alone = sizes(long_run("Llama-2-7b-hf", 32768))
    held = sizes(long_run("Llama-2-7b-hf", 32768, workers=8, strategy=strategy))
    for name in ("base weights", "trained parameters"):
        assert held[name] == -(-alone[name] // weights)
    for name in ("gradients, fp32", "master weights, fp32", "AdamW moments, fp32"):
        assert held[name] == -(-alone[name] // optimizer)
    assert ("gathered weights" in held) == (weights > 1)
    assert held.get("largest gradient, to be scattered in fp32") == (6 * EMBEDDING if optimizer > 1 else None)


def test_what_is_gathered_for_use() -> None:
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    fsdp2, zero3 = (
        sizes(long_run("Llama-2-7b-hf", 32768, workers=8, strategy=s, batch={"rows": 1, "accumulation": 2}))
        for s in ("fsdp2", "zero3")
    )
    assert fsdp2["gathered weights"] == 2 * (3 * layer + 2 * EMBEDDING + 4096)  # embeddings stay with the root
    assert (
        zero3["gathered weights"] == 2 * 1_100_000_000
    )  # what DeepSpeed lets live, and prefetches, that in two copies
    assert fsdp2["gradients of earlier micro-batches, fp32"] == 4 * TRAINED
    assert "gradients of earlier micro-batches, fp32" not in zero3


@pytest.mark.parametrize(("double", "bits"), [(True, 4 + 8.125 / 64), (False, 4.5)])
def test_a_quantized_base_has_its_layers_in_four_bits(double: bool, bits: float) -> None:
    run = long_run("Llama-2-7b-hf", 32768, quantization={"bnb_4bit_use_double_quant": double})
    held, layers = sizes(run), 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = TOTALS["Llama-2-7b-hf"] - layers - NORMS - EMBEDDING
    assert held["base weights"] == pytest.approx(layers * bits / 8 + 2 * rest, abs=1)
    assert held["a matrix, dequantized"] == 2 * 4096 * 11008
    plain = long_run("Llama-2-7b-hf", 32768)
    assert estimate_time(run, A100, plan_traffic(run)).step_s > estimate_time(plain, A100, plan_traffic(plain)).step_s


def test_a_tied_head_stays_the_bases() -> None:
    held = sizes(long_run("smollm2", 16384))
    assert held["base weights"] == 2 * (TOTALS["smollm2"] - 61 * 576)
    assert "base's embedding rows, to compare" not in held


def test_fp32_parameters_are_their_own_masters() -> None:
    assert "master weights, fp32" not in sizes(long_run("smollm2", 16384, dtype="float32"))


def test_sequence_parallel_divides_what_grows_with_the_row() -> None:
    alone, shared = (sizes(long_run("Llama-2-7b-hf", 32768, workers=4, sequence=p)) for p in (1, 4))
    for name in ("activations: mlp", "activations: norms", "gradients of activations", "RoPE's cosines and sines"):
        assert shared[name] == alone[name] // 4
    halo = 8192 * 128 * 16 * 2  # G·d·h_s elements
    assert shared["halos"] == 32 * halo
    # 4,096 queries of zeros for 16 heads, and what comes out for them; keys and values beside the rank's own.
    assert shared["activations: attention over halos"] == 32 * (halo + 2 * 4096 * 16 * 128 * 2)
    assert shared["base weights"] == alone["base weights"]


def test_the_peak_is_the_fullest_moment() -> None:
    plan = plan_memory(long_run("Llama-2-7b-hf", 32768, gradient_checkpointing=True), bare())
    assert plan.peak_moment == "backward"
    assert plan.peak_bytes == max(plan.at(moment) for moment in MOMENTS)
    assert plan.dominant.name == "base weights"
    assert "a chunk of logits" not in at(plan, "backward")
    short = plan_memory(long_run("smollm2", 16384, data={"train": "x", "max_length": 64}), bare())
    assert short.peak_moment == "update"


def at(plan: TrainingMemory, moment: str) -> set[str]:
    return {item.name for item in plan.items if moment in item.moments}


def test_a_host_keeps_small_blocks_and_gives_back_large_ones() -> None:
    device = host(MACHINE, num_workers=1)
    small, large = (plan_memory(long_run("smollm2", n), device) for n in (16384, 65536))
    assert "activations: mlp" not in at(small, "update")  # 50 MB each
    assert "activations: attention" in at(small, "update")  # 19 MB
    assert "activations: attention" not in at(large, "update")
    assert host(MACHINE, num_workers=2).memory_bytes == 8 << 30


def test_rank_0_copies_a_checkpoint_into_the_memory_that_it_computes_in() -> None:
    run = long_run("smollm2", 16384)
    machine = host(MACHINE, num_workers=1)
    held = {item.name: item for item in plan_memory(run, machine).items}
    assert held[CHECKPOINT].nbytes == 14 * run.trained.total
    assert held[CHECKPOINT].moments == MOMENTS
    assert long_run("smollm2", 16384, dtype="float32").checkpoint_bytes == 12 * run.trained.total
    assert CHECKPOINT not in sizes(run)


def test_fragmentation_is_of_what_comes_and_goes() -> None:
    run = long_run("Llama-2-7b-hf", 32768)
    plan = plan_memory(run, A100.model_copy(update={"fragmentation": 0.1, "framework_bytes": 5}))
    items = {item.name: item for item in plan.items}
    passing = plan_memory(run, bare())
    most = max(sum(i.nbytes for i in passing.items if m in i.moments and i.moments != MOMENTS) for m in MOMENTS)
    assert items["fragmentation"].nbytes == int(0.1 * most)
    assert items["framework"].nbytes == 5


def test_halos_wait_for_the_backward_pass_and_are_computed_with_one_at_a_time() -> None:
    run = long_run("Llama-2-7b-hf", 32768, workers=4, sequence=4, gradient_checkpointing=True)
    plan = plan_memory(run, bare())
    held = {item.name: item for item in plan.items}
    halo = 8192 * 128 * 16 * 2
    assert held["halos"].nbytes == 32 * halo
    assert held["halos"].moments == ("loss", "backward")
    assert held["one layer, recomputed: attention over its halo"].nbytes == halo + 2 * 4096 * 16 * 128 * 2
