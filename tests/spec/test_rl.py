"""The section `objective` of recipes that learn from rewards, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loray.errors import SpecError
from loray.recipes.fields import given, to_yaml
from loray.recipes.load import load_recipe
from loray.spec import RlSpec, TrainSpec

REWARD = {"builtin": "number", "field": "answer"}


def recipe(objective: dict[str, Any] | None = None, **fields: Any) -> TrainSpec:
    section = {"type": "rl", "reward": REWARD} | (objective or {})
    return load_recipe(over={"name": "larger", "objective": section, "data": {"train": "a.jsonl"}} | fields).spec


def objective_of(**objective: Any) -> RlSpec:
    found = recipe(objective).objective
    assert isinstance(found, RlSpec)
    return found


def test_grpo_is_the_published_one() -> None:
    rl, grpo = objective_of(), objective_of(type="grpo")
    assert (rl.loss, rl.advantage, rl.divisor, rl.kl) == ("ppo", "center", "tokens", 0.0)
    assert (grpo.loss, grpo.advantage, grpo.divisor, grpo.kl) == ("ppo", "std", "sequences", 0.04)
    assert objective_of(type="grpo", kl=0.0).kl == 0.0


def test_losses_have_their_own_bounds() -> None:
    ppo, cispo = objective_of().token_loss(7.0), objective_of(loss="cispo").token_loss()
    assert (ppo.clip_low, ppo.clip_high, ppo.divisor) == (0.8, 1.2, 7.0)
    assert (cispo.clip_low, cispo.clip_high) == (0.0, 4.0)
    dapo = objective_of(clip=[0.8, 1.28], kl=0.1).token_loss()
    assert (dapo.clip_low, dapo.clip_high, dapo.kl) == (0.8, 1.28, 0.1)


def test_a_grader_is_given_by_its_fields_and_written_back(tmp_path: Path) -> None:
    grader = {"type": "text_similarity", "evaluation_metric": "rouge_l", "reference": "{{item.answer}}"}
    grader["input"] = "{{sample.output_text}}"
    spec = recipe({"reward": {"grader": grader}})
    assert isinstance(spec.objective, RlSpec)
    assert spec.objective.runs_code is None
    pairs = [f"objective.reward.grader.{name}={value}" for name, value in grader.items()]
    rest = {"name": "larger", "data": {"train": "a.jsonl"}}
    assert load_recipe(over=given(["objective.type=rl", *pairs]) | rest).spec == spec
    (tmp_path / "recipe.yaml").write_text(to_yaml(spec, "small"))
    assert load_recipe(str(tmp_path / "recipe.yaml")).spec.objective == spec.objective


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"temperature": 0.7}, "temperature is not for rollouts"),
        ({"top_p": 0.9}, "top_p is not for rollouts"),
        ({"loss": "dro"}, "dro needs a beta"),
        ({"loss": "dro", "beta": 0.1, "clip": [0.8, 1.2]}, "dro has no clip_low"),
        ({"clip": [1.2, 0.8]}, r"clip_low 1.2 is above clip_high 0.8"),
        ({"reward": None}, "give a reward"),
        ({"environment": "a:B"}, "give a reward"),
        ({"group_size": 1}, "greater than or equal to 2"),
        ({"reward": {"grader": {"type": "endpoint"}}}, "type 'endpoint' is not supported: take string_check or"),
    ],
)
def test_objectives_that_are_refused(objective: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        recipe(objective)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"batch": {"order": "packed"}}, "batch.order packed joins rows"),
        ({"batch": {"order": "concat"}}, "batch.order concat joins rows"),
        ({"num_workers": 2}, "trains in one process"),
        ({"num_workers": 2, "parallel": {"sequence": 2}}, "trains in one process"),
        ({"quantization": {}}, "quantization is not for"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is not for"),
        ({"early_stopping": {}, "evaluation": {"interval_steps": 5}}, "early_stopping is not for"),
        ({"attention": {"type": "s2"}}, "samples with dense attention"),
        ({"optimizer": {"loraplus_lr_ratio": 16}}, "one learning rate"),
        ({"evaluation": {"perplexity": {}}}, "evaluates by rewards"),
        ({"publish": {"description": "larger"}}, "publishes what was sampled"),
        ({"data": {"train": "a.jsonl", "format": "preference"}}, "data.format preference is for"),
    ],
)
def test_recipes_that_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        recipe(**fields)
