"""MFU is a share of the highest peak seen, however busy the machine was when it was first measured."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.workers.reporting import GivenPeak, MeasuredPeak, Utilisation


class Machine:
    """A clock, and samples of the peak: each takes `seconds`, and is of the next rate."""

    def __init__(self, rates: Iterable[float], seconds: float = 1.0) -> None:
        self.now, self.seconds, self.taken = 0.0, seconds, 0
        self._rates = iter(rates)

    def clock(self) -> float:
        return self.now

    def sample(self) -> float:
        self.now, self.taken = self.now + self.seconds, self.taken + 1
        return next(self._rates)

    def peak(self, *, again: bool = True) -> MeasuredPeak:
        return MeasuredPeak(self.sample, self.sample if again else None, self.clock)


def test_a_peak_that_was_measured_on_a_busy_machine_is_measured_again() -> None:
    """The machine does 100 FLOP/s, and 30 while something else runs."""
    machine = Machine([30.0, 100.0])
    use = Utilisation(flops_per_token=2.0, peak=machine.peak())
    assert use.mfu(tokens_per_s=20.0, num_workers=2) == pytest.approx(20 / 30)
    assert use.mfu(tokens_per_s=60.0, num_workers=2) == 1.0  # too soon after the first sample
    machine.now += 20
    assert use.mfu(tokens_per_s=60.0, num_workers=2) == pytest.approx(0.6)  # 60 is more than 30
    assert use.mfu(tokens_per_s=50.0, num_workers=2) == pytest.approx(0.5)
    assert machine.taken == 2


@pytest.mark.parametrize("again", [True, False])
@given(
    rates=st.lists(st.floats(1.0, 1e15), min_size=60, max_size=60),
    steps=st.lists(st.tuples(st.floats(0.1, 1e3), st.floats(1.0, 1e15)), max_size=50),
)
def test_a_share_is_never_more_than_one(again: bool, rates: list[float], steps: list[tuple[float, float]]) -> None:
    machine = Machine(rates)
    peak, before = machine.peak(again=again), 0.0
    for seconds, attained in steps:
        machine.now += seconds
        assert 0 < Utilisation(1.0, peak).mfu(attained, 1) <= 1
        assert peak.flops >= before
        before = peak.flops


def test_samples_take_little_of_a_run() -> None:
    machine = Machine([100.0] * 99, seconds=2.0)
    peak, began = machine.peak(), machine.now
    for _ in range(4000):
        machine.now += 1.0
        peak.compare(40.0)
    spent = (machine.taken - 1) * machine.seconds
    assert 0.004 < spent / (machine.now - began) <= 0.005


def test_a_given_peak_stays() -> None:
    assert Utilisation(1.0, GivenPeak(10.0)).mfu(20.0, 1) == 2.0  # which shows that the setting is wrong
