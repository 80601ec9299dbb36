"""Checkpoints by steps and by the clock, written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.errors import TrainingError
from loray.spec import CheckpointSpec, TrainSpec
from loray.train import checkpoint
from loray.train.checkpoint import Checkpoints, FolderReporter, Metrics, Snapshot
from loray.train.loop import train
from tests.train.test_loop import TINY, curve, make_data, masters, recipe

CPU = torch.device("cpu")
STEP_S = 400.0


class Timed(FolderReporter):
    """A step takes 400 s of a clock of its own."""

    now = 0.0

    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        if metrics["event"] == "step":
            self.now += STEP_S
        super().report(metrics, checkpoint)


def run(spec: TrainSpec, base: BaseModel, folder: Path, name: str, *, resume_from: Path | None = None) -> Timed:
    reporter = Timed(folder / name, keep=99)
    data = make_data(folder, spec)
    train(
        spec,
        base,
        data,
        reporter=reporter,
        workdir=folder,
        resume_from=resume_from,
        clock=lambda: reporter.now,
    )
    return reporter


@pytest.mark.parametrize(
    ("checkpoints", "steps"),
    [
        ({}, [4, 8, 12]),  # at 1,200 s, and again 1,200 s after that step's end
        ({"interval_minutes": 5}, [2, 4, 6, 8, 10, 12]),
        ({"interval_steps": 3}, [3, 6, 9, 12]),
        ({"interval_steps": 5}, [4, 5, 9, 10, 12]),
        ({"interval_minutes": None}, [12]),
    ],
)
def test_checkpoints_are_due_by_steps_or_minutes(
    checkpoints: dict[str, Any], steps: list[int], base: BaseModel, tmp_path: Path
) -> None:
    spec = recipe(max_steps=12, batch={"rows": 1}, checkpoint=checkpoints)
    assert [c.step for c in run(spec, base, tmp_path, "run").checkpoints] == steps


def test_a_run_resumed_from_a_timed_checkpoint_is_the_unbroken_one(
    base: BaseModel, tmp_path: Path
) -> None:
    spec = recipe(max_steps=6)
    unbroken = run(spec, base, tmp_path, "unbroken")
    resumed = run(spec, base, tmp_path, "resumed", resume_from=unbroken.checkpoints[0].path)
    assert unbroken.checkpoints[0].step == 4
    assert curve(resumed) == curve(unbroken)[4:]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["resumed", "unbroken"]  # nothing is left over


def test_steps_go_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = recipe(max_steps=4, checkpoint={"interval_steps": 2})
    plain = run(spec, base, tmp_path, "plain")
    gate, written, write = Event(), list[int](), checkpoint.write

    def slow(folder: Path, snapshot: Snapshot) -> None:
        assert gate.wait(60)
        written.append(snapshot.state.step)
        write(folder, snapshot)

    class Opens(FolderReporter):
        def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
            if metrics["event"] == "step" and metrics["step"] == 4:
                assert written == []
                gate.set()
            super().report(metrics, checkpoint)

    monkeypatch.setattr(checkpoint, "write", slow)
    reporter = Opens(tmp_path / "slow", keep=9)
    train(spec, base, make_data(tmp_path, spec), reporter=reporter, workdir=tmp_path)
    told = [(e["event"], e["step"]) for e in reporter.events if e["event"] in ("step", "checkpoint")]
    assert told == [*(("step", n) for n in (1, 2, 3, 4)), ("checkpoint", 2), ("checkpoint", 4)]
    assert written == [2, 4]
    for ours, theirs in zip(reporter.checkpoints, plain.checkpoints, strict=True):
        mine, expected = (checkpoint.read_optimizer(c.path) for c in (ours, theirs))
        for a, b in zip(mine[:3], expected[:3], strict=True):
            assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert masters(reporter).keys() == masters(plain).keys()


def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, snapshot: Snapshot) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    spec, workdir = recipe(max_steps=4, checkpoint={"interval_steps": 2}), tmp_path / "work"
    workdir.mkdir()
    reporter = FolderReporter(tmp_path / "run")
    with pytest.raises(
        TrainingError, match=r"checkpoint of step 2 could not be written to .*: No space left.*--resume"
    ):
        train(spec, base, make_data(tmp_path, spec), reporter=reporter, workdir=workdir)
    assert list(workdir.iterdir()) == []
    assert reporter.checkpoints == []


def test_the_other_ranks_hear_why(tmp_path: Path) -> None:
    """And report at the same step as rank 0, without a folder."""
    reported = list[tuple[int, Path | None]]()
    world: Any = SimpleNamespace(rank=1, size=2, gather=lambda value: ["disk full", value])
    reporter: Any = SimpleNamespace(report=lambda metrics, folder: reported.append((metrics["step"], folder)))
    checkpoints = Checkpoints(CheckpointSpec(), reporter, tmp_path, world, CPU, clock=lambda: 1e9)
    assert checkpoints.signals() == (0.0, 0.0)
    checkpoints.begin(None, step=3, eval_loss=None)
    checkpoints.take(0.0)
    assert reported == []
    checkpoints.take(1.0)
    assert reported == [(3, None)]
    checkpoints.begin(None, step=5, eval_loss=None)
    with pytest.raises(TrainingError, match=r"step 5 could not be written .*: disk full"):
        checkpoints.take(2.0)
    checkpoints.close()


def test_a_written_checkpoint_stays_where_the_run_fails_before_it_is_reported(
    base: BaseModel, tmp_path: Path
) -> None:
    class Fails(FolderReporter):
        def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
            if metrics["event"] == "step" and metrics["step"] == 2:
                raise RuntimeError("the other rank is gone")
            super().report(metrics, checkpoint)

    spec, workdir = recipe(max_steps=3, checkpoint={"interval_steps": 1}), tmp_path / "work"
    workdir.mkdir()
    reporter = Fails(tmp_path / "run")
    with pytest.raises(RuntimeError):
        train(spec, base, make_data(tmp_path, spec), reporter=reporter, workdir=workdir)
    kept = [c.path for c in reporter.checkpoints] or [workdir / f"{checkpoint.WRITTEN}000001"]
    assert [checkpoint.read_state(path).step for path in kept] == [1]
