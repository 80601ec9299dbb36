"""What is published of a run: which checkpoint, with which recipe, measured, and under which alias."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.train.v2.api.exceptions import WorkerGroupError

from jobs import train as driver
from jobs.driver import evaluation
from jobs.driver.fit import build_measuring
from jobs.driver.prepare import as_begun, prepare
from jobs.driver.publication import already_published, best, publish_best
from jobs.events import Stages, decode, describe
from jobs.runs import folders
from jobs.runs.folders import RunFolder, open_runs, score
from jobs.workers.measuring import Measurement, measure_here, whole_progress
from loray.bases.registry import get_base
from loray.catalog import Catalog
from loray.catalog.aliases import failures
from loray.errors import BaseMismatch, DataError, EvaluationError, SpecError, StoreError
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.spec import BatchSpec
from loray.train import checkpoint
from loray.train.evaluation.documents import held_out_prompts
from tests.fixtures.recipes import write
from tests.fixtures.runs import long_recipe, trained


def test_checkpoints_without_an_evaluation_come_last() -> None:
    checkpoints = [(name, {"eval_loss": loss}) for name, loss in (("a", None), ("b", 2.0), ("c", 3.0))]
    made = SimpleNamespace(checkpoint="latest", best_checkpoints=checkpoints)
    assert best(made, by_loss=True) == "b"
    assert best(made, by_loss=False) == "latest"
    made.best_checkpoints = checkpoints[:1]
    assert best(made, by_loss=True) == "latest"
    scores = [score(metrics["eval_loss"]) for _, metrics in checkpoints]
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert min(scores) == 2.0


def test_a_run_without_held_out_data_publishes_its_end(tmp_path: Path, settings: Settings) -> None:
    recipe = write(tmp_path, dtype="float32", data={"train": "data.jsonl", "eval_fraction": 0})
    run, made = trained(recipe, settings, tmp_path)
    event = publish_best(made, run, recipe, settings)
    assert (event["label"], event["step"], event["evaluations"]) == ("arithmetic@1", 2, [])


def test_what_is_published_is_the_checkpoints_recipe(tmp_path: Path, settings: Settings) -> None:
    run, made = trained(write(tmp_path, dtype="float32", data={"train": "data.jsonl"}), settings, tmp_path)
    optimizer = {"learning_rate": 0.5}
    today = write(tmp_path, dtype="float32", base="other", optimizer=optimizer, publish={"licence": "CC0-1.0"})
    publish_best(made, run, today, settings)
    manifest = Catalog(settings.catalog).adapters.version("arithmetic", 1).manifest
    assert manifest.recipe is not None
    assert (manifest.recipe.base, manifest.recipe.optimizer.learning_rate) == ("tiny", 0.01)
    assert manifest.recipe.data.max_length == 512
    assert manifest.licence == "CC0-1.0"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
def test_what_qlora_trains_belongs_to_the_base_that_it_trained_on(tmp_path: Path, settings: Settings) -> None:
    recipe = write(tmp_path, dtype="float32", quantization={})
    run, made = trained(recipe, settings, tmp_path)
    publish_best(made, run, recipe, settings)
    form, catalog = get_base(settings.home, "tiny-nf4"), Catalog(settings.catalog)
    assert form.of == get_base(settings.home, "tiny").fingerprint
    manifest = catalog.adapters.version("arithmetic", 1).manifest
    assert (manifest.base, manifest.base_fingerprint) == (form.name, form.fingerprint)
    assert catalog.bases.forms() == {form.fingerprint: form.of}
    shutil.rmtree(form.path)  # another machine goes on from it
    further = write(tmp_path, dtype="float32", quantization={}, name="further", init_adapter="arithmetic")
    assert prepare(further, settings).spec.init_adapter == "arithmetic@1"
    plain = write(tmp_path, dtype="float32", name="further", init_adapter="arithmetic")
    with pytest.raises(BaseMismatch, match="was trained on another base than 'tiny'"):
        prepare(plain, settings)


Run = tuple[Recipe, RunFolder, Any]


@pytest.fixture
def ran(tmp_path: Path, settings: Settings) -> Run:
    recipe = write(tmp_path, dtype="float32")
    return recipe, *trained(recipe, settings, tmp_path)


def test_another_base_under_the_same_name_is_refused(settings: Settings, ran: Run) -> None:
    recipe, run, made = ran
    state = Path(run.path) / "step_000002" / checkpoint.RunState.FILE
    fingerprint = get_base(settings.home, "tiny").fingerprint
    state.write_text(state.read_text().replace(fingerprint, "0" * 64))
    with pytest.raises(BaseMismatch, match="another model on this machine"):
        publish_best(made, run, recipe, settings)


def test_a_publication_is_made_once_with_the_job_that_created_the_run(
    tmp_path: Path, settings: Settings, ran: Run
) -> None:
    recipe, run, made = ran
    assert already_published(run, recipe) is None
    first = publish_best(made, run, recipe, settings)
    resumed = open_runs(settings).latest(recipe.spec.name)
    assert publish_best(made, resumed, recipe, settings) == first == already_published(resumed, recipe)
    for number, path in enumerate(Path(run.path).rglob("*.safetensors")):
        os.utime(path, (number, number))  # a checkpoint that Ray downloads from a bucket has the time of the download
    assert publish_best(made, run, recipe, settings) == first
    assert list(Catalog(settings.catalog).adapters.get("arithmetic").versions) == [1]
    version = Catalog(settings.catalog).adapters.version("arithmetic", 1)
    assert version.manifest.job_id == "first"
    assert datetime.now(UTC) - datetime.fromisoformat(version.manifest.created_at) < timedelta(hours=1)
    assert already_published(resumed, write(tmp_path, dtype="float32", max_steps=9)) is None
    resumed.write("published.json", b'{"recipe"')
    assert already_published(resumed, recipe) is None
    assert publish_best(made, resumed, recipe, settings) == first


def test_after_a_store_error_the_checkpoint_can_be_published_later(
    settings: Settings, ran: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run, made = ran
    monkeypatch.setattr(RunFolder, "result", lambda run: made)
    with monkeypatch.context() as patch:

        def gone(url: str) -> None:
            raise StoreError("connection refused")

        patch.setattr("jobs.driver.publication.open_store", gone)
        with pytest.raises(StoreError, match=r"refused; training is complete: .*recipe\.yaml --publish-checkpoint"):
            driver._publish(made, run, recipe, settings, print)
    catalog, events = Catalog(settings.catalog), list[dict[str, Any]]()
    catalog.jobs.add("first", name=recipe.spec.name, recipe=recipe.spec)
    driver.publish_latest(recipe, settings, events.append)
    assert [e["label"] for e in events if e["event"] == "published"] == ["arithmetic@1"]
    assert (catalog.jobs.get("first").status, catalog.jobs.get("first").version) == ("succeeded", 1)


def test_evaluations_are_in_the_manifest_and_grant_the_alias(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrieval = [{"task": "passkey", "context_lengths": [400], "depths": [0.5], "samples": 1}]
    asked = {"perplexity": {"stride": 32, "max_windows": 4}, "retrieval": retrieval}
    recipe = long_recipe(tmp_path, name="good", evaluation=asked)
    run, made = trained(recipe, settings, tmp_path)
    events: list[dict[str, Any]] = []
    published = publish_best(made, run, recipe, settings, events.append)
    (measuring,) = (describe(event) for event in events if event["event"] != "progress")
    assert measuring == "measuring perplexity and passkey retrieval of base and adapter before publishing"
    assert (published["label"], published["aliases"], published["refusal"]) == ("good@1", ["prod"], None)
    version = Catalog(settings.catalog).adapters.version("good", 1)
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
    # It learns nothing, so its perplexity is not below the base's under its RoPE.
    worse: dict[str, Any] = {"optimizer": {"learning_rate": 1e-9, "schedule": "constant"}, "max_steps": 1}
    recipe = long_recipe(tmp_path, name="bad", **worse)
    run, made = trained(recipe, settings, tmp_path)
    published = publish_best(made, run, recipe, settings)
    assert (published["label"], published["aliases"]) == ("bad@1", [])
    assert "alias 'prod' is refused to bad@1: at its own context of 128 tokens" in published["refusal"]
    assert describe(published).endswith(published["refusal"])
    catalog = Catalog(settings.catalog)
    assert catalog.adapters.version("bad", 1).aliases == ()
    overridden = long_recipe(tmp_path, name="bad", **worse, publish={"aliases": ["prod"], "no_gate": "a quick run"})
    again = publish_best(made, run, overridden, settings)
    assert (again["aliases"], again["refusal"]) == (["prod"], None)
    assert [m.no_gate for m in catalog.aliases.moves("bad")] == ["a quick run"]


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
    assert published["unmeasured"].startswith("not measured, out of memory: OutOfMemoryError: CUDA out of memory.")
    assert "`--publish-checkpoint` and a recipe whose workers share the base" in describe(published)
    assert "alias 'prod' is refused to large@1" in published["refusal"]
    assert {e.metric for e in Catalog(settings.catalog).adapters.version("large", 1).manifest.evaluations} == {"loss"}

    asked: list[Measurement] = []
    monkeypatch.setattr(evaluation, "measure_here", lambda wanted, _: asked.append(wanted) or measure_here(wanted))
    later = long_recipe(tmp_path, name="large", num_workers=4, parallel={"strategy": "fsdp2"})
    published = publish_best(made, run, later, settings)
    assert (published["label"], published["aliases"], published["unmeasured"]) == ("large@2", ["prod"], None)
    assert [(a.spec.num_workers, a.spec.parallel.strategy, a.spec.use_gpu) for a in asked] == [(4, "fsdp2", False)]
    manifest = Catalog(settings.catalog).adapters.version("large", 2).manifest
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
    monkeypatch.setattr(evaluation, "start_sink", lambda path: None)
    monkeypatch.setattr(evaluation.ray, "kill", lambda sink: None)
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
    manifest = Catalog(settings.catalog).adapters.version("late", 1).manifest
    assert manifest.recipe is not None
    assert (manifest.recipe.max_steps, manifest.recipe.publish.aliases) == (6, ("prod",))
    assert {e.context_length for e in manifest.evaluations if e.metric == "perplexity"} == {64, 128, 32}


ASKED = ({"prompt": f"{'abcdefgh'[i % 8]} then", "completion": f" {'bcdefghi'[i % 8]}"} for i in range(40))


def test_held_out_prompts_are_answered_and_kept_in_the_runs_history(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing else to measure; and where they cannot be, the version is published all the same."""
    recipe = write(tmp_path, name="asked", dtype="float32")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    run, made = trained(recipe, settings, tmp_path)
    prompts = held_out_prompts(prepare(recipe, settings).data.evaluation, 1)
    assert len(prompts) == 3
    events: list[dict[str, Any]] = []
    published = publish_best(made, run, recipe, settings, events.append, prompts=prompts)
    stages = [e["stage"] for e in events if e["event"] == "progress"]
    assert stages == ["answering held-out prompts, base", "answering held-out prompts, adapter", "publishing"]
    (found,) = (e["samples"] for e in events if e["event"] == "samples")
    for sample in found:
        (letter,) = re.findall(r"\b(\w) then", sample["prompt"])
        assert sample["expected"] == letter.translate(NEXT)
    assert all({"base", "adapter"} < sample.keys() for sample in found)
    kept = [decode(line) for line in Path(run.path, "events.jsonl").read_text().splitlines()]
    assert kept == events

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("loray.train.evaluation.measure.load", fail)
    events.clear()
    assert publish_best(made, run, recipe, settings, events.append, prompts=prompts)["digest"] == published["digest"]
    (warning,) = (describe(e) for e in events if e["event"] == "warning")
    assert warning == "warning: no held-out prompt is answered: OutOfMemoryError: CUDA out of memory"


