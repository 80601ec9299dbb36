"""What a plan refuses, what it warns of, and what it would change."""

from __future__ import annotations

from typing import Any

import pytest

from loray.bases.config import ModelConfig
from loray.errors import SpecError, UnsupportedError
from loray.planning.devices import host
from loray.planning.memory import plan_memory
from loray.planning.plan import make_plan, smallest_fix
from loray.planning.run import shape_of
from loray.spec import RopeParameters
from tests.fixtures.planning import A100, MACHINE, known, long_run, machine, recipe

LONG: dict[str, Any] = {"adapter": {"method": "longlora"}, "rope_scaling": {"factor": 8}}


def llama(**changes: Any) -> ModelConfig:
    return known("Llama-2-7b-hf", **changes)


@pytest.mark.parametrize(
    ("base", "context", "workers", "changes"),
    [
        ("Llama-2-7b-hf", 32768, 8, ("gradient_checkpointing: true",)),
        ("Llama-2-7b-hf", 131072, 8, ("gradient_checkpointing: true", "parallel.sequence: 2")),
        ("Llama-2-70b-hf", 16384, 8, ("gradient_checkpointing: true", "parallel.strategy: fsdp2")),
        ("Llama-2-70b-hf", 8192, 1, ("gradient_checkpointing: true", "parallel.strategy: fsdp2", "num_workers: 4")),
    ],
)
def test_what_does_not_fit_is_refused_with_the_smallest_change(
    base: str, context: int, workers: int, changes: tuple[str, ...]
) -> None:
    run = long_run(base, context, workers=workers)
    plan = make_plan(run, A100)
    (problem,) = (p for p in plan.problems if p.severity == "refusal")
    assert plan.is_refused
    assert "GB a worker where a100-80gb has 80.8 GB to use" in problem.message
    assert plan.memory.dominant.name in problem.message
    fix = smallest_fix(run, A100)
    assert fix is not None
    assert fix.changes == changes
    assert problem.remedy.startswith(" and ".join(changes))
    assert fix.peak_bytes <= A100.usable_bytes


def test_shorter_micro_batches_come_before_more_workers() -> None:
    run = long_run("Llama-2-7b-hf", 32768, batch={"rows": 8}, gradient_checkpointing=True)
    fix = smallest_fix(run, A100)
    assert fix is not None
    assert fix.changes == ("batch: {rows: 1, accumulation: 8}",)


def test_where_nothing_helps_the_plan_says_so() -> None:
    run = long_run("Llama-2-70b-hf", 32768)
    device = host(MACHINE, num_workers=1)
    problem, on_a_cpu = make_plan(run, device).problems
    assert "69.0 billion parameters is trained on the CPU" in on_a_cpu.message
    assert "nothing in the recipe makes it fit" in problem.remedy
    tiny = A100.model_copy(update={"memory_bytes": 10**8})
    assert smallest_fix(run, tiny) is None


@pytest.mark.parametrize(
    ("fields", "message", "fix"),
    [
        ({"group_size": 2048}, "group_size 2048 is less than 4096, a quarter of the context", "group_size: 4096"),
        ({"data": {"train": "x", "max_length": 4096}}, "rows of 4096 tokens lie inside one group", "group_size: 1024"),
        ({"workers": 3, "sequence": 3}, "16384 tokens do not divide by 3 workers and are", "data.max_length: 16383"),
        ({"workers": 16, "sequence": 16}, "its halo comes from up to 3 ranks", "parallel.sequence: 8"),
        ({"strategy": "zero2"}, "zero2 has one worker", "parallel.strategy: ddp"),
    ],
)
def test_warnings(fields: dict[str, Any], message: str, fix: str) -> None:
    plan = make_plan(long_run("smollm2", 16384, **fields), A100)
    assert not plan.is_refused
    (problem,) = plan.problems
    assert message in problem.message
    assert problem.remedy.startswith(fix)


