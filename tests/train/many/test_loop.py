"""The loop of a cohort: every adapter learns what it learns alone, ends by itself, and goes on where it was."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.errors import IntegrityError, SpecError
from loray.methods.attach import InitialAdapter
from loray.spec import ParallelSpec, TrainSpec
from loray.train import checkpoint
from loray.train.checkpoint import ADAPTER, FolderReporter, Metrics
from loray.train.many import loop
from loray.train.many.loop import Ended, train_many
from loray.train.many.state import CohortState, read_cohort
from loray.train.sequence import SequenceGroup
from tests.fixtures.ranks import Ranks
from tests.fixtures.training import curve, make_data, recipe, run

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of each its adapter, and how it differs from the others in data, batches and length.
RECIPES: dict[str, dict[str, Any]] = {
    "wide": {"adapter": {"method": "lora", "rank": 8, "target_modules": ALL}, "seed": 1},
    "thin": {
        "adapter": {"method": "lora", "rank": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        "batch": {"rows": 1, "accumulation": 3},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "loraplus_lr_ratio": 4},
        "max_steps": 13,
    },
    "vera": {
        "adapter": {"method": "vera", "rank": 16},
        "optimizer": {"learning_rate": 5e-2, "vera_d_lr_ratio": 0.5, "max_grad_norm": 0.1},
        "seed": 3,
    },
    "dora": {"adapter": {"method": "dora", "rank": 4}, "batch": {"rows": 3}, "optimizer": {"learning_rate": 2e-3}},
    "packed": {
        "adapter": {"method": "lora", "rank": 3, "target_modules": ["q_proj", "v_proj"]},
        "batch": {"rows": 2, "order": "packed"},
    },
    "one": {"adapter": {"method": "vera", "rank": 8, "target_modules": ["v_proj"]}, "batch": {"tokens": 100}},
}


def specs_of(*names: str, **fields: Any) -> list[TrainSpec]:
    common: dict[str, Any] = {"max_steps": 20, "evaluation": {"interval_steps": 6}} | fields
    return [recipe(**(common | RECIPES[name] | {"name": name})) for name in names]


class Cohort:
    """One call of the loop, and what it has reported."""

    def __init__(self, specs: list[TrainSpec], base: BaseModel, folder: Path, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.specs, self.base, self.folder = specs, base, folder
        self.reporters = {spec.name: FolderReporter(folder / spec.name, keep=9) for spec in specs}
        self.reporter: FolderReporter = options.pop("reporter", None) or FolderReporter(folder / "cohort", keep=9)
        self._options = {"tokens_per_pass": 512, "workdir": folder} | options

    def train(self) -> dict[str, Ended]:
        datas = {spec.name: make_data(self.folder, spec) for spec in self.specs}
        return train_many(
            self.specs, self.base, datas, reporters=self.reporters, reporter=self.reporter, **self._options
        )

    def curve(self, name: str) -> list[tuple[float, ...]]:
        return curve(self.reporters[name])

    def events(self, name: str, kind: str) -> list[Metrics]:
        return [event for event in self.reporters[name].events if event["event"] == kind]


def assert_close(ours: FolderReporter, theirs: FolderReporter, *, since: int = 0) -> None:
    """The same steps at equal rates; losses, norms and held-out losses as far as fp32 has them."""
    mine, single = curve(ours), [point for point in curve(theirs) if point[0] > since]
    assert [(step, lr) for step, _, lr, _ in mine] == [(step, lr) for step, _, lr, _ in single]
    for (step, loss, _, norm), (_, expected, _, expected_norm) in zip(mine, single, strict=True):
        assert loss == pytest.approx(expected, abs=1e-4), step
        assert norm == pytest.approx(expected_norm, rel=2e-3), step
    measured, expected_evals = (
        [(e["step"], e["subject"], e["eval_loss"]) for e in r.events if e["event"] == "eval" and e["step"] >= since]
        for r in (ours, theirs)
    )
    if since:
        expected_evals = [each for each in expected_evals if each[0] > since]
    assert [each[:2] for each in measured] == [each[:2] for each in expected_evals]
    for (*_, loss), (*_, expected) in zip(measured, expected_evals, strict=True):
        assert loss == pytest.approx(expected, abs=1e-3)


def test_every_adapter_of_a_cohort_learns_what_it_learns_alone(base: BaseModel, tmp_path: Path) -> None:
    cohort = Cohort(specs_of(*RECIPES), base, tmp_path / "many")
    ended = cohort.train()
    assert list(ended) == ["thin", "wide", "vera", "dora", "packed", "one"]
    for spec in cohort.specs:
        state, alone = run(spec, base, tmp_path, name=spec.name)
        ours = cohort.reporters[spec.name]
        assert_close(ours, alone)
        last = ended[spec.name]
        assert (last.status, last.message) == ("succeeded", None)
        counters = ("step", "epoch", "index", "num_tokens", "skipped_steps", "num_stale")
        assert all(getattr(last.state, field) == getattr(state, field) for field in counters)
        assert_same_fields(ours.events, alone.events)
        (published,) = ours.checkpoints
        assert published.step == alone.best.step
        assert published.eval_loss == pytest.approx(alone.best.eval_loss, abs=1e-3)
        saved = checkpoint.read_state(published.path)
        assert [e.value for e in saved.evaluations()] == pytest.approx(
            [e.value for e in checkpoint.read_state(alone.best.path).evaluations()], abs=1e-3
        )
        mine, theirs = (read_adapter(c.path / ADAPTER, base.config) for c in (published, alone.best))
        assert mine.modules.keys() == theirs.modules.keys()
    rounds = [e for e in cohort.reporter.events if e["event"] == "round"]
    assert [e["num_active"] for e in rounds] == [6] * 13 + [5] * 7
    assert all(2 <= e["num_passes"] < 8 for e in rounds)  # of packed rows, and of others


def assert_same_fields(ours: list[Metrics], theirs: list[Metrics]) -> None:
    """Events of each kind have the fields that those of a run alone have."""
    for kind in ("start", "step", "eval", "checkpoint"):
        (mine, single) = (next(e for e in events if e["event"] == kind) for events in (ours, theirs))
        assert mine.keys() == single.keys()
    mine, single = ours[0], theirs[0]
    same = ("num_parameters", "num_trainable", "trainable_share", "data", "num_steps", "dtype", "device")
    assert all(mine[field] == single[field] for field in same)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"factor": 2, "original_context": 32}, "attention": {"type": "s2", "group_size": 16}},
        {"gradient_checkpointing": True},
    ],
)
def test_scaled_rope_s2_attention_and_checkpointing_are_those_of_a_run_alone(
    fields: dict[str, Any], base: BaseModel, tmp_path: Path
) -> None:
    cohort = Cohort(specs_of("wide", "vera", "packed", max_steps=3, **fields), base, tmp_path / "many")
    cohort.train()
    for spec in cohort.specs:
        _, alone = run(spec, base, tmp_path, name=spec.name)
        assert_close(cohort.reporters[spec.name], alone)


def test_in_bfloat16_losses_stay_near_those_of_a_run_alone(base: BaseModel, tmp_path: Path) -> None:
    cohort = Cohort(specs_of("wide", "vera", max_steps=4, dtype="bfloat16"), base, tmp_path / "many")
    cohort.train()
    for spec in cohort.specs:
        _, alone = run(spec, base, tmp_path, name=spec.name)
        for (_, ours, *_), (_, theirs, *_) in zip(cohort.curve(spec.name), curve(alone), strict=True):
            assert ours == pytest.approx(theirs, abs=0.02)


# -- one adapter's end is its own


def broken(**fields: Any) -> TrainSpec:
    """An update breaks its parameters."""
    (spec,) = specs_of("wide", max_steps=8, optimizer={"learning_rate": 1e36, "schedule": "constant"}, **fields)
    return spec.model_copy(update={"name": "broken"})


def test_an_adapter_that_breaks_changes_no_bit_of_the_others(base: BaseModel, tmp_path: Path) -> None:
    """As long as it goes on, for then passes have the same shapes."""
    curves = []
    for folder, rate in (("well", 1e-2), ("bad", 1e36)):
        odd = broken(max_nonfinite_steps=9)
        odd = odd.model_copy(update={"optimizer": odd.optimizer.model_copy(update={"learning_rate": rate})})
        cohort = Cohort([*specs_of("wide", "vera", max_steps=8), odd], base, tmp_path / folder)
        ended = cohort.train()
        curves.append([cohort.curve("wide"), cohort.curve("vera")])
    assert curves[0] == curves[1]
    assert all(math.isfinite(loss) for points in curves[0] for _, loss, *_ in points)
    failed = ended["broken"]
    assert failed.status == "failed"
    assert failed.message == "the held-out loss after the last step is not finite; lower the learning rate"
    assert failed.state.skipped_steps == 7
    assert cohort.reporters["broken"].checkpoints == []


def test_an_adapter_that_skips_too_many_steps_fails_by_itself(base: BaseModel, tmp_path: Path) -> None:
    cohort = Cohort([*specs_of("thin", max_steps=8), broken(max_nonfinite_steps=2)], base, tmp_path / "many")
    ended = cohort.train()
    assert (ended["broken"].status, ended["thin"].status) == ("failed", "succeeded")
    message = ended["broken"].message or ""
    assert message.startswith("stopped at step 3: 2 steps had a loss or gradient that is not finite")
    assert [e["skipped_steps"] for e in cohort.events("broken", "step")] == [0, 1, 2]
    (end,) = cohort.events("broken", "end")
    assert end == {"event": "end", "step": 3, "status": "failed", "message": message}
    assert len(cohort.curve("thin")) == 13


def test_a_loss_that_is_not_finite_skips_that_adapter_whatever_its_gradients(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop._Cohort._pass

    def poisoned(self: Any, each: Any, *, learn: bool) -> dict[str, float]:
        losses = whole(self, each, learn=learn)
        return losses | ({"vera": math.inf} if learn and self.round == 3 and "vera" in losses else {})

    monkeypatch.setattr(loop._Cohort, "_pass", poisoned)
    cohort = Cohort(specs_of("wide", "vera", max_steps=5), base, tmp_path / "many")
    ended = cohort.train()
    assert [e["skipped_steps"] for e in cohort.events("vera", "step")] == [0, 0, 1, 1, 1]
    assert (ended["vera"].status, ended["vera"].state.skipped_steps) == ("succeeded", 1)
    assert ended["wide"].state.skipped_steps == 0


def test_a_base_that_is_broken_for_one_adapters_rows_fails_it_before_its_first_step(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = loop._Cohort._held_out_losses

    def poisoned(self: Any, runs: Any) -> Any:
        return [(run, math.nan if run.name == "vera" else loss) for run, loss in measured(self, runs)]

    monkeypatch.setattr(loop._Cohort, "_held_out_losses", poisoned)
    ended = Cohort(specs_of("wide", "vera", max_steps=2), base, tmp_path / "many").train()
    assert (ended["vera"].status, ended["wide"].status) == ("failed", "succeeded")
    assert "the held-out loss of base is nan before any training" in (ended["vera"].message or "")


def test_one_adapter_ends_early_and_the_others_go_on(base: BaseModel, tmp_path: Path) -> None:
    early: dict[str, Any] = {"early_stopping": {"patience": 2, "min_delta": 100.0}, "evaluation": {"interval_steps": 1}}
    specs = [*specs_of("wide", max_steps=6, **early), *specs_of("vera", max_steps=6)]
    cohort = Cohort(specs, base, tmp_path / "many")
    ended = cohort.train()
    assert {name: last.state.step for name, last in ended.items()} == {"wide": 3, "vera": 6}
    (stop,) = cohort.events("wide", "early_stop")
    assert (stop["step"], stop["num_steps"], stop["num_stale"]) == (3, 6, 2)
    assert [e["event"] for e in cohort.reporters["wide"].events][-3:] == ["early_stop", "checkpoint", "end"]
    _, alone = run(specs[0], base, tmp_path, name="alone")
    assert_close(cohort.reporters["wide"], alone)


def worsen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses rise by 1 with every step, beside what they are."""
    measured = loop._Cohort._held_out_losses

    def worse(self: Any, runs: Any) -> Any:
        return [(run, loss + run.state.step) for run, loss in measured(self, runs)]

    monkeypatch.setattr(loop._Cohort, "_held_out_losses", worse)


