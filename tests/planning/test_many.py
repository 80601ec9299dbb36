"""Memory and time of many adapters on one base, and how workers share them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.errors import SpecError
from loray.planning.devices import Device, host
from loray.planning.many import TOKENS_PER_PASS_ON_CPU, Load, deal, plan_many
from loray.planning.memory import plan_memory
from loray.planning.run import shape_of
from loray.spec import ATTENTION_MODULES
from tests.fixtures.planning import A100, MACHINE, TOTALS, bare, known, recipe

CPU = host(MACHINE, 1)
ATTENTION = list(ATTENTION_MODULES)


def load(
    method: str = "lora", rank: int = 16, modules: list[str] = ATTENTION, *, base: str = "smollm2", **fields: Any
) -> Load:
    adapter = {"method": method, "rank": rank, "target_modules": modules}
    data = {"train": "data.jsonl", "max_length": 64}
    shape = shape_of(recipe(adapter=adapter, data=data, **fields), known(base))
    return Load(shape, num_steps=10, tokens_per_step=shape.tokens_per_step)


def adapters_bytes(loads: list[Load], device: Device) -> int:
    plan = plan_many({str(i): each for i, each in enumerate(loads)}, device)
    return next(item.nbytes for item in plan.memory.items if item.name.startswith("adapters"))


@pytest.mark.parametrize(
    ("method", "rank", "modules", "elements"),
    [
        ("lora", 16, ATTENTION, 1_843_200),
        ("lora", 16, [*ATTENTION, "gate_proj", "up_proj", "down_proj"], 4_884_480),
        ("vera", 256, ATTENTION, 76_800),
    ],
)
def test_an_adapter_adds_18_bytes_an_element(method: str, rank: int, modules: list[str], elements: int) -> None:
    loads = [load(method, rank, modules), load(method, rank, modules)]
    assert adapters_bytes(loads, CPU) == 2 * 18 * elements
    in_fp32 = [load(method, rank, modules, dtype="float32")]
    assert adapters_bytes(in_fp32, CPU) == 16 * elements  # a master is what passes read


def test_one_adapter_is_planned_as_its_run_alone() -> None:
    """Its passes have 512 tokens, and at most a quarter more of padding."""
    alone = load(batch={"rows": 8})
    plan = plan_many({"a": alone}, bare())
    theirs = plan_memory(replace(alone.shape, num_rows=10), bare())
    assert plan.tokens_per_pass == 640
    assert plan.memory.at("backward") == theirs.at("backward")


def test_a_thousand_vera_adapters_share_one_pair_and_one_base() -> None:
    plan = plan_many({str(i): load("vera", 256) for i in range(1000)}, CPU)
    items = {item.name: item.nbytes for item in plan.memory.items}
    assert items["base"] == 2 * TOTALS["smollm2"]
    assert items["VeRA's pairs"] == 6 * 256 * (576 + 576)
    assert items["the best weights so far"] == 4 * 76_800_000
    assert plan.tokens_per_pass == TOKENS_PER_PASS_ON_CPU
    keys = [load("vera", 256, rank_key) for rank_key in (["q_proj"], ["q_proj"], ["down_proj"])]
    (pairs,) = (i for i in plan_many(dict(zip("abc", keys, strict=True)), CPU).memory.items if "pairs" in i.name)
    assert pairs.nbytes == 6 * 256 * (576 + 576 + 1536 + 576)


def test_passes_are_as_large_as_fits_and_as_the_round_asks_for() -> None:
    many, few = ({str(i): load() for i in range(n)} for n in (200, 4))
    assert plan_many(many, CPU).tokens_per_pass == TOKENS_PER_PASS_ON_CPU
    assert 4 * 64 <= plan_many(few, CPU).tokens_per_pass < 6 * 64
    assert plan_many(many, A100).tokens_per_pass >= 200 * 64
    whole = plan_many(many, CPU)
    tight = CPU.model_copy(update={"memory_bytes": int((whole.memory.peak_bytes - 1) / CPU.usable_share)})
    plan = plan_many(many, tight)
    assert plan.tokens_per_pass == TOKENS_PER_PASS_ON_CPU // 2
    assert plan.memory.peak_bytes <= tight.usable_bytes


def test_a_large_micro_batch_is_a_pass_whatever_the_limit() -> None:
    assert plan_many({"a": load(batch={"rows": 100}), "b": load()}, CPU).tokens_per_pass == 6400


def test_more_than_fits_is_refused_with_the_number_that_does() -> None:
    loads = {str(i): load(rank=64) for i in range(100)}
    with pytest.raises(SpecError, match=r"100 adapters need [\d.]+ GB a worker where this-machine has") as refusal:
        plan_many(loads, CPU)
    found = re.search(r"the first (\d+) fit", str(refusal.value))
    assert found is not None
    fitting = int(found[1])
    assert 0 < fitting < 100
    plan = plan_many(dict(list(loads.items())[:fitting]), CPU)
    assert plan.tokens_per_pass >= 64
    with pytest.raises(SpecError, match=f"the first {fitting} fit"):
        plan_many(dict(list(loads.items())[: fitting + 1]), CPU)
    tiny = CPU.model_copy(update={"memory_bytes": 1 << 28})
    with pytest.raises(SpecError, match="none fits: make micro-batches smaller"):
        plan_many(loads, tiny)


def test_time_grows_with_adapters_and_is_told_beside_memory() -> None:
    one, two = (plan_many({str(i): load() for i in range(n)}, CPU) for n in (1, 2))
    assert two.round_s == pytest.approx(2 * one.round_s)
    assert two.total_s == pytest.approx(10 * two.round_s)
    shared = plan_many({str(i): load() for i in range(2)}, CPU, num_workers=2)
    assert shared.shares == (("0",), ("1",))
    assert shared.round_s == one.round_s
    half = load()._replace(tokens_per_step=32)
    assert plan_many({"a": half}, CPU).round_s < one.round_s
    assert re.fullmatch(
        r"[\d.]+ of 15.46 GB a worker: base 0.27 GB, adapters 0.08 GB, passes and libraries [\d.]+ GB; "
        r"passes of up to \d+ tokens",
        two.memory_line(),
    )
    assert re.fullmatch(r"a step of all adapters [\d.]+ s, all steps [\d.]+ min", two.time_line())


@given(st.dictionaries(st.text("abcdef", min_size=1), st.floats(0.1, 100), min_size=1), st.integers(1, 5))
def test_adapters_are_dealt_evenly_and_keep_their_order(seconds: dict[str, float], num_workers: int) -> None:
    shares = deal(seconds, num_workers)
    assert sorted(name for share in shares for name in share) == sorted(seconds)
    names = list(seconds)
    assert all(share == sorted(share, key=names.index) for share in shares)
    loads = [sum(seconds[name] for name in share) for share in shares]
    least = min(loads)
    for share, whole in zip(shares, loads, strict=True):
        assert not share or whole - min(seconds[name] for name in share) <= least + 1e-9
