"""A worker's memory, against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest

from loray.bases.presets import preset, preset_names
from loray.planning.compute import estimate_time, plan_traffic
from loray.planning.devices import GB, host
from loray.planning.memory import (
    CHECKPOINT,
    HOST_MOMENTS,
    MEASURED_AT_ONCE,
    MOMENTS,
    MemoryPlan,
    measuring_bytes,
    plan_host,
    plan_memory,
)
from loray.planning.plan import advice_for_less, make_plan
from loray.planning.run import RunShape, count_base, shape_of
from tests.fixtures.planning import A100, MACHINE, TOTALS, bare, known, long_run, recipe

EMBEDDING, NORMS, LORA = 32000 * 4096, 65 * 4096, 32 * 4 * 8 * 2 * 4096  # Llama-2-7B, rank 8 on q, k, v, o
TRAINED = EMBEDDING + NORMS + LORA


def sizes(run: RunShape) -> dict[str, int]:
    return {item.name: item.nbytes for item in plan_memory(run, bare()).items}


def test_well_known_bases_have_the_published_number_of_parameters() -> None:
    assert preset_names() == sorted(TOTALS)
    for name, total in TOTALS.items():
        assert count_base(known(name)).total == total
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
    assert held["one layer, recomputed: attention"] == 32768 * (2 * (3 * 4096 + 2 * 4096) + 4 * 32)
    assert held["one layer, recomputed: adapter"] == 32768 * 2 * (4096 + 4 * 8)
    assert held["a chunk of logits"] == 8 << 27
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


def test_a_tied_head_stays_the_bases_and_fp32_parameters_are_their_own_masters() -> None:
    held = sizes(long_run("smollm2", 16384))
    assert held["base weights"] == 2 * (TOTALS["smollm2"] - 61 * 576)
    assert "base's embedding rows, to compare" not in held
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


def at(plan: MemoryPlan, moment: str) -> set[str]:
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


BASE = 2 * TOTALS["Llama-2-7b-hf"]
WIDTH = 3 * 11008 * 2 + (2 * 2 + 4) * 4096  # of a token in one layer: gate, up and their product, and the layer's input
PASSKEY = {"retrieval": [{"context_lengths": [4096, 2048]}]}


def llama(context: int = 32768, **fields: Any) -> RunShape:
    return long_run("Llama-2-7b-hf", context, workers=8, gradient_checkpointing=True, **fields)


def qlora(num_workers: int = 1, **fields: Any) -> RunShape:
    fields |= {"quantization": {}, "data": {"train": "data.jsonl", "max_length": 1024}, "num_workers": num_workers}
    return shape_of(recipe(gradient_checkpointing=True, **fields), known("Llama-2-70b-hf"))


def test_a_whole_base_and_the_longest_pass() -> None:
    logits = 2 * 4 * A100.loss_chunk
    for evaluation, tokens in (({"perplexity": {}}, 32768), (PASSKEY, MEASURED_AT_ONCE)):
        expected = BASE + 2 * TRAINED + tokens * WIDTH + min(logits, 2 * 4 * tokens * 32000)
        assert measuring_bytes(llama(evaluation=evaluation), bare()) == expected
    assert measuring_bytes(llama(), A100) == 0


def test_workers_share_what_they_share_in_training() -> None:
    run = llama(evaluation={"perplexity": {}}, strategy="fsdp2", sequence=4)
    gathered = 2 * (3 * run.base.layer + 2 * EMBEDDING + 4096)
    tokens = 32768 // 4
    passing = tokens * WIDTH + min(2 * 4 * A100.loss_chunk, 2 * 4 * tokens * 32000)
    assert measuring_bytes(run, bare()) == (BASE + 2 * TRAINED) // 8 + gathered + passing


def test_a_quantized_base_that_cannot_be_measured_is_refused_before_it_is_trained() -> None:
    """It is measured as it is served: one worker trains it in 4 bits, and has no room for 16."""
    assert not make_plan(qlora(), A100).is_refused
    plan = make_plan(qlora(evaluation=PASSKEY), A100)
    (problem,) = (p for p in plan.problems if p.severity == "refusal")
    assert "GB a worker to measure base and adapter before publishing (`evaluation`)" in problem.message
    assert problem.remedy.startswith("num_workers: 2 would take ")
    assert problem.remedy.endswith(", or leave out what is measured")
    assert not make_plan(qlora(2, evaluation=PASSKEY), A100).is_refused
    assert plan.to_dict()["memory"]["measuring_bytes"] == plan.measuring > A100.usable_bytes


@pytest.mark.parametrize("evaluation", [{}, PASSKEY])
def test_advice_after_a_lack_of_memory_counts_measuring(evaluation: dict[str, Any]) -> None:
    assert "would take" in advice_for_less(llama(evaluation=evaluation), A100)


SMALL = A100.model_copy(update={"host_memory_bytes": 200 * GB})


def host_sizes(run: RunShape) -> dict[str, int]:
    plan = plan_host(run, A100)
    assert plan is not None
    return {item.name: item.nbytes for item in plan.items}


def test_what_a_node_of_eight_workers_holds() -> None:
    held = host_sizes(llama(batch={"rows": 1, "accumulation": 4}))
    assert held == {
        "processes of workers and driver": 9 * 4 * GB,
        "the base, as each worker reads it": 8 * BASE,
        "trained parameters, before they move": 8 * 2 * (TRAINED + EMBEDDING),  # and the base's rows, to compare
        "parts of the data, while they are tokenised": 64 << 23,
        "a step's batches": 8 * 4 * 32768 * 32,
        "a checkpoint, as rank 0 writes it": (12 + 2) * TRAINED,
    }


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_strategies_that_shard_the_base_never_hold_it_whole(strategy: str) -> None:
    held = host_sizes(llama(strategy=strategy))
    assert held["a tensor of the base, as each worker reads it"] == 8 * 2 * EMBEDDING
    assert "the base, as each worker reads it" not in held


def test_workers_on_other_nodes_are_not_counted() -> None:
    assert host_sizes(long_run("Llama-2-7b-hf", 32768, workers=16))["the base, as each worker reads it"] == 8 * BASE


def test_a_quantized_base_is_read_tensor_by_tensor() -> None:
    run = llama(quantization={})
    held = host_sizes(run)
    assert held["a tensor of the base, as each worker reads it"] == 8 * 2 * EMBEDDING
    assert held["the base, as each worker reads it"] == 8 * run.base_bytes < 8 * 0.3 * BASE


def test_measuring_before_publication_holds_the_base() -> None:
    perplexity = {"perplexity": {}}
    assert host_sizes(llama(evaluation=perplexity))["the base, to be measured"] == 8 * BASE
    assert "the base, to be measured" not in host_sizes(llama())
    shared = host_sizes(llama(strategy="fsdp2", evaluation=perplexity))
    assert shared["a tensor of the base, to be measured"] == 8 * 2 * EMBEDDING
    assert "the base, to be measured" not in shared


def test_the_peak_of_a_host_is_its_fullest_moment() -> None:
    plan = plan_host(llama(), A100)
    assert plan is not None
    assert plan.peak_moment == "loading"
    assert plan.peak_bytes == max(plan.at(moment) for moment in HOST_MOMENTS)
    assert plan.dominant.name == "the base, as each worker reads it"
    assert plan.fits


def test_a_node_that_is_too_small_is_refused_with_the_strategy_that_fits() -> None:
    (problem,) = make_plan(long_run("Llama-2-13b-hf", 16384, workers=8, gradient_checkpointing=True), SMALL).problems
    assert problem.severity == "refusal"
    assert "node's own memory while loading, where a node of 8 workers on a100-80gb has 190.0 GB" in problem.message
    assert "most of it is the base, as each worker reads it (208.3 GB)" in problem.message
    assert problem.remedy.startswith("parallel.strategy: fsdp2 would take ")
    tiny = A100.model_copy(update={"host_memory_bytes": 20 * GB})
    (hopeless,) = make_plan(llama(strategy="fsdp2"), tiny).problems
    assert "take nodes with more memory" in hopeless.remedy


def test_a_machine_without_gpus_has_one_memory_and_an_unknown_node_is_not_judged() -> None:
    machine = host(MACHINE, num_workers=1)
    plan = make_plan(long_run("smollm2", 16384), machine)
    assert plan.host is None
    assert plan.to_dict()["host"] is None
    unknown = A100.model_copy(update={"host_memory_bytes": None})
    assert make_plan(llama(), unknown).problems == ()
