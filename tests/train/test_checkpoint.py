"""Checkpoints: due by steps and by the clock, written while training goes on, resumed where they fit, published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from loray.adapters.peft_format import PREFIX, WEIGHTS_FILE
from loray.bases.checkpoint import stored_dtype
from loray.bases.registry import BaseModel
from loray.errors import IntegrityError, SpecError, TrainingError
from loray.methods import keeps_fp32
from loray.methods.attach import peft_name
from loray.spec import CheckpointSpec, TrainSpec
from loray.train import checkpoint
from loray.train.checkpoint import Checkpoints, FolderReporter, Metrics, Snapshot
from loray.train.model import build_model
from tests.fixtures.adapters import in_peft, logits
from tests.fixtures.training import METHODS, assert_equal, curve, make_data, recipe, run

CPU = torch.device("cpu")
STEP_S = 400.0


class Timed(FolderReporter):
    """A step takes 400 s of a clock of its own."""

    now = 0.0

    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        if metrics["event"] == "step":
            self.now += STEP_S
        super().report(metrics, checkpoint)


def timed(spec: TrainSpec, base: BaseModel, folder: Path, name: str, **options: Any) -> FolderReporter:
    reporter = Timed(folder / name, keep=99)
    return run(spec, base, folder, reporter=reporter, clock=lambda: reporter.now, **options)[1]


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
    assert [c.step for c in timed(spec, base, tmp_path, "run").checkpoints] == steps


def test_a_run_resumed_from_a_timed_checkpoint_is_the_unbroken_one(base: BaseModel, tmp_path: Path) -> None:
    spec = recipe(max_steps=6)
    unbroken = timed(spec, base, tmp_path, "unbroken")
    resumed = timed(spec, base, tmp_path, "resumed", resume_from=unbroken.checkpoints[0].path)
    assert unbroken.checkpoints[0].step == 4
    assert curve(resumed) == curve(unbroken)[4:]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["resumed", "unbroken"]  # nothing is left over


def test_steps_go_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = recipe(max_steps=4, checkpoint={"interval_steps": 2})
    plain = timed(spec, base, tmp_path, "plain")
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
    run(spec, base, tmp_path, reporter=reporter)
    told = [(e["event"], e["step"]) for e in reporter.events if e["event"] in ("step", "checkpoint")]
    assert told == [*(("step", n) for n in (1, 2, 3, 4)), ("checkpoint", 2), ("checkpoint", 4)]
    assert written == [2, 4]
    for ours, theirs in zip(reporter.checkpoints, plain.checkpoints, strict=True):
        mine, expected = (checkpoint.read_optimizer(c.path) for c in (ours, theirs))
        for a, b in zip(mine[:3], expected[:3], strict=True):
            assert_equal(a, b)


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
        run(spec, base, tmp_path, reporter=reporter, workdir=workdir)
    assert list(workdir.iterdir()) == []
    assert reporter.checkpoints == []


def test_a_machine_that_will_be_taken_away_is_a_checkpoint_at_once(base: BaseModel, tmp_path: Path) -> None:
    """And one for each of them, however long it stays."""
    asked, leaving = list[None](), frozenset[str]()

    def told() -> frozenset[str]:
        nonlocal leaving
        asked.append(None)
        leaving |= {7: {"a"}, 12: {"b"}}.get(len(asked), set())
        return leaving

    spec = recipe(max_steps=20, batch={"rows": 1}, checkpoint={"interval_minutes": None})
    _, reporter = run(spec, base, tmp_path, leaving=told)
    steps = [e["step"] for e in reporter.events if e["event"] == "checkpoint"]
    assert len(steps) == 3
    assert steps[0] < 8 <= steps[1] < 12 < steps[2] == 20


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


def test_a_written_checkpoint_stays_where_the_run_fails_before_it_is_reported(base: BaseModel, tmp_path: Path) -> None:
    class Fails(FolderReporter):
        def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
            if metrics["event"] == "step" and metrics["step"] == 2:
                raise RuntimeError("the other rank is gone")
            super().report(metrics, checkpoint)

    spec, workdir = recipe(max_steps=3, checkpoint={"interval_steps": 1}), tmp_path / "work"
    workdir.mkdir()
    reporter = Fails(tmp_path / "run")
    with pytest.raises(RuntimeError):
        run(spec, base, tmp_path, reporter=reporter, workdir=workdir)
    kept = [c.path for c in reporter.checkpoints] or [workdir / f"{checkpoint.WRITTEN}000001"]
    assert [checkpoint.read_state(path).step for path in kept] == [1]


@pytest.fixture(scope="module")
def saved(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of one step."""
    return run(recipe(max_steps=1), base, tmp_path_factory.mktemp("saved"))[1].checkpoints[0].path


