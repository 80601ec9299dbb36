"""Figures of the benchmark of Tinker's protocol."""

from __future__ import annotations

from benchmarks.serving.tinker import summary


def test_figures_of_a_run() -> None:
    seconds = [[0.1, 0.2]] * 8
    told = {
        "sdk": "0.38.0",
        "ranks": [8] * 8,
        "num_tokens": 32,
        "mixed": {"losses": [[3.0, 2.0]] * 8, "seconds": seconds, "steps_per_s": 8.0},
        "one at a time": {"losses": [], "seconds": [], "steps_per_s": 2.0},
        "alone": [4.0, 3.0, 2.25],
        "pass_s": [0.05, 0.03, 0.04],
        "first_token_s": [0.01, 0.03],
        "publish_to_first_token_s": [0.1, 0.3],
    }
    found = summary(told, [0.02, 0.04, 0.02])
    assert found["times_faster"] == 4
    assert found["loss_difference_to_a_lone_client"] == 0.25
    assert abs(found["overhead_of_a_pass_s"] - 0.01) < 1e-9
    assert abs(found["longest_wait_of_median"] - 0.2 / 0.15) < 1e-9
    assert abs(found["publish_to_first_token_s"]["p50"] - 0.2) < 1e-9
