"""Priorities of threads."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from loray.priority import ForegroundTime, YieldGate, run_soon
from tests.conftest import compute_in_background


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


class Clock:
    """Time passes where somebody sleeps or computes."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_another_map_of_the_file_sees_until_when_an_engine_computes(tmp_path: Path) -> None:
    clock = Clock()
    engine, other, read = (ForegroundTime(tmp_path / "new", clock) for _ in range(3))
    assert not read.is_busy(clock())
    with engine.step():
        assert [read.is_busy(clock() + s) for s in (0, 0.5, 0.99, 1.1)] == [True, True, True, False], "it was killed"
        assert not read.is_busy(clock() - 2), "of before the last start"
        clock.pass_by(0.3)
    assert [read.is_busy(clock() + s) for s in (0, 0.004, 0.006)] == [True, True, False]
    first, second = ExitStack(), ExitStack()
    first.enter_context(engine.step())
    clock.pass_by(0.1)
    second.enter_context(other.step())
    first.close()
    assert read.is_busy(clock() + 0.9)
    second.close()
    assert not read.is_busy(clock() + 0.006)


def test_the_gate_is_left_when_the_step_has_ended(tmp_path: Path) -> None:
    clock = Clock()
    foreground = ForegroundTime(tmp_path, clock)
    ends_at = clock() + 0.04
    with ExitStack() as step:

        def sleep(seconds: float) -> None:
            clock.pass_by(seconds)
            if clock() >= ends_at:
                step.close()

        yields = YieldGate(foreground, clock, sleep)
        clock.pass_by(0.01)
        began = clock()
        yields.wait()
        assert clock() == began
        step.enter_context(foreground.step())
        clock.pass_by(0.01)
        yields.wait()
    assert clock() - ends_at == pytest.approx(0.005, abs=0.0021)


@pytest.mark.parametrize("layer_s", [0.002, 0.05, 3.0])
def test_beside_an_engine_that_always_computes_a_tenth_of_the_time_is_left(tmp_path: Path, layer_s: float) -> None:
    clock = Clock()
    foreground = ForegroundTime(tmp_path, clock)

    def sleep(seconds: float) -> None:
        clock.pass_by(seconds)
        with foreground.step():
            pass

    yields = YieldGate(foreground, clock, sleep)
    began = clock()
    for _ in range(20):
        clock.pass_by(layer_s)
        with foreground.step():
            pass
        yields.wait()
    waited = clock() - began - 20 * layer_s
    assert waited == pytest.approx(20 * min(9 * layer_s, 1.0))
