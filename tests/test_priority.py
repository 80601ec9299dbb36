"""Priorities of threads."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading

import pytest

from loray.priority import compute_in_background, run_soon


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_a_thread_computes_in_the_background_and_so_do_those_that_it_makes() -> None:
    found: list[int] = []

    def policy() -> int:
        return os.sched_getscheduler(threading.get_native_id())

    def run() -> None:
        compute_in_background()
        found.append(policy())
        inner = threading.Thread(target=lambda: found.append(policy()))
        inner.start()
        inner.join()

    before = policy()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [os.SCHED_IDLE] * 2
    assert policy() == before


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