def test_what_the_driver_would_refuse() -> None:
    yarn = RopeParameters(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=2048)
    with pytest.raises(UnsupportedError, match="RoPE is 'yarn' already, which linear cannot scale further"):
        shape_of(recipe(**LONG), llama(rope=yarn))
    with pytest.raises(SpecError, match="context is 32768 tokens"):
        shape_of(recipe(**LONG, data={"train": "x", "max_length": 32769}), llama())
    with pytest.raises(SpecError, match=r"batch\.tokens is 100, less than a row of 32768"):
        shape_of(recipe(**LONG, batch={"tokens": 100}), llama())


def test_rows_as_the_driver_makes_them() -> None:
    assert shape_of(recipe(**LONG), llama()).row_length == 32768
    assert shape_of(recipe(), llama()).row_length == 1024
    assert shape_of(recipe(), llama(max_position_embeddings=512)).row_length == 512
    assert shape_of(recipe(batch={"tokens": 4096}), llama()).num_rows == 4
    long = shape_of(recipe(**LONG), llama())
    assert (long.context, long.group_size) == (32768, 8192)
    assert shape_of(recipe(), llama()).group_size is None
    plain = shape_of(recipe(attention={"type": "s2"}), llama())
    assert (plain.context, plain.row_length, plain.group_size) == (4096, 1024, 256)
    assert shape_of(recipe(adapter={"method": "longlora"}), llama()).row_length == 4096


def test_json_holds_what_the_tables_show() -> None:
    plan = make_plan(long_run("smollm2", 16384, workers=2, sequence=2), A100)
    facts = plan.to_dict()
    memory = facts["memory"]
    assert memory["peak_bytes"] == plan.memory.peak_bytes == memory["moments"][plan.memory.peak_moment]
    assert sum(item["nbytes"] for item in memory["items"]) == sum(i.nbytes for i in plan.memory.items)
    assert facts["traffic"]["exchange"]["halo_bytes"] == 4096 * 64 * 2 * 2
    assert facts["time"]["step_s"] == plan.time.step_s
    trained, embedding = plan.run.trained, 49152 * 576
    counts = {"trained": trained.total, "adapter": trained.adapter, "embedding": embedding, "largest": embedding}
    assert facts["parameters"] == {"base": 134515008, "norms": 61 * 576} | counts
    assert facts["model"]["rope"]["rope_type"] == "default"
    assert plan_memory(plan.run, A100) == plan.memory


def test_a_machine_measured_while_it_was_busy_has_no_share_above_one() -> None:
    device = host(machine(1e11, 8e10, 1.25e11), num_workers=1)
    assert device.flops == 1.25e11
    shares = device.matmul_share, device.attention_share, device.dense_attention_share
    assert shares == pytest.approx((0.72, 0.64, 1.0))


def test_a_steps_rows_are_cut_to_the_fewest_micro_batches_that_fit() -> None:
    batch = {"rows": 24, "accumulation": "auto"}
    run = shape_of(recipe(batch=batch), llama())
    whole = shape_of(recipe(batch={"rows": 24}), llama())
    assert make_plan(run, A100.model_copy(update={"memory_bytes": 10**13})).run == whole
    plan = make_plan(run, A100)
    assert not plan.is_refused
    rows, times = plan.run.num_rows, plan.run.accumulation
    assert 1 < rows < 24
    assert rows * times == 24
    assert plan.run == shape_of(recipe(batch={"rows": rows, "accumulation": times}), llama())
    larger = next(n for n in range(rows + 1, 25) if 24 % n == 0)
    assert make_plan(shape_of(recipe(batch={"rows": larger, "accumulation": 24 // larger}), llama()), A100).is_refused
    nothing = make_plan(run, A100.model_copy(update={"memory_bytes": 10**10}))
    assert nothing.is_refused
    assert (nothing.run.num_rows, nothing.run.accumulation) == (1, 24)
    with pytest.raises(SpecError, match="accumulation: auto cuts the rows of a step: give rows instead of tokens"):
        recipe(batch={"tokens": 4096, "accumulation": "auto"})
    with pytest.raises(SpecError, match=r"batch\.accumulation"):
        recipe(batch={"rows": 4, "accumulation": 0})
