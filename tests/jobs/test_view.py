"""A run as a terminal shows it: stages, one time that is left, the losses as a picture; lines without a terminal."""

from __future__ import annotations

import io
import time
from typing import Any, cast

import pytest
from rich.console import Console

from jobs.events import AdapterOutcome, Event, ProgressEvent, describe, encode
from jobs.view import LossPicture, ManyView, RunView
from tests.fixtures.events import EVAL, PUBLISHED, SAMPLES, START, step

ROUND: Any = {
    "event": "round",
    "num_active": 2,
    "num_passes": 1,
    "num_tokens": 100,
    "tokens_per_s": 50.0,
    "eta_s": 9.0,
}


def stage(name: str, done: float, total: float | None, **more: float) -> ProgressEvent:
    return {"event": "progress", "stage": name, "done": done, "total": total, **more}  # type: ignore[typeddict-item]


def shown(view: RunView) -> str:
    """What the bar and what is below it would look like now."""
    out = io.StringIO()
    Console(file=out, width=200).print(view._render())
    return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_on_a_console(terminal: bool) -> None:
    """It ends with the losses: as a picture, or as numbers where the output is no terminal."""
    out = io.StringIO()
    view = RunView(Console(file=out, force_terminal=terminal, width=200))
    with view:
        view.feed("Running entrypoint for job …")
        for event in (START, *(step(i) for i in range(1, 21)), EVAL, PUBLISHED):
            view.feed(encode(event))
    assert view.published == PUBLISHED
    assert view.error is None
    assert list(view.log) == ["Running entrypoint for job …"]
    assert "25 of 1,000 parameters trained" in out.getvalue()
    assert "held-out loss 1.5000" in out.getvalue()
    if not terminal:
        assert out.getvalue().count("tokens/s") == 10
        assert out.getvalue().splitlines()[-1] == "loss 2.0000 → 2.0000, held out 1.5000 → 1.5000"
    else:
        assert "held out" in out.getvalue().splitlines()[-1]
        assert "1.5000 → 1.5000" in out.getvalue().splitlines()[-1]


def test_stages_have_the_bar_before_the_steps_and_after_them() -> None:
    begun: list[int] = []
    view = RunView(Console(file=io.StringIO(), force_terminal=True, width=200), lambda: begun.append(1))
    assert "starting" in shown(view)
    view.feed("Running entrypoint for job …")
    assert begun == []
    view.feed(encode(stage("tokenising", 3, 8)))
    assert "tokenising" in shown(view)
    assert "3 of 8" in shown(view)
    assert "ETA" not in shown(view)
    for event in (START, step(7)):
        view.feed(encode(event))  # type: ignore[arg-type]
    assert "training" in shown(view)
    assert "7/20  loss 2.0000" in shown(view)
    assert shown(view).count("ETA 1:0") == 1
    view.feed(encode(stage("measuring the adapter", 0.25, 1, eta_s=3600.0)))
    assert "training" not in shown(view)
    assert "measuring the adapter" in shown(view)
    assert "25%" in shown(view)
    assert "ETA 1:00:00" in shown(view) or "ETA 59:5" in shown(view)
    assert begun == [1]


def test_the_time_that_is_left_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    view = RunView(Console(file=io.StringIO(), force_terminal=True, width=200))
    now = time.monotonic()
    monkeypatch.setattr("jobs.view.time.monotonic", lambda: now)
    view.feed(encode(step(3)))  # type: ignore[arg-type]
    assert "ETA 1:01" in shown(view)
    now += 31
    assert "ETA 0:30" in shown(view)
    now += 60
    assert "ETA 0:00" in shown(view)


def test_without_a_terminal_a_stage_has_a_line_each_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), [1000.0]
    monkeypatch.setattr("jobs.view.time.monotonic", lambda: now[0])
    view = RunView(Console(file=out, width=200))
    with view:
        view.feed(encode(stage("reading the data", 0, None)))
        for done in range(26):
            view.feed(encode(stage("tokenising", done, 100)))
            now[0] += 1
        view.feed(encode(SAMPLES))
    lines = ["reading the data", "tokenising: 0 of 100", "tokenising: 10 of 100", "tokenising: 20 of 100"]
    assert out.getvalue().splitlines() == [*lines, *describe(SAMPLES).splitlines()]


