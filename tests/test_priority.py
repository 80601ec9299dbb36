"""Priorities of threads."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading

import pytest

from loray.priority import LOWEST, lower_priority, run_soon


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


def slice_ns(thread: int) -> int:
    attributes = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(315, thread, attributes, 48, 0) == 0
    return int(struct.unpack("IIQiIQQQ", attributes.raw)[5])


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of the system call is another one")
def test_a_thread_that_runs_soon_has_a_short_slice_and_so_have_those_that_it_makes() -> None:
    usual = slice_ns(threading.get_native_id())
    found: list[int] = []

    def made() -> None:
        found.append(slice_ns(threading.get_native_id()))

    def soon() -> None:
        run_soon()
        made()
        child = threading.Thread(target=made)
        child.start()
        child.join()

    thread = threading.Thread(target=soon)
    thread.start()
    thread.join()
    version = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert found == [100_000 if version >= (6, 12) else usual] * 2
    assert slice_ns(threading.get_native_id()) == usual
