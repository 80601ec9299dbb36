"""The benchmark of training's data path: two runs on the same data, of which the second finds all tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.training.data import main
from loray.bases.registry import BaseModel


@pytest.mark.slow
@pytest.mark.parametrize("order", ["concat", "packed"])
def test_the_command(smollm2: BaseModel, tmp_path: Path, order: str) -> None:
    home = smollm2.path.parents[1]
    rows = main(["--tokens", "1e5", "--random-ids", "--order", order, "--home", str(home), "--folder", str(tmp_path)])
    first, second = rows
    assert [row["run"] for row in rows] == ["first", "second"]
    assert first["num_tokens"] == second["num_tokens"] > 80_000
    assert first["shard_bytes"] == second["shard_bytes"] > 2 * first["num_tokens"]
    assert max(row["driver_bytes"] for row in rows) < 1e9
    assert list(tmp_path.iterdir()) == []
