"""Base and adapter measured before publishing: the manifest's evaluations, and the gate's decisions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.train.v2.api.exceptions import WorkerGroupError

from jobs.driver import evaluation
from jobs.driver.fit import build_measuring
from jobs.driver.prepare import prepare
from jobs.driver.publication import publish_best
from jobs.events import describe
from jobs.runs.folders import open_runs
from jobs.workers.measuring import Measurement, measure_here
from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.catalog.aliases import failures
from loray.errors import DataError, EvaluationError, SpecError
from loray.recipes.load import Recipe
from loray.settings import Settings
from tests.fixtures.tiny import write_checkpoint
from tests.jobs.driver.test_driver import trained
from tests.test_recipe import write


def long_recipe(folder: Path, *, documents: int = 2, length: int = 300, **fields: Any) -> Recipe:
    """A recipe on repeated alphabets, which an adapter learns in a few steps; `documents` of them are held out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in (("data.jsonl", 8), ("eval.jsonl", documents)):
        texts = ["".join(chr(97 + (i + t) % 26) for t in range(length)) for i in range(number)]
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ours: dict[str, Any] = {
        "name": "long",
        "adapter": {"method": "longlora", "rank": 4},
        "rope_scaling": {"type": "linear", "factor": 2, "original_context": 64},
        "data": {"train": "data.jsonl", "eval": "eval.jsonl", "max_length": 128},
        "evaluation": {"perplexity": {"stride": 32, "max_windows": 4}},
        "optimizer": {"learning_rate": 0.1, "schedule": "constant"},
        "max_steps": 6,
        "dtype": "float32",
        "publish": {"aliases": ["prod"]},
    }
    text = (folder / "data.jsonl").read_text()
    recipe = write(folder, **ours | fields)
    (folder / "data.jsonl").write_text(text)
    return recipe


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("home")
    add_base(str(write_checkpoint(folder / "checkpoint", std=0.05)), home=folder / "home", name="tiny")
    return Settings.from_env({"LORAY_HOME": str(folder / "home")})


