"""Requests: read from traces, scaled to a rate, made by a generator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loray.errors import DataError
from loray.simulation import workload
from loray.simulation.workload import at_rate, read, with_adapters
from tests.fixtures.simulation import requests


def test_a_trace_is_scaled_to_a_rate_and_keeps_its_lengths() -> None:
    trace = requests(*((float(i), 10 + i, 5, 0) for i in range(100)))
    rng = np.random.default_rng(0)
    for rate in (0.2, 1.0, 20.0):
        made = at_rate(trace, rate=rate, seconds=250.0, rng=rng)
        assert len(made) == pytest.approx(250 * rate, rel=0.2)
        assert (np.diff(made.at_R) >= 0).all()
        assert made.at_R[-1] < 250
        assert set(made.prompt_R) <= set(trace.prompt_R)


def test_adapters_follow_a_power_law() -> None:
    trace = requests(*((float(i), 1, 1, 0) for i in range(20_000)))
    counts = np.bincount(with_adapters(trace, 100, 1.0, np.random.default_rng(0)).adapter_R, minlength=100)
    shares = counts / counts.sum()
    assert shares[0] == pytest.approx(1 / sum(1 / k for k in range(1, 101)), rel=0.05)
    assert shares[0] / shares[9] == pytest.approx(10, rel=0.2)


def test_synthetic_requests_have_bursts_and_adapters_that_come_and_go() -> None:
    made = workload.generate(rate=50.0, seconds=1200.0, num_adapters=200, alpha=0.8, seed=1)
    assert made.rate == pytest.approx(50, rel=0.2)
    per_segment = np.bincount((made.at_R / 20).astype(int))
    assert per_segment.max() > 2 * np.median(per_segment)
    early, late = (set(made.adapter_R[part]) for part in (made.at_R < 300, made.at_R > 900))
    assert early - late
    assert late - early


def test_traces_are_read_as_their_owners_publish_them(tmp_path: Path) -> None:
    azure, mooncake, wrong = tmp_path / "azure.csv", tmp_path / "mooncake.jsonl", tmp_path / "wrong.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.4799600,3180,8\n"
    )
    mooncake.write_text('{"timestamp": 1500, "input_length": 7, "output_length": 3, "hash_ids": [1]}\n')
    wrong.write_text("a,b\n1,2\n")
    made = read(azure)
    assert made.at_R.tolist() == [0.0, pytest.approx(0.5)]
    assert made.prompt_R.tolist() == [4808, 3180]
    assert read(mooncake).output_R.tolist() == [3]
    with pytest.raises(DataError, match="ContextTokens"):
        read(wrong)


def test_requests_longer_than_the_context_are_cut() -> None:
    made = requests((0.0, 100_000, 50, 0), (1.0, 10, 100_000, 0)).cut(8192)
    assert (made.prompt_R + made.output_R <= 8192).all()
    assert made.output_R.tolist() == [50, 4096]
