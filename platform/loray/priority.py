"""Priorities of threads: who waits where there are fewer processors than work."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading

LOWEST = 19
COMPUTING = 4  # steps: of engines and of training, beside what takes requests and passes on their tokens


def lower_priority(steps: int) -> None:
    """Of the calling thread, and of threads that it makes from now on. `steps`: of niceness, of which each is some 25 %
    of a processor beside a thread of the priority before.

    It is relative, since Ray's workers begin at niceness 15, and only root may raise a priority. Does nothing where
    threads have no priorities of their own.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, max(niceness, min(LOWEST, niceness + steps)))


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
