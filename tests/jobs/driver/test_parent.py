"""`init_adapter`: stage two goes on from a published stage one, or is refused for what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.driver.prepare import prepare
from jobs.driver.publication import publish_best
from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.errors import AdapterNotFound, BaseMismatch, SpecError
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.spec import LoraSpec
from tests.fixtures.recipes import write
from tests.fixtures.runs import trained
from tests.fixtures.tiny import write_checkpoint

TRAINING: dict[str, Any] = {
    "dtype": "float32",
    "batch": {"rows": 4},
    "optimizer": {"learning_rate": 0.05, "schedule": "constant"},
    "max_steps": 12,
}
EXTEND: dict[str, Any] = TRAINING | {
    "name": "extended",
    "adapter": {"method": "longlora", "rank": 4},
    "rope_scaling": {"factor": 2, "original_context": 64},
    "data": {"train": "texts.jsonl", "eval_fraction": 0.2, "max_length": 128},
}
YARN: dict[str, Any] = {"factor": 4, "type": "yarn"}
LONGLORA = EXTEND["adapter"]
TUNE: dict[str, Any] = TRAINING | {
    "optimizer": {"learning_rate": 0.003, "schedule": "constant"},
    "max_steps": 40,
    "name": "tuned",
    "adapter": LONGLORA,
    "attention": {"type": "dense"},
    "init_adapter": "extended",
    "data": {"train": "tasks.jsonl", "eval_fraction": 0.2, "max_length": 32, "format": "raw"},
}


def recipe(folder: Path, fields: dict[str, Any]) -> Recipe:
    """Stage one: alphabets. Stage two: a letter, asked for its successors."""
    made = write(folder, **fields)
    texts = [{"text": "".join(chr(97 + (i + t) % 26) for t in range(90))} for i in range(12)]
    tasks = [
        {"prompt": f"{chr(97 + i)}{chr(97 + (i * j) % 26)}>", "completion": chr(97 + (i + 1) % 26) * 2}
        for i in range(26)
        for j in range(2)
    ]
    for name, rows in (("texts.jsonl", texts), ("tasks.jsonl", tasks)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="module")
def settings(home_of_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """With two bases, and stage one published on the first."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(home_of_tiny, folder / "home")
    add_base(str(write_checkpoint(folder / "other", std=0.05, seed=1)), home=folder / "home", name="other")
    settings = Settings.from_env({"LORAY_HOME": str(folder / "home")})
    assert published(recipe(folder, EXTEND), settings, folder)["label"] == "extended@1"
    return settings


def published(recipe: Recipe, settings: Settings, folder: Path) -> dict[str, Any]:
    run, result = trained(recipe, settings, folder)
    return publish_best(result, run, recipe, settings)


def test_stage_two_goes_on_from_stage_one(settings: Settings, tmp_path: Path) -> None:
    tune = recipe(tmp_path, TUNE)
    prepared = prepare(tune, settings)
    parent = Catalog(settings.catalog).adapters.version("extended", 1)
    assert prepared.spec.init_adapter == "extended@1"
    assert parent.manifest.recipe is not None
    assert prepared.spec.rope_scaling == parent.manifest.recipe.rope_scaling
    evaluations = published(tune, settings, tmp_path)["evaluations"]
    manifest = Catalog(settings.catalog).adapters.version("tuned", 1).manifest
    assert manifest.parent == parent.digest
    assert manifest.recipe is not None
    assert manifest.recipe.init_adapter == "extended@1"
    assert (manifest.rope_parameters, manifest.context_length) == (parent.manifest.rope_parameters, 128)
    losses = {e["subject"]: e["value"] for e in evaluations}
    assert losses.keys() == {"parent", "adapter"}
    assert losses["adapter"] < losses["parent"]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"init_adapter": "nothing"}, AdapterNotFound, "nothing"),
        ({"init_adapter": "extended@7"}, AdapterNotFound, "has no version 7"),
        ({"base": "other"}, BaseMismatch, r"extended@1 was trained on another base than 'other'"),
        ({"adapter": {"method": "lora", "rank": 4}}, SpecError, "is a longlora adapter, and adapter.method is lora"),
        *(
            ({"adapter": LONGLORA | changed}, SpecError, message)
            for changed, message in (
                ({"rank": 8}, "its rank is 4"),
                ({"alpha": 8}, "its update is scaled by 4 "),
                ({"target_modules": ["q_proj"]}, "its target_modules are k_proj, o_proj, q_proj, v_proj"),
                ({"train_norms": False, "train_embeddings": False}, r"norms of its own \(.*an embedding of its own \("),
            )
        ),
        *(
            ({"rope_scaling": scaling}, SpecError, "another RoPE than init_adapter extended@1 .* leave it out")
            for scaling in ({"factor": 4}, *({"original_context": 64} | s for s in ({"factor": 1.5}, YARN)))
        ),
    ],
)
def test_another_adapter_is_refused(
    settings: Settings, tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepare(recipe(tmp_path, TUNE | fields), settings)


def test_the_same_rope_may_be_written_out(settings: Settings, tmp_path: Path) -> None:
    tune = recipe(tmp_path, TUNE | {"rope_scaling": EXTEND["rope_scaling"]})
    assert prepare(tune, settings).spec == prepare(recipe(tmp_path, TUNE), settings).spec


def test_a_context_is_extended_in_two_steps(settings: Settings, tmp_path: Path) -> None:
    fields = {"name": "further", "init_adapter": "extended", "rope_scaling": {"factor": 4, "original_context": 64}}
    further = recipe(tmp_path, EXTEND | fields | {"data": EXTEND["data"] | {"max_length": 256}})
    published(further, settings, tmp_path)
    manifest = Catalog(settings.catalog).adapters.version("further", 1).manifest
    parent = Catalog(settings.catalog).adapters.version("extended", 1)
    assert (manifest.parent, manifest.context_length) == (parent.digest, 256)
    assert manifest.rope_parameters != parent.manifest.rope_parameters


def test_answers_do_not_train_the_positions_of_a_larger_factor(settings: Settings, tmp_path: Path) -> None:
    """Chats and completions may be short where the parent was trained on the whole context, and only there."""
    scaling = {"rope_scaling": {"factor": 4, "original_context": 64}, "data": TUNE["data"] | {"max_length": 256}}
    with pytest.raises(
        SpecError, match=r"half of the rows have .* of 256 .* are hardly trained; set batch.order: packed"
    ):
        prepare(recipe(tmp_path, TUNE | scaling), settings)


def test_an_adapter_that_began_with_a_part_of_the_base_goes_on_as_lora(settings: Settings, tmp_path: Path) -> None:
    pissa = {"method": "lora", "rank": 4, "alpha": 8, "init": "pissa"}
    first = recipe(tmp_path, TUNE | {"name": "parted", "adapter": pissa, "init_adapter": None, "max_steps": 2})
    published(first, settings, tmp_path)
    assert Catalog(settings.catalog).adapters.version("parted", 1).manifest.rank == 8
    for adapter in (pissa, {"method": "lora", "rank": 8, "alpha": 16}):
        again = recipe(tmp_path, TUNE | {"name": "again", "adapter": adapter, "init_adapter": "parted"})
        spec = prepare(again, settings).spec.adapter
        assert spec == LoraSpec(rank=8, alpha=16)
    evaluations = published(again, settings, tmp_path)["evaluations"]
    losses = {e["subject"]: e["value"] for e in evaluations}
    assert losses["adapter"] < losses["parent"]
