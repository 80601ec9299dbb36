"""The host's time for a step without a GPU: what the figures count, and that a step is the product's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving.host.__main__ import main

SMALL = ["--layers", "2", "--heads", "4", "--kv-heads", "2", "--rows", "3", "--steps", "3", "--context", "20"]


def test_a_base_step_is_one_replay_beside_the_sampler(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    figures = main([*SMALL, "--adapters", "0", "--json", str(file)])
    assert json.loads(file.read_text())["host_ms"] == figures["host_ms"] > 0
    assert figures["launches"] < 20
    assert 0 < figures["copies"] <= 8
    assert figures["reads"] == 2  # the sampler's: best logits and their tokens
    assert figures["python_calls"] > 0 < figures["python_peak_bytes"]


@pytest.mark.parametrize("adapters", [2, 3])
def test_rows_share_adapters(adapters: int) -> None:
    figures = main([*SMALL, "--adapters", str(adapters)])
    assert (figures["rows"], figures["adapters"]) == (3, adapters)
    assert figures["copied_bytes"] > 0
