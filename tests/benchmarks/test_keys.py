"""The measurement of the key check runs, and lets right keys pass."""

from __future__ import annotations

from benchmarks.front.keys import line, measure


def test_it_measures_each_kind() -> None:
    cost = measure(40)
    assert min(cost) > 0
    assert "µs a request with a right one" in line(cost)
