"""Model FLOPs utilisation (MFU): the model's FLOP/s divided by the devices' peak, which is given or measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

_SAMPLING_SHARE = 0.005  # of a run's time


class Peak(Protocol):
    """Of one worker's device. `source`: "measured" with matrix products, or the "setting" LORAY_PEAK_TFLOPS."""

    @property
    def source(self) -> str: ...

    @property
    def flops(self) -> float:
        """FLOP/s, as far as is known now."""
        ...

    def compare(self, attained: float) -> float:
        """The peak in FLOP/s that a step which attained so many is compared with. Called between steps."""
        ...


class GivenPeak(NamedTuple):
    flops: float
    source: str = "setting"

    def compare(self, attained: float) -> float:
        return self.flops


class MeasuredPeak:
    """The most that was measured so far.

    What else runs on the machine makes a sample too low and never too high, so the peak only rises, by further samples.
    One is due as soon as all of them together take `_SAMPLING_SHARE` of the time, and ten times as often while steps
    attain more than the peak. Such a step is its own peak and no other's: the operations of short rows are
    overestimated.
    """

    source = "measured"

    def __init__(
        self,
        first: Callable[[], float],
        again: Callable[[], float] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first` measures before training and `again` between steps, in FLOP/s. `again` None: it stays."""
        self._again, self._clock = again, clock
        self._began = clock()
        self.flops = first()
        self._cost = clock() - self._began  # of one sample, in seconds
        self._spent = 0.0

    def compare(self, attained: float) -> float:
        share = _SAMPLING_SHARE * (10 if attained > self.flops else 1)
        if self._again is not None and self._is_due(share):
            before = self._clock()
            self.flops = max(self.flops, self._again())
            self._cost = self._clock() - before
            self._spent += self._cost
        return max(self.flops, attained)

    def _is_due(self, share: float) -> bool:
        return self._spent + self._cost <= share * (self._clock() - self._began)


class Utilisation(NamedTuple):
    """`flops_per_token` is of forward and backward pass, without recomputation."""

    flops_per_token: float
    peak: Peak

    def mfu(self, tokens_per_s: float, num_workers: int) -> float:
        """Of a step that was just taken. At most 1 where the peak is measured."""
        attained = tokens_per_s * self.flops_per_token / num_workers
        return attained / self.peak.compare(attained)