NEXT = str.maketrans("abcdefgh", "bcdefghi")


def test_a_measurement_tells_how_far_all_of_it_is() -> None:
    """The second stage has three times the tokens, half of them kept by an earlier measurement."""
    told: list[Any] = []
    times = [0.0]
    tell = whole_progress({"base": 100, "adapter": 300}, Stages(told.append, lambda: times[-1]), lambda: times[-1])
    for now, stage, share in ((0.0, "base", 0.0), (5.0, "base", 0.5), (10.0, "base", 1.0), (10.0, "adapter", 0.5)):
        times.append(now)
        tell(stage, share)
    assert [(e["stage"], e["done"], e["total"], e.get("eta_s")) for e in told] == [
        ("measuring base", 0.0, 1, None),
        ("measuring base", 0.125, 1, 35.0),
        ("measuring base", 0.25, 1, 30.0),
        ("measuring adapter", 0.625, 1, 15.0),
    ]


def test_the_tokens_of_a_measurement_are_known_before_the_run(settings: Settings, tmp_path: Path) -> None:
    """Two lengths with four windows each, and one prompt, of three models."""
    retrieval = [{"task": "passkey", "context_lengths": [400], "depths": [0.0, 0.5], "samples": 1}]
    asked = {"perplexity": {"stride": 32, "max_windows": 4}, "retrieval": retrieval}
    prepared = prepare(long_recipe(tmp_path, evaluation=asked), settings)
    assert prepared.measured_tokens == 3 * (4 * 64 + 4 * 128 + 2 * 400)
    assert prepare(long_recipe(tmp_path, evaluation={}, publish={}), settings).measured_tokens == 0


def test_a_run_that_goes_on_has_the_micro_batches_that_it_began_with(settings: Settings, tmp_path: Path) -> None:
    recipe = write(tmp_path, name="cut", dtype="float32", batch={"rows": 4, "accumulation": "auto"})
    run = open_runs(settings).new("cut", "job")
    assert as_begun(recipe, run) == recipe
    run.write_model(folders.BATCH, BatchSpec(rows=2, accumulation=2, order="shuffled"))
    gone_on = as_begun(recipe, run).spec
    assert (gone_on.batch.rows, gone_on.batch.accumulation, gone_on.batch.order) == (2, 2, None)
    given = write(tmp_path, name="cut", dtype="float32", batch={"rows": 1, "accumulation": 4})
    assert as_begun(given, run) == given
    other = write(tmp_path, name="cut", dtype="float32", batch={"rows": 6, "accumulation": "auto"})
    assert as_begun(other, run) == other  # which the run's checkpoints refuse
