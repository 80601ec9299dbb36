"""The host's time for a step without a GPU: what the figures count, and that a step is the product's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving.host.__main__ import main

SMALL = ["--layers", "2", "--heads", "4", "--kv-heads", "2", "--rows", "3", "--steps", "3", "--context", "20"]


@pytest.mark.parametrize(("adapters", "method"), [(0, "lora"), (2, "lora"), (3, "lora"), (3, "mixed")])
def test_a_step_is_one_copy_and_one_replay_beside_the_sampler(adapters: int, method: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    figures = main([*SMALL, "--adapters", str(adapters), "--method", method, "--json", str(file)])
    assert json.loads(file.read_text())["host_ms"] == figures["host_ms"] > 0
    assert (figures["rows"], figures["adapters"]) == (3, adapters)
    assert figures["recorded_steps"] == 3 * 6  # sizes up to four rows, kinds; contexts are short
    assert figures["launches"] == 2  # the replay and the sampler
    assert figures["replayed_kernels"] >= 2 * 9  # of two layers
    assert figures["copies"] == 1
    words = 4 * (8 if method == "lora" else 13)  # of a step that is padded to four rows
    assert figures["copied_bytes"] == 8 * words
    assert figures["reads"] == 1  # the sampler's
    assert figures["python_calls"] > 0 < figures["python_peak_bytes"]
