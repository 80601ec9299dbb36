"""Steps and parameters that are not finite: skipped, counted, and never published."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.errors import TrainingError
from loray.train import checkpoint, loop
from loray.train import objectives as loss_module
from loray.train.checkpoint import FolderReporter
from loray.train.loop import HeldOut, train
from loray.train.objectives import Loss, batch_loss
from tests.train.test_loop import EXPLODING, TINY, make_data, masters, recipe, run


def poison(monkeypatch: pytest.MonkeyPatch, bad_calls: Callable[[int], bool]) -> None:
    """Losses of those training micro-batches become nan."""
    calls = iter(range(1 << 20))

    def poisoned(model: Any, batch: Any) -> Loss:
        loss = batch_loss(model, batch)
        return loss._replace(total=loss.total * math.nan) if model.training and bad_calls(next(calls)) else loss

    monkeypatch.setattr(loss_module, "batch_loss", poisoned)


def test_bad_steps_are_skipped_and_counted(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda call: call in (3, 8))  # steps 2 and 5, two micro-batches each
    state, reporter = run(recipe(), tiny_base(**TINY), tmp_path)
    assert state.skipped_steps == 2
    assert [e["skipped_steps"] for e in reporter.events if e["event"] == "step"] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert all(bool(tensor.isfinite().all()) for tensor in masters(reporter).values())
    assert state.eval_loss is not None


def test_the_limit_stops_the_run_with_the_last_good_state_kept(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(**TINY)
    spec = recipe(max_nonfinite_steps=2)
    _, unbroken = run(spec.model_copy(update={"max_steps": 3}), base, tmp_path, name="unbroken")
    poison(monkeypatch, lambda call: call >= 6)  # from step 4 on
    reporter = FolderReporter(tmp_path / "stopped", keep=9)
    with pytest.raises(TrainingError, match="stopped at step 5: 2 steps had a loss or gradient that is not finite"):
        train(spec, base, make_data(tmp_path, spec), reporter=reporter, workdir=tmp_path)
    assert [c.step for c in reporter.checkpoints] == [5]
    assert len(masters(reporter)) == 16
    read_adapter(reporter.best.path / checkpoint.ADAPTER, base.config)
    assert all(bool(tensor.isfinite().all()) for tensor in masters(reporter).values())
    assert len(unbroken.checkpoints) == 1

    monkeypatch.setattr(loss_module, "batch_loss", batch_loss)
    state, _ = run(spec, base, tmp_path, resume_from=reporter.best.path, name="resumed")
    assert (state.step, state.skipped_steps) == (8, 2)


def test_a_run_that_never_took_a_good_step_leaves_nothing(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda call: True)
    spec = recipe(max_nonfinite_steps=3)
    reporter = FolderReporter(tmp_path / "run")
    with pytest.raises(TrainingError, match="stopped at step 3"):
        train(spec, tiny_base(**TINY), make_data(tmp_path, spec), reporter=reporter, workdir=tmp_path)
    assert reporter.checkpoints == []


@pytest.mark.parametrize("fraction", [0.2, 0.0])
def test_an_update_that_breaks_the_parameters_is_not_kept(
    fraction: float, tiny_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    data = {"train": "data.jsonl", "eval_fraction": fraction, "max_length": 64}
    spec = recipe(optimizer=EXPLODING, max_nonfinite_steps=2, data=data)
    reporter = FolderReporter(tmp_path / "run")
    with pytest.raises(TrainingError, match=r"stopped at step \d: 2 steps had"):
        train(spec, tiny_base(**TINY), make_data(tmp_path, spec), reporter=reporter, workdir=tmp_path)
    assert reporter.checkpoints == []


def test_a_run_that_ends_broken_has_no_result_unless_the_best_is_kept(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(**TINY)
    losses = iter([5.0, 4.0, math.nan] * 2)  # the baseline, step 2, step 4
    monkeypatch.setattr(loop, "held_out_loss", lambda *_, **__: HeldOut(next(losses), {}))
    every_2 = {"interval_steps": 2}
    state, reporter = run(recipe(max_steps=4, evaluation=every_2), base, tmp_path)
    assert (state.step, state.eval_loss) == (4, None)
    assert [(c.step, c.eval_loss) for c in reporter.checkpoints] == [(2, 4.0)]
    with pytest.raises(TrainingError, match="held-out loss after the last step is not finite"):
        run(recipe(max_steps=4, evaluation=every_2 | {"keep_best": False}), base, tmp_path, name="latest")


def test_a_run_of_skipped_steps_alone_has_no_result(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda call: True)
    with pytest.raises(TrainingError, match="every step had a loss or gradient that is not finite"):
        run(recipe(max_steps=3), tiny_base(**TINY), tmp_path)


def test_a_base_that_is_broken_itself_is_not_trained(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "held_out_loss", lambda *_, **__: HeldOut(math.inf, {}))
    with pytest.raises(TrainingError, match="held-out loss of base is inf before any training"):
        run(recipe(), tiny_base(**TINY), tmp_path)
