"""Priorities of threads: who waits where there are fewer processors than work."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading


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
