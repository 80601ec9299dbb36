"""Priorities of threads."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from loray.priority import LOWEST, lower_priority


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_a_thread_lowers_its_own_priority_and_that_of_those_it_makes() -> None:
    found: list[int] = []

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def run() -> None:
        for steps in (2, 40, 1):  # the lowest priority stays
            lower_priority(steps)
            found.append(niceness())
        inner = threading.Thread(target=lambda: found.append(niceness()))
        inner.start()
        inner.join()

    before = niceness()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [min(LOWEST, before + 2), LOWEST, LOWEST, LOWEST]
    assert niceness() == before
