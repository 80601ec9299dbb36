"""Events as lines of JSON and for people, read from a file that another process writes, and on a terminal."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from jobs.events import Stages, decode, describe, duration, encode, figures, following
from jobs.trackers import scalars
from jobs.view import RunView
from loray.spec import OBJECTIVES, SftSpec
from tests.fixtures.events import FIGURES, START, step

EVAL: dict[str, Any] = {"event": "eval", "step": 20, "subject": "adapter", "eval_loss": 1.5}
PUBLISHED: dict[str, Any] = {
    "event": "published",
    "label": "a@1",
    "aliases": ["prod"],
    "nbytes": 1234,
    "digest": "0" * 64,
}


def test_events_are_encoded_and_decoded(tmp_path: Path) -> None:
    assert decode(encode(step(1))) == step(1)
    assert json.loads(encode(step(1, float("nan"))))["loss"] is None
    for line in ("", "hello", '{"event"', '{"other": 1}', "(pid=1) {}"):
        assert decode(line) is None


def test_events_for_people() -> None:
    assert describe(START) == (
        "25 of 1,000 parameters trained (2.50%); 20 steps; chat rows through the base's chat template; "
        "5 rows, 60 tokens, 2 rows held out; 1 rows truncated, 0 dropped; "
        "20.0% of rows and 6.2% of tokens beyond 16 tokens, 20 keep 99 % whole; "
        "on cpu in float32 (this CPU has no bfloat16 products)"
    )
    assert "loss 2.0000  lr 1.00e-03  grad norm 0.5000  1,234 tokens/s  MFU 31.2%  ETA 1:01" in describe(step(3))
    assert "loss not finite" in describe(step(3, float("inf")))
    assert describe(PUBLISHED) == "published a@1 (prod): 1,234 bytes, digest 000000000000"
    assert duration(3723) == "1:02:03"
    assert "loss 2.0000  accuracy 0.8750  margin 0.7500  lr" in describe(step(3) | FIGURES)
    assert describe(EVAL | FIGURES) == "step 20  held-out loss 1.5000  accuracy 0.8750  margin 0.7500 (adapter)"
    pairs = START["data"] | {"format": "preference"}
    assert "5 pairs, 60 tokens, 2 pairs held out; 1 pairs truncated" in describe(START | {"data": pairs})


def test_metrics_are_those_of_the_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odds(SftSpec):
        metrics: ClassVar[dict[str, str]] = {"odds": "Odds", "more/odds": "More of them"}
        shown: ClassVar[dict[str, str]] = {"odds": "odds"}

    monkeypatch.setitem(OBJECTIVES, "odds", Odds)
    event = step(3) | {"odds": 2.5, "more/odds": None}
    assert "loss 2.0000  odds 2.5000  lr" in describe(event)
    assert scalars(event)[0].items() >= {"train/loss": 2.0, "train/odds": 2.5}.items()
    assert "train/more/odds" not in scalars(event)[0]  # it was not finite
    assert figures(event) == {"odds": 2.5, "more/odds": None}


def test_stages_tell_their_beginning_their_end_and_once_a_second() -> None:
    told: list[Any] = []
    now = 0.0
    stages = Stages(told.append, lambda: now)
    stages("reading the data")
    for done in range(9):
        now = done * 0.4
        stages("tokenising", done, 8)
    stages("loading the base", 0.5, 1, eta_s=12.0)
    assert [describe(event) for event in told] == [
        "reading the data",
        "tokenising: 0 of 8",
        "tokenising: 3 of 8",
        "tokenising: 6 of 8",
        "tokenising: 8 of 8",
        "loading the base: 50%",
    ]
    assert (
        told[-1]
        == decode(encode(told[-1]))
        == {
            "event": "progress",
            "stage": "loading the base",
            "done": 0.5,
            "total": 1,
            "eta_s": 12.0,
        }
    )


def test_a_tail_emits_every_new_event_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(encode(step(1)) + "\n")
    seen: list[dict[str, Any]] = []
    with following(path, seen.append), path.open("a") as file:
        whole = encode(step(2)) + "\n"
        file.write(whole[:9])
        file.flush()
        time.sleep(0.5)
        file.write(whole[9:])
        file.flush()
        deadline = time.monotonic() + 10
        while not seen and time.monotonic() < deadline:
            time.sleep(0.02)
        assert seen == [step(2)]
        file.write(encode(step(3)) + "\n")  # just before the end
    assert seen == [step(2), step(3)]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_on_a_console(terminal: bool) -> None:
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


def test_a_failed_run_keeps_the_reason_and_the_last_lines() -> None:
    view = RunView(Console(file=io.StringIO()))
    with view:
        for i in range(50):
            view.feed(f"line {i}")
        view.feed(encode({"event": "error", "kind": "DataError", "message": "no data"}))
    assert view.error is not None
    assert describe(view.error) == "error: no data"
    assert list(view.log) == [f"line {i}" for i in range(30, 50)]
