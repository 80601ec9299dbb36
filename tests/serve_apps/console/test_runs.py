"""A run as its page shows it: losses and steps thinned to a bound, and looks that read new events alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest

from jobs.events import Event
from jobs.runs import history as run_history
from loray.catalog import Catalog
from loray.errors import LogsGone
from loray.recipes.load import load_recipe
from loray.settings import Settings
from serve_apps.console.runs import (
    CURVE_LINES,
    LOG_LINES,
    MOST_JOBS,
    MOST_POINTS,
    MOST_STEPS,
    Histories,
    Losses,
    RunProgress,
    RunStages,
    Seen,
    curve_of,
)
from tests.fixtures.catalogs import sqlite_catalog


def step(number: int, loss: float) -> Event:
    return cast("Event", {"event": "step", "step": number, "loss": loss})


def held_out(number: int, loss: float, subject: str = "adapter") -> Event:
    return cast("Event", {"event": "eval", "step": number, "eval_loss": loss, "subject": subject})


def points(losses: Losses) -> list[list[float | None]]:
    curve = curve_of(losses.lines())
    assert curve is not None
    found: list[list[float | None]] = json.loads(curve.points)
    assert len(found) == len(json.loads(curve.labels))
    return found


def test_losses_are_thinned() -> None:
    losses = Losses()
    for begin in range(1, 50_001, 100):
        losses.take(step(n, 1.0 / n) for n in range(begin, begin + 100))
        losses.take(held_out(n, 2.5) for n in range(begin, begin + 100))
    steps, training, held = points(losses)
    assert 235 <= len(steps) == len(training) == len(held) <= MOST_POINTS
    assert (steps[0], steps[-1], training[0], held[0]) == (1, 50_000, 1.0, 2.5)
    gaps = [after - before for before, after in pairwise(steps[:-1])]
    assert len(set(gaps)) == 1


def test_few_losses_are_all_there() -> None:
    losses = Losses()
    assert curve_of(losses.lines()) is None
    losses.take([step(1, 1.0), step(2, 0.5), held_out(2, 0.25)])
    assert points(losses) == [[1, 2], [1.0, 0.5], [None, 0.25]]


def test_checkpoints_take_no_held_out_loss_away() -> None:
    """Their events repeat a loss, and come when the upload is done: here after two later evaluations."""
    losses = Losses()
    for n in range(1, 3001):
        losses.take([held_out(n, 1.0), held_out(n, 1.0 / n)])
        if n > 2:
            losses.take([cast("Event", {"event": "checkpoint", "step": n - 2, "eval_loss": 9.0})])
    steps, _, held = points(losses)
    assert 235 <= len(steps) <= MOST_POINTS
    assert held == [1.0 / n for n in steps]
    assert (steps[0], steps[-1]) == (1, 3000)
    assert len({after - before for before, after in pairwise(steps[:-1])}) == 1


def test_a_step_that_comes_again_replaces_what_followed() -> None:
    losses = Losses()
    losses.take(step(n, 1.0) for n in range(1, 10))
    losses.take(step(n, 0.5) for n in range(5, 8))  # from a checkpoint
    assert points(losses)[:2] == [[1, 2, 3, 4, 5, 6, 7], [1.0] * 4 + [0.5] * 3]


def test_each_model_that_is_measured_has_its_line() -> None:
    losses = Losses()
    losses.take([held_out(0, 3.0, "base"), held_out(0, 4.0, "base_scaled"), held_out(0, 9.0, "of a later version")])
    losses.take([step(1, 2.0), step(2, 1.0), held_out(2, 1.5)])
    curve = curve_of(losses.lines())
    assert curve is not None
    subjects = ["held out, adapter", "held out, base scaled", "held out, base"]
    assert json.loads(curve.labels) == ["step", "training", *subjects]
    assert points(losses) == [[0, 1, 2], [None, 2.0, 1.0], [None, None, 1.5], [4.0, None, 4.0], [3.0, None, 3.0]]


def test_a_run_from_an_adapter_is_compared_with_its_parent() -> None:
    losses = Losses()
    losses.take([held_out(0, 3.0, "parent"), held_out(5, 2.0)])
    assert points(losses) == [[0, 5], [None, None], [None, 2.0], [3.0, 3.0]]


def test_all_lines_together_are_bounded() -> None:
    losses = Losses()
    for n in range(5000):
        losses.take([step(3 * n, 1.0), held_out(3 * n + 1, 1.0)])
        losses.take(held_out(3 * n + 2, 1.0, subject) for subject in ("parent", "base", "base_scaled"))
    assert len(points(losses)[0]) <= MOST_POINTS


def test_few_steps_of_many_and_the_last() -> None:
    progress = RunProgress()
    assert progress.steps() == ()
    for n in range(1, 10_001):
        figures = {"num_steps": 10_000, "loss": 1.0 / n, "lr": 1e-3, "tokens_per_s": 512.0, "eta_s": 10_000.0 - n}
        progress.take([cast("Event", {"event": "step", "step": n} | figures)])
    steps = progress.steps()
    assert MOST_STEPS / 2 <= len(steps) <= MOST_STEPS
    last = steps[-1]
    assert (last.step, last.num_steps, last.tokens_per_s, last.eta_s) == (10_000, 10_000, 512.0, 0.0)
    assert (last.mfu, last.memory_bytes) == (None, None)  # an event need not have them


def test_what_is_no_figure_is_none() -> None:
    progress = RunProgress()
    odd = {"event": "step", "step": 3, "num_steps": "many", "loss": None, "lr": "fast", "memory_bytes": 1 << 30}
    progress.take([cast("Event", odd), cast("Event", {"event": "eval", "step": 4, "eval_loss": 1.0})])
    (only,) = progress.steps()
    assert (only.step, only.num_steps, only.loss, only.lr, only.memory_bytes) == (3, None, None, None, 1 << 30)


def line(number: int, loss: float = 2.0) -> str:
    return json.dumps(held_out(number, loss)) + "\n"


def has_loss(seen: Seen, loss: str) -> bool:
    return seen.curve is not None and loss in seen.curve.points


def test_looks_at_a_job_from_its_beginning_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    catalog, recipe = Catalog(sqlite_catalog(tmp_path)), load_recipe("lora_smollm2").spec
    asked: list[int] = []

    def tail(job_id: str, num_lines: int) -> str:
        asked.append(num_lines)
        lines = (json.dumps({"event": "step", "step": n, "loss": 1.0, "lr": 1e-3}) for n in range(num_lines - 1))
        return "\n".join(["no event", *lines])

    def gone(job_id: str, num_lines: int) -> str:
        raise LogsGone("the log is gone")

    job, histories = catalog.jobs.add("train_1", name="tone", recipe=recipe), Histories()
    history = histories.of(job, settings)
    seen = history.look(job, gone)
    assert seen == ({}, (), "", "the log is gone", None, None, (), {}, {}, None)
    seen = history.look(job, tail)
    assert (asked, len(seen.log.splitlines()), has_loss(seen, "1.0")) == ([CURVE_LINES], LOG_LINES, True)
    assert (seen.steps[-1].step, seen.steps[-1].lr, seen.steps[-1].eta_s) == (CURVE_LINES - 2, 1e-3, None)

    folder = settings.home / "runs" / "tone" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-000000"
    folder.mkdir(parents=True)
    (folder / "job_id").write_text(job.id)
    file = folder / "events.jsonl"
    file.write_text("".join(map(line, range(300))))
    seen = history.look(job, tail)
    assert (asked, len(seen.log.splitlines()), has_loss(seen, "1.0")) == ([CURVE_LINES], LOG_LINES, False)
    assert seen.steps == ()
    num_bytes: list[int] = []
    take = run_history._whole_lines

    def counted(opened: object, at: int, length: int) -> bytes:
        num_bytes.append(length)
        return take(opened, at, length)

    monkeypatch.setattr(run_history, "_whole_lines", counted)
    assert history.look(job, tail).curve == seen.curve
    assert num_bytes == []
    with file.open("a") as events:
        events.write(line(300, 2.5))
    assert has_loss(history.look(job, tail), "2.5")
    assert num_bytes == [len(line(300, 2.5))]
    assert asked == [CURVE_LINES]

    catalog.jobs.start(job.id)
    failed = catalog.jobs.end(job.id, "failed", message="out of memory")
    seen = histories.of(failed, settings).look(failed, tail)
    assert (asked, len(seen.log.splitlines()), has_loss(seen, "2.5")) == ([CURVE_LINES, LOG_LINES], LOG_LINES, True)
    assert "held-out loss" not in seen.log
    assert "held-out loss" in history.look(failed, gone).log
    catalog.close()


def test_few_jobs_are_kept(tmp_path: Path) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    catalog, recipe, histories = Catalog(sqlite_catalog(tmp_path)), load_recipe("lora_smollm2").spec, Histories()
    jobs = [catalog.jobs.add(f"train_{n}", name="tone", recipe=recipe) for n in range(MOST_JOBS + 1)]
    first = histories.of(jobs[0], settings)
    second = histories.of(jobs[1], settings)
    assert histories.of(jobs[0], settings) is first
    for job in jobs[2:]:
        histories.of(job, settings)
    assert histories.of(jobs[0], settings) is first
    assert histories.of(jobs[1], settings) is not second
    catalog.close()


def test_a_stage_ends_with_the_next_step_and_odd_events_are_no_stage() -> None:
    stages = RunStages()
    progress: dict[str, object] = {"event": "progress", "stage": "tokenising", "done": 2, "total": 8}
    stages.take([cast("Event", progress)])
    assert stages.stage == ("tokenising: 2 of 8", 0.25, None)
    stages.take([step(1, 1.0)])
    assert stages.stage is None
    stages.take([cast("Event", progress | {"total": None, "eta_s": "soon"})])
    assert stages.stage == ("tokenising", None, None)
    stages.take([cast("Event", {"event": "progress", "done": "two", "total": 8})])
    assert stages.stage is not None
    assert stages.stage.share is None
    stages.take([cast("Event", {"event": "samples", "samples": [1, {"prompt": "a"}]})])
    assert stages.samples == [{"prompt": "a"}]
