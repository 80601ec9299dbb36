"""The command `loray recipes`, and the options from which commands make a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from loray.recipes.load import load_recipe, shipped
from tests.cli.run import Loray


def test_shipped_recipes_are_listed_with_their_purpose(loray: Loray) -> None:
    rows = loray("recipes", "ls", "--json").json
    assert [row["name"] for row in rows] == [name.removesuffix(".yaml") for name in shipped()]
    assert {row["method"] for row in rows} == {"lora", "vera", "ia3", "miss", "road", "longlora"}
    out = loray("recipes", "ls").out
    assert "the usual first adapter" in out
    assert "vera_smollm2" in out


def test_show_prints_a_recipe_with_reasons(loray: Loray, tmp_path: Path) -> None:
    shown = loray("recipes", "show", "--method", "vera", "--set", "seed=3")
    assert (shown.code, shown.err) == (0, "")
    fields = yaml.safe_load(shown.out)
    assert (fields["adapter"]["method"], fields["optimizer"]["learning_rate"], fields["seed"]) == ("vera", 0.01, 3)
    assert "# about ten times LoRA's" in shown.out
    assert loray("recipes", "show", "lora_smollm2", "--json").json["data"]["max_length"] == 512


def test_init_writes_a_file_that_is_the_recipe(loray: Loray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").touch()
    (tmp_path / "recipes").mkdir()
    made = loray("recipes", "init", "recipes/tone.yaml", "--method", "vera", "--data", "my.jsonl", "--name", "tone")
    assert (made.code, made.err) == (0, "")
    recipe = load_recipe("recipes/tone.yaml")
    assert recipe.spec.data.train == "../my.jsonl"
    assert recipe.data().train == str(tmp_path / "my.jsonl")
    assert (
        "exists; choose another name, or overwrite it with --force"
        in loray("recipes", "init", "recipes/tone.yaml").failed
    )
    assert loray("recipes", "init", "recipes/tone.yaml", "lora_smollm2", "--force").code == 0
    assert load_recipe("recipes/tone.yaml").spec == load_recipe("lora_smollm2").spec


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("recipes", "show", "--set", "optimizer.lerning_rate=1"), "did you mean optimizer.learning_rate?"),
        (("recipes", "show", "--set", "num_workers=many"), "num_workers: Input should be a valid integer"),
        (("plan", "--set", "rank=8"), "did you mean adapter.rank?"),
        (("train", "--name", "tone"), "without a recipe, --data FILE is needed"),
        (("train", "lora_smollm2", "--set", "sed=1"), "did you mean seed"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(loray: Loray, args: tuple[str, ...], message: str) -> None:
    assert message in loray(*args).failed


def test_explain_starts_nothing(loray: Loray) -> None:
    explained = loray("train", "--data", "my.jsonl", "--name", "tone", "--method", "longlora", "--explain")
    assert (explained.code, explained.err) == (0, "")
    fields = yaml.safe_load(explained.out)
    assert (fields["name"], fields["data"]["train"], fields["max_steps"]) == ("tone", "my.jsonl", 50)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `loray train` would have submitted. Nothing is."""
    recipes: list[Any] = []

    def submit(work: Any, *args: object) -> tuple[Any, str]:
        recipes.extend(work.recipes)
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.command.submit", submit)
    return recipes


LARGE = ("--data", "my.jsonl", "--name", "tone", "--base", "Llama-2-70b-hf")


def test_what_cannot_fit_is_refused_before_it_starts(loray: Loray, submitted: list[Any]) -> None:
    refused = loray("train", *LARGE, "--workers", 8)
    assert (refused.code, submitted) == (1, [])
    assert "a worker where this-machine has" in refused.err
    assert "--no-plan starts it all the same" in refused.err
    assert loray("train", *LARGE, "--no-plan").code == 130
    assert submitted[0].spec.base == "Llama-2-70b-hf"
    refused = loray("train", *LARGE, "--set", "use_gpu=true", "--workers", 8, "--device", "h100-80gb")
    assert "parallel.strategy: fsdp2" in refused.err  # what to change
    assert len(submitted) == 1


def test_memory_that_nobody_knows_is_only_warned_of(loray: Loray, submitted: list[Any]) -> None:
    gpu = loray("train", *LARGE, "--set", "use_gpu=true", "--address", "http://head.example:8265")
    assert "warning: needs" in gpu.out
    assert "--device says which GPU it is" in gpu.out
    far = loray("train", *LARGE, "--address", "http://head.example:8265")
    assert "no plan of memory: name the workers' --device" in far.out
    unknown = loray("train", *LARGE[:4], "--base", "mystery")
    assert "no plan: the base mystery is not on this machine" in unknown.out
    assert len(submitted) == 3


def test_a_plan_is_one_line_before_the_run(loray: Loray, submitted: list[Any]) -> None:
    started = loray("train", "--data", "my.jsonl", "--name", "tone", "--method", "vera")
    assert started.out.startswith("plan: ")
    assert "a worker on this-machine" in started.out
    assert submitted[0].spec.adapter.method == "vera"
    assert "training tone" not in started.out