def test_the_best_weights_are_published_and_the_last_ones_where_the_recipe_says_so(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (best,) = specs_of("wide", max_steps=6, evaluation={"interval_steps": 2})
    as_last = best.evaluation.model_copy(update={"keep_best": False})
    last = best.model_copy(update={"name": "last", "evaluation": as_last})
    cohort = Cohort([best, last], base, tmp_path / "many")
    with monkeypatch.context() as patched:
        worsen(patched)
        cohort.train()
    (kept,), (latest,) = cohort.reporters["wide"].checkpoints, cohort.reporters["last"].checkpoints
    assert (kept.step, latest.step) == (2, 6)
    assert not (kept.path / "optimizer.pt").exists()
    assert (latest.path / "optimizer.pt").exists()
    for spec, found in ((best, kept), (last, latest)):
        initial = InitialAdapter("0" * 64, found.path / ADAPTER)
        again = spec.model_copy(update={"init_adapter": "first@1", "max_steps": 1})
        ended = Cohort([again], base, tmp_path / f"again-{spec.name}", initials={spec.name: initial}).train()
        (parent,) = ended[spec.name].state.baselines
        assert parent.subject == "parent"
        assert found.eval_loss is not None
        assert parent.value == pytest.approx(found.eval_loss - found.step, rel=1e-4)


def test_an_adapter_is_stopped_and_leaves_what_it_goes_on_from(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = specs_of("wide", "vera", max_steps=6, evaluation={"interval_steps": 2})

    def stopped() -> list[str]:
        return ["wide", "unknown"] if len(cohort.curve("wide")) == 2 else []

    cohort = Cohort(specs, base, tmp_path / "many", stopped=stopped)
    ended = cohort.train()
    assert (ended["wide"].status, ended["wide"].state.step) == ("stopped", 2)
    assert len(cohort.curve("vera")) == 6
    (left,) = cohort.reporters["wide"].checkpoints
    again = Cohort(specs[:1], base, tmp_path / "again", checkpoints={"wide": left.path})
    assert again.train()["wide"].state.step == 6
    _, alone = run(specs[0], base, tmp_path, name="alone")
    assert_close(again.reporters["wide"], alone, since=2)
    state, _ = run(specs[0], base, tmp_path, name="resumed alone", resume_from=left.path)
    assert state.step == 6
    worsen(monkeypatch)  # what it had left stays the best
    worse = Cohort(specs[:1], base, tmp_path / "worse", checkpoints={"wide": left.path})
    worse.train()
    assert [c.step for c in worse.reporters["wide"].checkpoints] == [2]


# -- snapshots


class Interrupted(FolderReporter):
    """Ends the process, as far as the loop can tell, when a round is reported."""

    def __init__(self, folder: Path, round: int) -> None:
        super().__init__(folder, keep=9)
        self._round = round

    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        if metrics["event"] == "round" and metrics["round"] == self._round:
            raise KeyboardInterrupt
        super().report(metrics, checkpoint)


def test_a_cohort_that_was_interrupted_goes_on_from_its_last_snapshot(base: BaseModel, tmp_path: Path) -> None:
    specs = specs_of("wide", "vera", "dora", max_steps=12, checkpoint={"interval_steps": 3})
    specs += specs_of("packed", max_steps=4)
    specs[0] = specs[0].model_copy(update={"evaluation": specs[0].evaluation.model_copy(update={"interval_steps": 2})})
    unbroken = Cohort(specs, base, tmp_path / "unbroken")
    whole = unbroken.train()
    assert [c.step for c in unbroken.reporter.checkpoints] == [3, 6, 9]

    broken = Cohort(specs, base, tmp_path / "broken", reporter=Interrupted(tmp_path / "snapshots", 7))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert len(broken.curve("vera")) == 7
    snapshot = broken.reporter.checkpoints[-1].path
    saved = read_cohort(snapshot)
    assert saved.round == 6
    assert {name: adapter.state.step for name, adapter in saved.adapters.items()} == {"wide": 6, "vera": 6, "dora": 6}

    resumed = Cohort(specs[:3], base, tmp_path / "resumed", resume_from=snapshot)
    ended = resumed.train()
    for name in ("wide", "vera", "dora"):
        assert_close(resumed.reporters[name], unbroken.reporters[name], since=6)
        ours, theirs = ended[name].state, whole[name].state
        assert (ours.epoch, ours.index, ours.num_tokens) == (theirs.epoch, theirs.index, theirs.num_tokens)
        assert ours.best_eval_loss == pytest.approx(theirs.best_eval_loss, abs=1e-3)
        (mine,), (single,) = resumed.reporters[name].checkpoints, unbroken.reporters[name].checkpoints
        assert mine.step == single.step
    assert [e["round"] for e in resumed.reporter.events if e["event"] == "round"] == list(range(7, 13))

    another = specs[1].model_copy(update={"seed": 9})
    with pytest.raises(SpecError, match="cannot resume from step 6: seed changed since"):
        Cohort([another], base, tmp_path / "other", resume_from=snapshot).train()
    (snapshot / CohortState.FILE).write_text("{")
    with pytest.raises(IntegrityError, match="is not a complete snapshot"):
        Cohort(specs, base, tmp_path / "damaged", resume_from=snapshot).train()


class Killed(FolderReporter):
    """Kills its process when the 7th round is reported."""

    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        if metrics["event"] == "round" and metrics["round"] == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        super().report(metrics, checkpoint)


def be_killed(specs: list[TrainSpec], base: BaseModel, folder: Path) -> None:
    Cohort(specs, base, folder, reporter=Killed(folder / "snapshots", keep=9)).train()


@pytest.mark.slow
def test_a_killed_cohort_goes_on_with_the_losses_of_an_unbroken_one(base: BaseModel, tmp_path: Path) -> None:
    specs = specs_of("wide", "vera", "packed", max_steps=12, checkpoint={"interval_steps": 3})
    specs += specs_of("thin", checkpoint={"interval_steps": None})
    unbroken = Cohort(specs, base, tmp_path / "unbroken")
    whole = unbroken.train()
    process = multiprocessing.get_context("spawn").Process(target=be_killed, args=(specs, base, tmp_path / "killed"))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    snapshots = sorted((tmp_path / "killed" / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["step_000003", "step_000006"]
    resumed = Cohort(specs, base, tmp_path / "resumed", resume_from=snapshots[-1])
    ended = resumed.train()
    for spec in specs:
        assert_close(resumed.reporters[spec.name], unbroken.reporters[spec.name], since=6)
        ours, theirs = ended[spec.name].state, whole[spec.name].state
        assert (ours.epoch, ours.index) == (theirs.epoch, theirs.index)


def test_the_best_weights_so_far_are_in_a_snapshot(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worsen(monkeypatch)
    every: dict[str, Any] = {"evaluation": {"interval_steps": 2}, "checkpoint": {"interval_steps": 5}}
    (spec,) = specs_of("wide", max_steps=6, **every)
    unbroken = Cohort([spec], base, tmp_path / "unbroken")
    unbroken.train()
    (kept,), (snapshot,) = unbroken.reporters["wide"].checkpoints, unbroken.reporter.checkpoints
    assert (kept.step, snapshot.step) == (2, 5)
    resumed = Cohort([spec], base, tmp_path / "resumed", resume_from=snapshot.path)
    resumed.train()
    (again,) = resumed.reporters["wide"].checkpoints
    assert (again.step, again.eval_loss) == (kept.step, kept.eval_loss)
    for ours, theirs in zip(*(tensors(c.path, base) for c in (again, kept)), strict=True):
        assert torch.equal(ours, theirs)


def tensors(folder: Path, base: BaseModel) -> list[torch.Tensor]:
    modules = read_adapter(folder / ADAPTER, base.config).modules
    return [tensor for module in modules.values() for tensor in module.parts.values()]


def test_a_snapshot_is_due_by_the_least_of_the_minutes(base: BaseModel, tmp_path: Path) -> None:
    clock = [0.0]

    class Ticks(FolderReporter):
        def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
            clock[0] += 60.0 * (metrics["event"] == "round")
            super().report(metrics, checkpoint)

    specs = specs_of("wide", max_steps=9, checkpoint={"interval_minutes": 4})
    specs += specs_of("vera", max_steps=9, checkpoint={"interval_minutes": None})
    reporter = Ticks(tmp_path / "ticks", keep=9)
    Cohort(specs, base, tmp_path / "many", reporter=reporter, clock=lambda: clock[0]).train()
    assert [c.step for c in reporter.checkpoints] == [5]


def test_an_adapter_goes_with_the_files_that_its_recipe_names(base: BaseModel, tmp_path: Path) -> None:
    (spec,) = specs_of("wide")
    spec = spec.model_copy(update={"init_adapter": "first@1"})
    with pytest.raises(SpecError, match="wide: init_adapter is first@1: the files of an adapter go with it"):
        Cohort([spec], base, tmp_path / "many").train()


# -- sequence groups


def shared(group: SequenceGroup, specs: list[TrainSpec], base: BaseModel, folder: Path) -> Any:
    """Train on one of the ranks. Returns curves, evaluations and the checkpoints of this rank."""
    cohort = Cohort(specs, base, folder / str(group.rank), group=group)
    ended = cohort.train()
    curves = {spec.name: cohort.curve(spec.name) for spec in specs}
    losses = {spec.name: [e["eval_loss"] for e in cohort.events(spec.name, "eval")] for spec in specs}
    checkpoints = {name: [c.path for c in reporter.checkpoints] for name, reporter in cohort.reporters.items()}
    return curves, losses, checkpoints, [(name, last.status, last.state.step) for name, last in ended.items()]


@pytest.mark.parametrize("attention", [{"type": "dense"}, {"type": "s2", "group_size": 16}])
def test_two_ranks_that_share_rows_train_what_one_does(
    attention: dict[str, Any], base: BaseModel, tmp_path: Path, ranks: Ranks
) -> None:
    specs = specs_of("wide", "vera", max_steps=4, attention=attention, checkpoint={"interval_steps": 3})
    whole = Cohort(specs, base, tmp_path / "one")
    whole.train()
    halves = [spec.model_copy(update={"parallel": ParallelSpec(sequence=2), "num_workers": 2}) for spec in specs]
    first, second = ranks(2, shared, halves, base, tmp_path)
    curves, losses, checkpoints, ended = first
    assert (second[0], second[1], second[3]) == (curves, losses, ended)
    assert ended == [("wide", "succeeded", 4), ("vera", "succeeded", 4)]
    assert all(paths == [] for paths in second[2].values())
    for spec in specs:
        for ours, theirs in zip(curves[spec.name], whole.curve(spec.name), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4, rel=2e-3)
        expected = [e["eval_loss"] for e in whole.events(spec.name, "eval")]
        assert losses[spec.name] == pytest.approx(expected, abs=1e-3)
        (path,) = checkpoints[spec.name]
        assert len(read_adapter(path / ADAPTER, base.config).modules) > 0
