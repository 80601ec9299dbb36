"""Whether the machine is as fast as it was at the start of a run.

A virtual machine is not always: its host shares the bandwidth of its memory, and at times the time of its processors,
with others (34 or 62 GB/s, for tens of seconds at a time, on one such machine). What a pass measured meanwhile is not
comparable with the others, whatever its figure is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np

_Result = TypeVar("_Result")

_MEMORY = 64 << 20  # bytes that each thread reads: more than the caches of such processors
_VALUES = 1 << 15  # fp32 of which each thread computes exponentials: they stay in its second-level cache
_REPEATS = 400  # of these, so that the system has time to give each thread a processor of its own
_TIMES = 5
_PROBES = 9  # at the start, a second apart


class Speed(NamedTuple):
    """Of all threads together: bytes/s read from memory, and exponentials/s of fp32 from the caches."""

    memory: float
    compute: float


class Probe:
    """Measures the machine's speed, in about 60 ms. `num_threads`: as many as the systems under test compute with."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads)
        self._memory = [np.ones(_MEMORY // 8, dtype=np.int64) for _ in range(num_threads)]
        self._values = [np.linspace(-1, 1, 2 * _VALUES, dtype=np.float32).reshape(2, -1) for _ in range(num_threads)]

    def __call__(self) -> Speed:
        def read(i: int) -> None:
            self._memory[i].max()

        def compute(i: int) -> None:
            for _ in range(_REPEATS):
                np.exp(self._values[i][1], out=self._values[i][0])

        return Speed(
            self._num_threads * _MEMORY / self._seconds(read),
            self._num_threads * _REPEATS * _VALUES / self._seconds(compute),
        )

    def _seconds(self, work: Callable[[int], None]) -> float:
        """The shortest of a few times that all threads need together."""
        found = []
        for _ in range(_TIMES):
            began = time.perf_counter()
            list(self._pool.map(work, range(self._num_threads)))
            found.append(time.perf_counter() - began)
        return min(found)


class Steady:
    """Passes that count are taken while the machine has the speed that it had at the start.

    probe        measures the speed
    tolerance    by how much of the start's each part may differ
    patience_s   for how long all waits and repeated passes of a run may last together
    """

    def __init__(
        self,
        probe: Callable[[], Speed],
        *,
        tolerance: float = 0.2,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._probe, self._tolerance, self._left_s = probe, tolerance, patience_s
        self._clock, self._sleep = clock, sleep
        found = [probe()]
        while len(found) < _PROBES:
            sleep(1.0)
            found.append(probe())
        self.start = Speed(median(s.memory for s in found), median(s.compute for s in found))
        self.num_repeated = self.num_unsteady = 0

    def run(self, one_pass: Callable[[int], _Result]) -> _Result:
        """The result of `one_pass`, which is run again if the machine became faster or slower meanwhile. When there is
        no patience left, the result counts as it is. It is given the number of its runs before.
        """
        attempt = 0
        while True:
            began = self._clock()
            while not self._is_steady() and self._clock() - began < self._left_s:
                self._sleep(1.0)
            self._left_s -= self._clock() - began
            began = self._clock()
            result = one_pass(attempt)
            if self._is_steady():
                return result
            if self._left_s <= 0:
                self.num_unsteady += 1
                return result
            self._left_s -= self._clock() - began
            self.num_repeated += 1
            attempt += 1

    def describe(self) -> str:
        text = f"memory {self.start.memory / 1e9:.1f} GB/s at the start"
        if self.num_repeated:
            text += f"; {self.num_repeated} passes were repeated since the machine became faster or slower"
        if self.num_unsteady:
            text += f"; {self.num_unsteady} count although it did"
        return text

    def _is_steady(self) -> bool:
        now = self._probe()
        return all(abs(a / b - 1) <= self._tolerance for a, b in zip(now, self.start, strict=True))