def test_another_recipe_is_not_resumed(base: BaseModel, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot resume from step 1: adapter, seed changed"):
        run(recipe("vera", seed=1), base, tmp_path, resume_from=saved)
    with pytest.raises(SpecError, match=r"a step's micro-batches \(batch\.accumulation × num_workers ÷ parallel"):
        run(recipe(num_workers=2), base, tmp_path, resume_from=saved)
    checkpoint.check_resumable(
        checkpoint.read_state(saved),
        recipe(num_workers=2, batch={"rows": 2, "accumulation": 1}),
        base.fingerprint,
        make_data(tmp_path, recipe()).fingerprint,
    )
    moved = recipe(max_steps=2, data={"train": "/elsewhere.jsonl", "eval_fraction": 0.2, "max_length": 64})
    assert run(moved, base, tmp_path, resume_from=saved, name="moved")[0].step == 2


def test_a_damaged_checkpoint_is_named(base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(IntegrityError, match="not a complete checkpoint"):
        run(recipe(), base, tmp_path, resume_from=tmp_path / "empty")


def test_what_may_be_published(saved: Path) -> None:
    state = checkpoint.read_state(saved)
    checkpoint.check_publishable(state)
    checkpoint.check_publishable(state.model_copy(update={"baselines": (), "eval_loss": None}))
    with pytest.raises(TrainingError, match="no finite held-out loss; nothing was published"):
        checkpoint.check_publishable(state.model_copy(update={"eval_loss": None}))
    with pytest.raises(TrainingError, match="every step up to 1 was skipped"):
        checkpoint.check_publishable(state.model_copy(update={"skipped_steps": 1}))


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.filterwarnings("ignore:.*vera_A.*")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("of_base", "asked", "published"), [(BF16, None, BF16), (BF16, "float32", FP32), (FP32, None, FP32)]
)
def test_an_adapter_has_the_bases_dtype_unless_another_is_asked_for(
    method: str,
    of_base: torch.dtype,
    asked: str | None,
    published: torch.dtype,
    tiny_base: Callable[..., BaseModel],
    tmp_path: Path,
) -> None:
    base = tiny_base(std=0.05, dtype=of_base)
    spec = recipe(method, max_steps=1, publish={"dtype": asked})
    assert stored_dtype(base.path) == str(of_base).removeprefix("torch.")
    _, reporter = run(spec, base, tmp_path)
    folder = reporter.checkpoints[-1].path
    masters = checkpoint.read_optimizer(folder).masters
    assert {master.dtype for master in masters.values()} == {FP32}
    with safe_open(str(folder / checkpoint.ADAPTER / WEIGHTS_FILE), framework="pt") as stored:
        for name, master in masters.items():
            key = PREFIX + peft_name(name)
            if key in stored.keys():  # noqa: SIM118 - it is no mapping
                expected = master.to(FP32 if keeps_fp32(name) else published)
                assert stored.get_tensor(key).dtype == expected.dtype
                assert torch.equal(stored.get_tensor(key), expected)
    exact = build_model(base, spec).eval()
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            if name in masters:
                parameter.copy_(masters[name])
    wanted = logits(exact)
    found = logits(in_peft(base, exact, folder / checkpoint.ADAPTER))
    step = 2**-7 if published is BF16 else 1e-5
    assert (found - wanted).abs().max() <= step * wanted.abs().max()
