"""A node's own memory beside its GPUs, against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest

from loray.planning.devices import GB, host
from loray.planning.memory import HOST_MOMENTS, plan_host
from loray.planning.plan import make_plan
from loray.planning.run import RunShape
from tests.planning.recipes import A100, MACHINE, long_run
from tests.planning.test_memory import EMBEDDING, TOTALS, TRAINED

BASE = 2 * TOTALS["Llama-2-7b-hf"]
SMALL = A100.model_copy(update={"host_memory_bytes": 200 * GB})


def llama(**fields: Any) -> RunShape:
    return long_run("Llama-2-7b-hf", 32768, workers=8, gradient_checkpointing=True, **fields)


def sizes(run: RunShape) -> dict[str, int]:
    plan = plan_host(run, A100)
    assert plan is not None
    return {item.name: item.nbytes for item in plan.items}


def test_what_a_node_of_eight_workers_holds() -> None:
    held = sizes(llama(batch={"rows": 1, "accumulation": 4}))
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
    held = sizes(llama(strategy=strategy))
    assert held["a tensor of the base, as each worker reads it"] == 8 * 2 * EMBEDDING
    assert "the base, as each worker reads it" not in held


def test_workers_on_other_nodes_are_not_counted() -> None:
    assert sizes(long_run("Llama-2-7b-hf", 32768, workers=16))["the base, as each worker reads it"] == 8 * BASE


def test_a_quantized_base_is_read_tensor_by_tensor() -> None:
    run = llama(quantization={})
    held = sizes(run)
    assert held["a tensor of the base, as each worker reads it"] == 8 * 2 * EMBEDDING
    assert held["the base, as each worker reads it"] == 8 * run.base_bytes < 8 * 0.3 * BASE


def test_measuring_before_publication_holds_the_base() -> None:
    perplexity = {"perplexity": {}}
    assert sizes(llama(evaluation=perplexity))["the base, to be measured"] == 8 * BASE
    assert "the base, to be measured" not in sizes(llama())
    shared = sizes(llama(strategy="fsdp2", evaluation=perplexity))
    assert shared["a tensor of the base, to be measured"] == 8 * 2 * EMBEDDING
    assert "the base, to be measured" not in shared


def test_the_peak_is_the_fullest_moment() -> None:
    plan = plan_host(llama(), A100)
    assert plan is not None
    assert plan.peak_moment == "loading"
    assert plan.peak_bytes == max(plan.at(moment) for moment in HOST_MOMENTS)
    assert plan.dominant.name == "the base, as each worker reads it"
    assert plan.fits


def test_a_node_that_is_too_small_is_refused_with_the_strategy_that_fits() -> None:
    (problem,) = make_plan(long_run("Llama-2-13b-hf", 16384, workers=8, gradient_checkpointing=True), SMALL).problems
    assert problem.severity == "refusal"
    assert "GB of a node's own memory while loading, where a node of 8 workers on a100-80gb has 190.0 GB" in (
        problem.message
    )
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
