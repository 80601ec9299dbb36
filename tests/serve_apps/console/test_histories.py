"""A look at a job reads its new events alone, and of Ray's log a bounded end."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.runs.history import RunEvents
from loray.catalog import Catalog
from loray.errors import LogsGone
from loray.recipes.load import load_recipe
from loray.settings import Settings
from serve_apps.console.runs import CURVE_LINES, LOG_LINES, MOST_JOBS, Histories, Seen
from tests.fixtures.catalogs import sqlite_catalog


def held_out(step: int, loss: float) -> str:
    return json.dumps({"event": "eval", "step": step, "eval_loss": loss, "subject": "adapter"}) + "\n"


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

    job, histories = catalog.add_job("train_1", name="tone", recipe=recipe), Histories()
    history = histories.of(job, settings)
    seen = history.look(job, gone)
    assert seen == ({}, (), "", "the log is gone", None)
    seen = history.look(job, tail)
    assert (asked, len(seen.log.splitlines()), has_loss(seen, "1.0")) == ([CURVE_LINES], LOG_LINES, True)
    assert (seen.steps[-1].step, seen.steps[-1].lr, seen.steps[-1].eta_s) == (CURVE_LINES - 2, 1e-3, None)

    folder = settings.home / "runs" / "tone" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-000000"
    folder.mkdir(parents=True)
    (folder / "job_id").write_text(job.id)
    file = folder / "events.jsonl"
    file.write_text("".join(held_out(n, 2.0) for n in range(300)))
    seen = history.look(job, tail)
    assert (asked, len(seen.log.splitlines()), has_loss(seen, "1.0")) == ([CURVE_LINES], LOG_LINES, False)
    assert seen.steps == ()
    num_bytes: list[int] = []
    take = RunEvents._take

    def counted(events: RunEvents, opened: object, at: int, length: int) -> bytes:
        num_bytes.append(length)
        return take(events, opened, at, length)

    monkeypatch.setattr(RunEvents, "_take", counted)
    assert history.look(job, tail).curve == seen.curve
    assert num_bytes == []
    with file.open("a") as events:
        events.write(held_out(300, 2.5))
    assert has_loss(history.look(job, tail), "2.5")
    assert num_bytes == [len(held_out(300, 2.5))]
    assert asked == [CURVE_LINES]

    catalog.start_job(job.id)
    failed = catalog.end_job(job.id, "failed", message="out of memory")
    seen = histories.of(failed, settings).look(failed, tail)
    assert (asked, len(seen.log.splitlines()), has_loss(seen, "2.5")) == ([CURVE_LINES, LOG_LINES], LOG_LINES, True)
    assert "held-out loss" not in seen.log
    assert "held-out loss" in history.look(failed, gone).log
    catalog.close()


def test_few_jobs_are_kept(tmp_path: Path) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    catalog, recipe, histories = Catalog(sqlite_catalog(tmp_path)), load_recipe("lora_smollm2").spec, Histories()
    jobs = [catalog.add_job(f"train_{n}", name="tone", recipe=recipe) for n in range(MOST_JOBS + 1)]
    first = histories.of(jobs[0], settings)
    second = histories.of(jobs[1], settings)
    assert histories.of(jobs[0], settings) is first
    for job in jobs[2:]:
        histories.of(job, settings)
    assert histories.of(jobs[0], settings) is first
    assert histories.of(jobs[1], settings) is not second
    catalog.close()