def test_losses_share_a_scale_and_go_on_to_the_next_one() -> None:
    picture = LossPicture(8)
    assert picture.lines() == []
    assert picture.summary() == ""
    picture.begin(16)
    picture.add("held out", 0, 4.0)
    for at in range(1, 13):
        picture.add("loss", at, 5.0 - at / 4)
    picture.add("loss", 13, None)
    picture.add("held out", 8, 3.0)
    training, held_out = picture.lines()
    assert training == "loss      █▇▅▄▂▁  4.7500 → 2.0000"
    assert held_out == "held out  ▆▆▆▃▃▃  4.0000 → 3.0000"
    assert picture.summary() == "loss 4.7500 → 2.0000, held out 4.0000 → 3.0000"


def test_a_failed_run_keeps_the_reason_and_the_last_lines() -> None:
    view = RunView(Console(file=io.StringIO()))
    with view:
        for i in range(50):
            view.feed(f"line {i}")
        view.feed(encode({"event": "error", "kind": "DataError", "message": "no data"}))
    assert view.error is not None
    assert describe(view.error) == "error: no data"
    assert list(view.log) == [f"line {i}" for i in range(30, 50)]


def of(name: str, event: object) -> str:
    return encode(cast("Event", {**cast("dict[str, object]", event), "adapter": name}))


def test_a_job_of_several_adapters_is_a_table_with_a_line_for_each() -> None:
    names, begun = [f"a{i:02}" for i in range(40)], list[int]()
    out = io.StringIO()
    view = ManyView(Console(file=out, force_terminal=True, width=160, height=20), lambda: begun.append(1))

    def picture() -> str:
        drawn = io.StringIO()
        Console(file=drawn, width=160).print(view._render())
        return drawn.getvalue()

    view.feed("Running entrypoint for job …")
    view.feed(encode({"event": "adapters", "adapters": dict.fromkeys(names, "job.1"), "num_workers": 1}))
    assert begun == [1]
    assert "and 26 more" in picture()
    for event in (START, {**EVAL, "eval_loss": 2.5}, step(7), EVAL):
        view.feed(of("a39", event))
    view.feed(of("a38", {"event": "end", "step": 3, "status": "failed", "message": "no finite loss"}))
    rows = [line.split() for line in picture().splitlines() if line.strip().startswith(("a38", "a39"))]
    assert [(row[0], row[-1]) for row in rows] == [("a39", "training"), ("a38", "failed")]  # before those that wait
    assert "7/20" in rows[0]
    assert "a38: failed, at step 3: no finite loss" in out.getvalue()
    view.feed(of("a39", PUBLISHED))
    assert f"published {PUBLISHED['label']}" in picture()
    ended: list[AdapterOutcome] = [
        {"name": "a39", "job_id": "job.1", "status": "succeeded", "step": 20, "label": "a39@1", "message": ""},
        {"name": "a38", "job_id": "job.2", "status": "failed", "step": 3, "label": "", "message": "no finite loss"},
    ]
    view.feed(encode({"event": "outcomes", "adapters": ended}))
    assert view.outcomes == ended
    assert describe({"event": "outcomes", "adapters": ended}) == "1 succeeded, 1 failed"
    assert list(view.log) == ["Running entrypoint for job …"]
    drawn = Console(file=io.StringIO(), width=160)
    drawn.print(view.table())
    assert "2.5000 → 1.5000" in cast("io.StringIO", drawn.file).getvalue()


def test_without_a_terminal_rounds_have_a_line_each_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), [1000.0]
    monkeypatch.setattr("jobs.view.time.monotonic", lambda: now[0])
    with ManyView(Console(file=out, width=200)) as view:
        for number in range(21):
            view.feed(encode(ROUND | {"round": number}))
            now[0] += 1
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["0", "10", "20"]
