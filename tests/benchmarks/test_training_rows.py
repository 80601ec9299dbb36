"""What a worker holds of rows, and the benchmark that measures it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.training import rows
from loray.train.data import batches
from loray.train.data.shards import FolderCache


@pytest.mark.parametrize("order", ["shuffled", "packed"])
def test_steps_from_places_all_over_an_epoch(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_STRIP", 64)
    monkeypatch.setattr(batches, "_STRIPS", 32)
    monkeypatch.setattr(rows, "_STEPS", 10)
    rows.write_columns(FolderCache(tmp_path), 20_000)
    found = rows.measure(str(tmp_path), order, num_workers=1)
    assert set(found) == {"held_bytes", "count_s", "block_s", "step_s"}
    assert 0 < found["step_s"] <= found["block_s"]


@pytest.mark.slow
def test_a_worker_holds_no_number_for_each_row(tmp_path: Path) -> None:
    figures = tmp_path / "rows.json"
    found = rows.main(["--rows", "8e6", "--orders", "shuffled", "--folder", str(tmp_path), "--json", str(figures)])
    assert json.loads(figures.read_text()) == found
    assert found[0]["held_bytes"] < 200e6