def test_evaluations_are_in_the_manifest_and_grant_the_alias(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieval = [{"task": "passkey", "context_lengths": [400], "depths": [0.5], "samples": 1}]
    asked = {"perplexity": {"stride": 32, "max_windows": 4}, "retrieval": retrieval}
    recipe = long_recipe(tmp_path, name="good", evaluation=asked)
    run, made = trained(recipe, settings, tmp_path)
    events: list[dict[str, Any]] = []
    published = publish_best(made, run, recipe, settings, events.append)
    assert [describe(e) for e in events] == [
        "measuring perplexity and passkey retrieval of base and adapter before publishing"
    ]
    assert (published["label"], published["aliases"], published["refusal"]) == ("good@1", ["prod"], None)
    version = Catalog(settings.catalog).version("good", 1)
    assert version.aliases == ("prod",)
    assert version.manifest.original_context_length == 64
    found = {(e.subject, e.context_length): e for e in version.manifest.evaluations if e.metric == "perplexity"}
    assert list(found) == [(s, n) for s in ("base", "base_scaled", "adapter") for n in (64, 128)]
    assert {(e.stride, e.count, e.dataset) for e in found.values()} == {(32, 4, "eval.jsonl")}
    assert found["adapter", 128].value < min(found["base", 128].value, found["base_scaled", 128].value)
    assert failures(version.manifest, version.evaluations, 0.1) == ()
    keys = [e.metric for e in version.manifest.evaluations if e.depth is not None]
    assert keys == ["passkey_exact_match", "passkey_log_likelihood"] * 3
    *_, at_64, at_128 = describe(published).splitlines()
    assert at_128 == "perplexity at 128 tokens: " + ", ".join(
        f"{s.replace('_', ' ')} {found[s, 128].value:.4g}" for s in ("base", "base_scaled", "adapter")
    )
    assert at_64.startswith("perplexity at 64 tokens: base ")

    with monkeypatch.context() as patched:
        patched.setattr("loray.train.evaluation.measure.measure", lambda *_, **__: pytest.fail("measured again"))
        assert publish_best(made, run, recipe, settings)["digest"] == published["digest"]
    run.write("evaluations.json", b'{"asked": {')  # measured again, of windows that the machine has kept
    monkeypatch.setattr("loray.train.evaluation.measure.load", lambda *_, **__: pytest.fail("a window is not kept"))
    assert publish_best(made, run, recipe, settings)["digest"] == published["digest"]


def test_a_refused_alias_leaves_a_version_without_it(settings: Settings, tmp_path: Path) -> None:
    worse = {
        "learning_rate": 1e-9,
        "schedule": "constant",
    }  # learns nothing, so its perplexity is not below the base's under its RoPE
    recipe = long_recipe(tmp_path, name="bad", optimizer=worse, max_steps=1)
    run, made = trained(recipe, settings, tmp_path)
    published = publish_best(made, run, recipe, settings)
    assert (published["label"], published["aliases"]) == ("bad@1", [])
    assert "alias 'prod' is refused to bad@1: at its own context of 128 tokens" in published["refusal"]
    assert describe(published).endswith(published["refusal"])
    catalog = Catalog(settings.catalog)
    assert catalog.version("bad", 1).aliases == ()

    overridden = long_recipe(
        tmp_path, name="bad", optimizer=worse, max_steps=1, publish={"aliases": ["prod"], "no_gate": "a quick run"}
    )
    again = publish_best(made, run, overridden, settings)
    assert (again["aliases"], again["refusal"]) == (["prod"], None)
    assert [m.no_gate for m in catalog.adapter("bad").moves] == ["a quick run"]


def test_workers_with_too_little_memory_to_measure_leave_a_version_without_evaluations(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured later, on workers as the recipe then asks for."""
    recipe = long_recipe(tmp_path, name="large")
    run, made = trained(recipe, settings, tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr("loray.train.evaluation.measure.measure", fail)
        published = publish_best(made, run, recipe, settings)
    assert (published["label"], published["aliases"]) == ("large@1", [])
    assert published["unmeasured"].startswith(
        "not measured, out of memory: OutOfMemoryError: CUDA out of memory. Tried"
    )
    assert "`--publish-checkpoint` and a recipe whose workers share the base" in describe(published)
    assert "alias 'prod' is refused to large@1" in published["refusal"]
    assert {e.metric for e in Catalog(settings.catalog).version("large", 1).manifest.evaluations} == {"loss"}

    asked: list[Measurement] = []
    monkeypatch.setattr(evaluation, "measure_here", lambda wanted: asked.append(wanted) or measure_here(wanted))
    later = long_recipe(tmp_path, name="large", num_workers=4, parallel={"strategy": "fsdp2"})
    published = publish_best(made, run, later, settings)
    assert (published["label"], published["aliases"], published["unmeasured"]) == ("large@2", ["prod"], None)
    assert [(a.spec.num_workers, a.spec.parallel.strategy, a.spec.use_gpu) for a in asked] == [(4, "fsdp2", False)]
    manifest = Catalog(settings.catalog).version("large", 2).manifest
    assert manifest.recipe is not None
    assert manifest.recipe.num_workers == 1  # that which trained it


def test_measuring_takes_workers_as_the_run_does(settings: Settings, tmp_path: Path) -> None:
    fields = {"num_workers": 4, "min_workers": 2, "parallel": {"strategy": "fsdp2", "sequence": 2}}
    spec = long_recipe(tmp_path, **fields).spec
    run = open_runs(settings).new("long", "job")
    rest: Any = (None, None, None, "0" * 64, tmp_path, "INFO")
    trainer = build_measuring(Measurement(spec, spec.evaluation, *rest), run, settings)
    assert (trainer.scaling_config.num_workers, len(trainer.scaling_config.label_selector)) == ((2, 4), 4)
    assert (trainer.run_config.storage_path, trainer.run_config.name) == (run.path, "measuring")
    assert [type(callback).__name__ for callback in trainer.run_config.callbacks] == ["WholeGroups"]


def test_a_workers_error_is_the_drivers(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker that lost its peer and the peer, the peer's counts. A lost peer alone can be tried again."""
    recipe = long_recipe(tmp_path, name="broken")
    run, made = trained(recipe, settings, tmp_path)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    failures: dict[int, Exception] = {0: lost, 1: EvaluationError("the loss is nan")}

    def fail() -> None:
        raise WorkerGroupError("failed", failures)

    monkeypatch.setattr(evaluation.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation, "build_measuring", lambda *_: SimpleNamespace(fit=fail))
    with pytest.raises(EvaluationError, match=r"^the loss is nan$"):
        publish_best(made, run, recipe, settings)
    failures.pop(1)
    with pytest.raises(EvaluationError, match=r"measuring failed: RuntimeError: .* Connection closed by peer"):
        publish_best(made, run, recipe, settings)
    failures[1] = torch.OutOfMemoryError("CUDA out of memory")
    assert (publish_best(made, run, recipe, settings)["unmeasured"] or "").startswith("not measured, out of memory")


def test_an_alias_that_the_gate_could_not_grant_is_refused_before_training(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"granted by its perplexity: set evaluation\.perplexity, leave out"):
        prepare(long_recipe(tmp_path, evaluation={}), settings)
    with pytest.raises(SpecError, match=r"on the documents of data\.eval: give that file"):
        prepare(long_recipe(tmp_path, data={"train": "data.jsonl", "max_length": 128}), settings)
    with pytest.raises(DataError, match=r"no document of eval\.jsonl has 128 tokens, the longest has 101"):
        prepare(long_recipe(tmp_path, length=100), settings)
    retrieval = {"perplexity": {}, "retrieval": [{"context_lengths": [4096, 100]}]}
    with pytest.raises(SpecError, match="context length 100 is too short"):
        prepare(long_recipe(tmp_path, evaluation=retrieval), settings)
    for fields in ({"publish": {}}, {"publish": {"aliases": ["prod"], "no_gate": "a test"}}):
        assert prepare(long_recipe(tmp_path, evaluation={}, **fields), settings).spec.name == "long"


def test_the_given_recipe_decides_what_is_measured(settings: Settings, tmp_path: Path) -> None:
    """A run trained without measurements can be measured later, without training again."""
    run, made = trained(long_recipe(tmp_path, name="late", evaluation={}, publish={}), settings, tmp_path)
    later = long_recipe(
        tmp_path, name="late", max_steps=99, evaluation={"perplexity": {"context_lengths": [64, 128, 32]}}
    )
    published = publish_best(made, run, later, settings)
    assert published["aliases"] == ["prod"]
    manifest = Catalog(settings.catalog).version("late", 1).manifest
    assert manifest.recipe is not None
    assert (manifest.recipe.max_steps, manifest.recipe.publish.aliases) == (6, ("prod",))
    assert {e.context_length for e in manifest.evaluations if e.metric == "perplexity"} == {64, 128, 32}
