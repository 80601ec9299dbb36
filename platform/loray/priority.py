"""Priorities of threads: who waits where there are fewer processors than work."""

from __future__ import annotations

import os
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
