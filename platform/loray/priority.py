"""Priorities of threads: who waits where there are fewer processors than work.

Trainers on the processors of engines wait at the gate of a layer (`YieldGate`) while these compute for people: the
kernel's priorities alone would give a thread that computes in the background a part of each step.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def compute_in_background(process: int | None = None) -> None:
    """The calling thread, and threads that it makes from now on, compute: they run while nothing else of their session
    or container wants the processor, and at least for some percent of the time. So does another process of this user,
    at its start.

    Linux's SCHED_IDLE, which anybody may ask for, and which only who may raise priorities leaves again. What takes
    requests and passes on their tokens wants a processor for moments, and gets it at once. Does nothing elsewhere.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(process or threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))


_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # numbers of the system call
_SHORTEST_NS = 100_000


def run_soon() -> None:
    """The calling thread, and threads that it makes from now on, run at once when they wake up, for a tenth of a
    millisecond, although threads that compute have the processors. It gets no more of them than others.

    A short time slice of Linux's EEVDF, from 6.12 on. Does nothing elsewhere.
    """
    number = _SCHED_SETATTR.get(os.uname().machine) if sys.platform == "linux" else None
    if number is not None:
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        # sched_attr: size, policy (other), flags, nice, priority, runtime, deadline, period
        attributes = struct.pack("IIQiIQQQ", 48, 0, 0, niceness, 0, _SHORTEST_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, thread, attributes, 0)


_LONGEST_STEP_S = 1.0  # that is waited for: its engine may have been killed
_FRESH_S = 0.005  # after a step, in which the next one begins
_SHARE = 0.9  # of the time that is waited at most
_LONGEST_WAIT_S, _LOOK_S = 1.0, 0.001


class ForegroundTime:
    """Says until when engines of this machine compute for requests in the foreground: seconds of `time.monotonic`,
    which is one clock for all processes of a machine, in a file of `home` that they map. A write is a store of 8 bytes.
    """

    def __init__(self, home: Path, clock: Callable[[], float] = time.monotonic) -> None:
        home.mkdir(parents=True, exist_ok=True)
        with (home / f"foreground-{socket.gethostname()}").open("a+b") as file:
            file.truncate(8)
            self._until = memoryview(mmap.mmap(file.fileno(), 8)).cast("d")
        self._clock = clock
        self._written = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """An engine computes for the foreground. How long it will take is not said: beside who does not wait for it, it
        takes longer than any that was measured.
        """
        self._write(_LONGEST_STEP_S)
        try:
            yield
        finally:
            if self._until[0] == self._written:  # no other engine has begun a step since
                self._write(_FRESH_S)

    def is_busy(self, now: float) -> bool:
        return 0 < self._until[0] - now <= _LONGEST_STEP_S  # more: a time of before the machine's last start

    def _write(self, seconds: float) -> None:
        self._until[0] = self._written = self._clock() + seconds


class YieldGate:
    """Where who computes in the background waits while engines compute for the foreground, see `ForegroundTime`: for at
    most a second, and for no more than 90 % of the time from the gate before.
    """

    def __init__(
        self,
        foreground: ForegroundTime,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._foreground, self._clock, self._sleep = foreground, clock, sleep
        self._left_at = clock()

    def wait(self) -> None:
        now = self._clock()
        until = now + min(_LONGEST_WAIT_S, _SHARE / (1 - _SHARE) * (now - self._left_at))
        while now < until and self._foreground.is_busy(now):
            self._sleep(min(_LOOK_S, until - now))
            now = self._clock()
        self._left_at = now
