"""The measurements of keys run, let right keys pass and wrong ones not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.front.keys.__main__ import main
from benchmarks.front.keys.check import line, measure
from loray.bases.registry import BaseModel


def test_it_measures_each_kind() -> None:
    cost = measure(40)
    assert min(cost) > 0
    assert "µs a request with a right one" in line(cost)


def test_right_requests_beside_wrong_keys(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base()
    monkeypatch.setenv("LORAY_HOME", str(base.path.parents[1]))
    file = tmp_path / "keys.json"
    options = ["--base", base.name, "--seconds", "0.4", "--wrong", "200", "--checks", "40", "--json", str(file)]
    alone, beside = main(options)
    assert (alone.refused_per_s, beside.refused_per_s > 0) == (0.0, True)
    for row in (alone, beside):
        assert 0 < row.p50_ms <= row.p99_ms <= row.worst_ms
    assert json.loads(file.read_text())["rows"] == [alone._asdict(), beside._asdict()]
