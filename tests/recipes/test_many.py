"""Recipes of several adapters: files that list them, several files, and one recipe on each of some files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from loray.cli.plan import plan
from loray.errors import LorayError
from loray.recipes.many import ManyPlan, load_many
from tests.fixtures.recipes import RECIPE


def write(path: Path, **fields: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({k: v for k, v in (RECIPE | fields).items() if v is not None}))
    return str(path)


def listed(folder: Path, *entries: Any, **fields: Any) -> str:
    return write(folder / "listed.yaml", name=None, adapters=list(entries), **fields)


def test_entries_lie_on_the_common_recipe_with_the_defaults_of_their_method(tmp_path: Path) -> None:
    file = listed(
        tmp_path,
        {"name": "acme", "data.train": "acme.jsonl"},
        {"name": "globex", "data": {"train": "globex.jsonl"}, "adapter.rank": 2, "max_steps": 9},
        {"name": "initech", "adapter.method": "vera"},
        optimizer=None,
    )
    name, recipes = load_many([file], over={"max_steps": 5})
    assert name == "acme"
    acme, globex, initech = (recipe.spec for recipe in recipes)
    assert [spec.max_steps for spec in (acme, globex, initech)] == [5, 5, 5]  # the command's options lie on top
    assert (acme.data.train, acme.data.max_length, globex.data.train) == ("acme.jsonl", 64, "globex.jsonl")
    assert (acme.adapter.rank, globex.adapter.rank) == (4, 2)
    assert initech.optimizer.learning_rate > acme.optimizer.learning_rate
    assert {recipe.folder for recipe in recipes} == {tmp_path}
    made = ManyPlan.of(name, recipes, lambda recipe: str(recipe.folder))
    assert ManyPlan.parse(json.loads(made.model_dump_json()), source="a plan") == made
    assert (made.recipe.name, made.num_workers) == ("acme", 1)


def test_one_recipe_on_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("acme", "globex"):
        (tmp_path / "customers" / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / "customers" / f"{name}.jsonl").touch()
    name, recipes = load_many([write(tmp_path / "recipes" / "tone.yaml", name="tone")], each="customers/*.jsonl")
    assert name == "tone"
    assert [recipe.spec.name for recipe in recipes] == ["tone-acme", "tone-globex"]
    assert recipes[0].data().train == str(tmp_path / "customers" / "acme.jsonl")
    assert recipes[0].spec.data.eval_fraction == 0.2  # the rest of the recipe's data
    _, alone = load_many([None], over={"name": "tone", "base": "tiny"}, each="customers/*.jsonl")
    assert [recipe.data().train for recipe in alone] == [recipe.data().train for recipe in recipes]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a", "a"], {}, "several adapters are called tone"),
        (["a", "missing.yaml"], {}, r"recipe missing\.yaml does not exist"),
        (["a", "b"], {"each": "*.jsonl"}, "these are 2 recipes: give one"),
        (["a"], {"each": "nothing/*.jsonl"}, "no file matches"),
        (["a"], {"each": "s3://bucket/*.jsonl"}, "files of this machine"),
        (["a"], {"each": "bad/*"}, "rename the file"),
        (["listed"], {"each": "*.yaml"}, "no name of its own"),
        (["listed"], {"over": {"name": "other"}}, "--name names one adapter"),
        (["nameless"], {}, "adapter 1 has no name"),
        (["unknown"], {}, r"adapter acme: a recipe has no field 'adapter\.rnk'; did you mean adapter\.rank"),
        (["wrong"], {}, "adapter acme: the recipe is not valid"),
        (["empty"], {}, "`adapters` is a list of adapters"),
    ],
)
def test_what_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], options: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "a": write(tmp_path / "a.yaml", name="tone"),
        "b": write(tmp_path / "b.yaml", name="other"),
    }
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a customer.jsonl").touch()
    for name, entries in {
        "listed": [{"name": "acme"}],
        "nameless": [{"adapter.rank": 2}],
        "unknown": [{"name": "acme", "adapter.rnk": 2}],
        "wrong": [{"name": "acme", "adapter.rank": 0}],
        "empty": [],
    }.items():
        files[name] = write(tmp_path / f"{name}.yaml", name=None, adapters=entries)
    with pytest.raises(LorayError, match=message):
        load_many([files.get(name, name) for name in names], **options)


def test_a_plan_has_a_line_for_what_is_trained_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    a, b = (write(tmp_path / f"{name}.yaml", name=name, base="smollm2") for name in ("a", "b"))
    far = write(tmp_path / "far.yaml", name="far", base="smollm2", attention={"type": "s2", "group_size": 16})

    def call(*args: str) -> Any:
        return CliRunner().invoke(plan, [*args, "--device", "a100-80gb"])

    assert call(a, b).output.count("plan: 2 adapters together: ") == 1
    assert call(a, b, far).output.count("adapters together: ") == 2  # one after the other
    shown = json.loads(call(a, b, "--json").output)
    assert (shown[0]["adapters"], len(shown)) == (["a", "b"], 1)
    other = write(tmp_path / "other.yaml", name="other", base="smollm2", dtype="float32")
    assert "dtype is auto in the one and float32 in the other" in str(call(a, other).exception)
    dpo = write(tmp_path / "dpo.yaml", name="dpo", base="smollm2", objective={"type": "dpo"})
    assert "train dpo alone" in str(call(a, dpo).exception)
