"""The generator of requests: shares, arrivals, lengths, reproducibility."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.serving.workload import Workload, generate, share

OPEN = Workload(20_000, num_adapters=10, alpha=0.3, rate=4.0, cv=2.0, inputs=(1, 3), outputs=(5, 9))


def test_shares_are_those_of_the_power_law() -> None:
    assert share(0, 10, 0.3) == pytest.approx(0.1**0.3)
    assert sum(share(i, 10, 0.3) for i in range(10)) == pytest.approx(1)
    assert [share(i, 4, 1.0) for i in range(4)] == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
def test_requests_are_shared_out_by_alpha(alpha: float) -> None:
    requests = generate(replace(OPEN, alpha=alpha), 1000)
    drawn = Counter(r.adapter for r in requests)
    for i in range(10):
        expected = share(i, 10, alpha)
        tolerance = 5 * (expected * (1 - expected) / len(requests)) ** 0.5
        assert drawn[i] / len(requests) == pytest.approx(expected, abs=tolerance), i


@pytest.mark.parametrize("cv", [1.0, 2.0, 4.0])
def test_arrivals_have_the_rate_and_the_coefficient_of_variation(cv: float) -> None:
    times = [r.at for r in generate(replace(OPEN, cv=cv), 1000)]
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 4, rel=0.1)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_lengths_are_uniform_and_inclusive() -> None:
    requests = generate(OPEN, 1000)
    assert {len(r.prompt_ids) for r in requests} == {1, 2, 3}
    assert statistics.fmean(r.max_tokens for r in requests) == pytest.approx(7, abs=0.1)
    assert {r.max_tokens for r in requests} == {5, 6, 7, 8, 9}
    assert all(100 <= t < 1000 for r in requests[:1000] for t in r.prompt_ids)


def test_the_same_seed_and_pass_give_the_same_requests() -> None:
    small = replace(OPEN, num_requests=50)
    assert generate(small, 1000) == generate(small, 1000)
    assert generate(small, 1000, pass_=1) != generate(small, 1000)
    assert generate(replace(small, seed=1), 1000) != generate(small, 1000)
    # Another distribution of arrival times changes neither prompts nor adapters.
    calm = [r._replace(at=0.0) for r in generate(replace(small, cv=1.0), 1000)]
    assert calm == [r._replace(at=0.0) for r in generate(small, 1000)]


def test_round_robin_begins_with_the_first_adapter() -> None:
    loop = Workload(7, num_adapters=3, first_adapter=4, at_once=2)
    assert [r.adapter for r in generate(loop, 1000)] == [4, 5, 6, 4, 5, 6, 4]
    assert {r.adapter for r in generate(replace(loop, num_adapters=0), 1000)} == {None}
    assert {r.at for r in generate(loop, 1000)} == {0.0}


@pytest.mark.parametrize(
    "wrong", [{"rate": None}, {"at_once": 3}, {"alpha": 0.0}, {"alpha": 1.5}, {"cv": 0.0}, {"rate": -1.0}]
)
def test_impossible_workloads_are_refused(wrong: dict[str, float | None]) -> None:
    with pytest.raises(ValueError):
        replace(OPEN, **wrong)  # type: ignore[arg-type]
