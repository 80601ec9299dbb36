"""The benchmark of masks: it compares steps with all rows, and forced tokens do not hide what a step costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.engine.masks import FIRST, FREE, SCHEMA, SINGLE, figures, main, ratios
from benchmarks.serving.recorder import EngineStep
from loray.bases.registry import BaseModel


def step(seconds: float, num_tokens: int, num_rows: int) -> EngineStep:
    return EngineStep(0.0, seconds, num_tokens, num_rows, 0, 0, 0)


def test_only_steps_with_all_rows_count() -> None:
    found = figures([step(0.01, 2, 2), step(0.03, 4, 2), step(0.02, 2, 2), step(9, 1, 1)], 2)
    assert found == pytest.approx((20, 60 / 8, 8 / 3, 3))
    assert ratios([found], [found._replace(step_ms=16)]) == [1.25]
    with pytest.raises(SystemExit, match="more --tokens"):
        figures([step(9, 1, 1)], 2)


def test_the_whole_benchmark(tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    base = tiny_base()
    monkeypatch.setenv("LORAY_HOME", str(base.path.parents[1]))
    monkeypatch.setattr("benchmarks.engine.masks.freeze_garbage", lambda: None)  # other tests run in this process
    passes = main(["--model", base.name, "--rows", "3", "--tokens", "30", "--repeat", "2"])
    assert {way: [p.tokens for p in passes[way]] for way in (FIRST, FREE, SINGLE)} == {
        way: [3.0, 3.0] for way in (FIRST, FREE, SINGLE)
    }
    assert all(p.tokens > 3 for p in passes[SCHEMA])  # what is forced is taken with the step's own
    assert all(p.num_steps == 29 for way in (FREE, SINGLE) for p in passes[way])
    assert "token by token" in capsys.readouterr().out
