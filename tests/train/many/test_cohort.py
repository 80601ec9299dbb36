"""Which recipes are trained together, and which are refused, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.errors import SpecError, UnsupportedError
from loray.spec import TrainSpec
from loray.train.many.cohort import check_adapter, cohorts, load_of
from tests.fixtures.training import make_data, recipe


def named(name: str, method: str = "lora", **fields: Any) -> TrainSpec:
    return recipe(method, name=name, **fields)


def names(found: list[list[TrainSpec]]) -> list[list[str]]:
    return [[spec.name for spec in cohort] for cohort in found]


def test_methods_ranks_data_and_schedules_may_differ_in_a_cohort(base: BaseModel) -> None:
    specs = [
        named("a"),
        named("b", "vera", max_steps=3),
        named("c", adapter={"method": "lora", "rank": 7}, batch={"rows": 1, "order": "packed"}, seed=4),
        named("d", gradient_checkpointing=True, optimizer={"learning_rate": 1.0, "weight_decay": 0.5}),
    ]
    assert names(cohorts(specs, base.config)) == [["a", "b", "c", "d"]]


def test_rope_attention_and_sequence_groups_make_cohorts_of_their_own(base: BaseModel) -> None:
    scaled: dict[str, Any] = {"rope_scaling": {"factor": 2, "original_context": 32}}
    specs = [
        named("plain"),
        named("scaled", **scaled),
        named("s2", attention={"type": "s2", "group_size": 16}),
        named("wide", attention={"type": "s2", "group_size": 32}),
        named("pairs", parallel={"sequence": 2}, num_workers=2),
        named("plain-too", "vera"),
        named("scaled-too", **scaled),
    ]
    found = names(cohorts(specs, base.config))
    assert found == [["plain", "plain-too"], ["scaled", "scaled-too"], ["s2"], ["wide"], ["pairs"]]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"base": "other"}, "base is tiny in the one and other in the other"),
        ({"dtype": "bfloat16"}, "dtype is float32 in the one and bfloat16 in the other"),
        ({"quantization": {}}, "quantization is none in the one and bnb_4bit_quant_type='nf4'"),
    ],
)
def test_recipes_on_different_bases_are_refused_with_both_names(
    fields: dict[str, Any], field: str, base: BaseModel
) -> None:
    with pytest.raises(SpecError, match=f"acme and globex cannot be trained in one job: {field}"):
        cohorts([named("acme"), named("globex", **fields)], base.config)


def test_equal_names_and_no_recipe_are_refused(base: BaseModel) -> None:
    with pytest.raises(SpecError, match="2 of the recipes have the name acme"):
        cohorts([named("acme"), named("globex"), named("acme")], base.config)
    with pytest.raises(SpecError, match="there is no recipe to train"):
        cohorts([], base.config)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"adapter": {"method": "ia3"}}, "are .*, not ia3"),
        ({"adapter": {"method": "lora", "train_norms": True}}, "adapter.train_norms changes"),
        ({"adapter": {"method": "longlora"}, "attention": {"type": "dense"}}, "adapter.train_embeddings changes"),
        ({"adapter": {"method": "lora", "init": "pissa"}}, "adapter.init pissa takes a part out of the base"),
        ({"objective": {"type": "dpo"}}, "learn by objective.type sft, and its is dpo"),
        ({"parallel": {"strategy": "fsdp2"}}, "parallel.strategy fsdp2 takes apart the base"),
    ],
)
def test_what_a_cohort_does_not_do_is_refused_by_name(fields: dict[str, Any], reason: str, base: BaseModel) -> None:
    spec = named("acme", **fields)
    with pytest.raises(UnsupportedError, match=f"train acme alone: .*{reason}"):
        cohorts([named("globex"), spec], base.config)
    if "adapter" in fields:
        with pytest.raises(UnsupportedError, match=f"train acme alone: .*{reason}"):
            check_adapter("acme", spec.adapter)


def test_the_work_of_an_adapter_is_that_of_its_data(base: BaseModel, tmp_path: Path) -> None:
    spec = recipe(max_steps=None, num_epochs=2, num_workers=2)  # two micro-batches of two rows on each worker
    data = make_data(tmp_path, spec)
    load = load_of(spec, data, base.config)
    assert load.num_steps == 2 * 4
    assert load.tokens_per_step == data.report.num_tokens / 4
    assert load.shape.adapter == spec.adapter
