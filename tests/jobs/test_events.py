"""Events as lines of JSON and for people, read from a file that another process writes, and on a terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from jobs.events import Stages, decode, describe, duration, encode, figures, following
from jobs.trackers import scalars
from loray.spec import OBJECTIVES, SftSpec
from tests.fixtures.events import EVAL, FIGURES, PUBLISHED, SAMPLES, START, step


def test_events_are_encoded_and_decoded(tmp_path: Path) -> None:
    assert decode(encode(step(1))) == step(1)
    assert json.loads(encode(step(1, float("nan"))))["loss"] is None
    assert decode(encode(step(1), 1.23456)) == {**step(1), "time": 1.235}
    for line in ("", "hello", '{"event"', '{"other": 1}', "(pid=1) {}"):
        assert decode(line) is None


def test_events_for_people() -> None:
    assert describe(START) == (
        "25 of 1,000 parameters trained (2.50%); 20 steps; chat rows through the base's chat template; "
        "5 rows, 60 tokens, 2 rows held out (fewer than 20: their loss is noisy); 1 rows truncated, 0 dropped; "
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
    assert "5 pairs, 60 tokens, 2 pairs held out (fewer than 20: their loss is noisy); 1 pairs truncated" in describe(
        START | {"data": pairs}
    )
    assert "20 rows held out; 1" in describe(START | {"data": START["data"] | {"num_eval_rows": 20}})
    batch: Any = {"event": "batch", "rows": 4, "accumulation": 2, "reason": "the most that fit"}
    assert describe(batch) == "batch: 4 rows at once, 2 times a step (the most that fit)"
    assert describe(batch | {"accumulation": 1}) == "batch: all 4 rows of a step at once (the most that fit)"
    assert describe(SAMPLES) == "prompt    one ⏎ two\nexpected  2\nbase      (nothing)\nadapter   2"


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
