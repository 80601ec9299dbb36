"""The thread that computes masks while the engine's prepares the next step, with llguidance."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from loray.priority import run_soon

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_GROUP_SIZE = 16  # for each of llguidance's threads


class MaskThread:
    """Used by one thread, which leaves matchers alone while their masks are computed. Nothing is made before the first.

    group_size  the most masks that are computed together
    """

    def __init__(self) -> None:
        self._num_threads = max(1, (os.cpu_count() or 1) // 2)
        self.group_size = _GROUP_SIZE * self._num_threads
        self._entered = threading.Semaphore(0)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="masks", initializer=run_soon)

    @cached_property
    def _executor(self) -> LLExecutor:
        """Made in the masks' thread, so that its threads run as soon."""
        from llguidance import LLExecutor

        return LLExecutor(self._num_threads)

    def begin(
        self, groups: Sequence[tuple[Sequence[LLMatcher], float]], words_MW: npt.NDArray[np.int32]
    ) -> Future[list[float]]:
        """Compute masks into the rows of `words_MW` (masks, words of 32 bits), group by group, until a group's limit in
        seconds has passed. The result has the seconds that each of them took: of processor time, if it has one mask.

        A group is a single call that does not need Python's lock: whatever the thread runs in Python stops the engine,
        with which the lock changes hands. It is waited for until it has come to the first call.
        """
        computing = self._thread.submit(self._compute, groups, words_MW.ctypes.data, words_MW.strides[0])
        self._entered.acquire()
        return computing

    def close(self) -> None:
        if "_thread" in self.__dict__:
            self._thread.shutdown(cancel_futures=True)

    def _compute(self, groups: Sequence[tuple[Sequence[LLMatcher], float]], address: int, size: int) -> list[float]:
        seconds, spent_s = list[float](), 0.0
        self._entered.release()
        for matchers, limit_s in groups:
            if spent_s >= limit_s:
                break
            seconds.append(self._fill(matchers, address, size))
            spent_s += seconds[-1]
            address += size * len(matchers)
        return seconds

    def _fill(self, matchers: Sequence[LLMatcher], address: int, size: int) -> float:
        """Compute the masks of one group; returns its seconds."""
        if len(matchers) == 1:  # in this thread, whose processor time no other work of the machine prolongs
            began = time.thread_time()
            matchers[0].unsafe_compute_mask_ptr(address, size)
            return time.thread_time() - began
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        began = time.perf_counter()
        self._executor.unsafe_compute_mask_ptr(rows, address, size, len(rows))
        return time.perf_counter() - began
