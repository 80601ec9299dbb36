"""An engine's threads take turns, and who waits for a first token is served in the one of higher priority."""

from __future__ import annotations

import asyncio
import math
import os
import queue
import sys
import threading
from dataclasses import replace

import pytest

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine, EngineThreads, Lane
from tests.engine.harness import make_engine, request

WAIT_S = 30.0
IDS = (5, 9, 12, 7)


class Turns:
    """What the threads of a test do: each turn puts its thread's name into `came`, and returns what `go` gets."""

    def __init__(self, lanes: tuple[Lane, ...] = (Lane.USUAL, Lane.FIRST)) -> None:
        self.came: queue.Queue[str] = queue.Queue()
        self.go: queue.Queue[float | None] = queue.Queue()
        self.prepared: queue.Queue[Lane] = queue.Queue()
        self.num_at_once = 0
        self.threads = EngineThreads(self.prepared.put, self._turn, lanes)

    def _turn(self) -> float | None:
        self.num_at_once += 1
        assert self.num_at_once == 1
        self.came.put(threading.current_thread().name)
        due = self.go.get(timeout=WAIT_S)
        self.num_at_once -= 1
        return due

    def next(self) -> str:
        return self.came.get(timeout=WAIT_S)


@pytest.fixture
def turns() -> Turns:
    return Turns()


def test_turns_follow_at_once_and_change_threads_when_asked(turns: Turns) -> None:
    turns.threads.start()
    assert {turns.prepared.get(timeout=WAIT_S) for _ in range(2)} == {Lane.USUAL, Lane.FIRST}
    found = [turns.next()]
    for lane in (Lane.USUAL, Lane.FIRST, Lane.FIRST, Lane.USUAL):
        turns.threads.use(lane)  # while a turn is under way
        turns.go.put(-math.inf)
        found.append(turns.next())
    assert found == ["engine-usual", "engine-usual", "engine-first", "engine-first", "engine-usual"]
    turns.go.put(None)
    turns.threads.stop()
    assert not any(thread.is_alive() for thread in turns.threads._threads), "no turn follows None"


def test_what_comes_wakes_the_thread_whose_turn_it_is(turns: Turns) -> None:
    turns.threads.start()
    turns.next()
    turns.go.put(math.inf)
    turns.threads.use(Lane.FIRST)
    turns.threads.wake()
    assert turns.next() == "engine-first", "whether the first turn had ended when it came or not"
    turns.threads.wake()  # in the middle of a turn
    turns.go.put(math.inf)
    assert turns.next() == "engine-first"
    turns.go.put(0.0)  # a time that has passed
    assert turns.next() == "engine-first"
    turns.go.put(math.inf)
    turns.threads.stop()


def test_a_stop_in_a_turn_is_not_slept_through(turns: Turns) -> None:
    turns.threads.start()
    turns.next()
    stopping = threading.Thread(target=turns.threads.stop)
    stopping.start()
    while not turns.threads._ended:
        pass
    turns.go.put(math.inf)
    stopping.join(WAIT_S)
    assert not stopping.is_alive()
    assert turns.came.empty()


def test_one_thread_does_all_where_there_is_one() -> None:
    turns = Turns((Lane.USUAL,))
    turns.threads.start()
    turns.next()
    turns.threads.use(Lane.FIRST)
    turns.go.put(-math.inf)
    assert turns.next() == "engine-usual"
    turns.go.put(None)
    turns.threads.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_steps_run_in_the_background_but_for_first_tokens(base: BaseModel) -> None:
    stream, own = AsyncEngine(make_engine(base, num_threads=1)), os.sched_getscheduler(0)
    found: dict[str, int] = {}

    def policy() -> int:
        return os.sched_getscheduler(threading.get_native_id())

    async def answer(request_id: str, *, is_modest: bool) -> None:
        asked = replace(request(request_id, IDS, max_tokens=2), traceparent="00", is_modest=is_modest)
        async for _ in stream.generate(asked):
            pass

    stream.on_first_step(lambda request_id, at: found.update({request_id: policy()}))
    stream.start()
    asyncio.run(answer("usual", is_modest=False))
    assert found == {"usual": os.SCHED_IDLE}
    while own not in found.values():  # the turn that is under way when it comes may take it
        asyncio.run(answer(f"modest-{len(found)}", is_modest=True))
    assert not stream._first
    while stream.call(policy).result(WAIT_S) != os.SCHED_IDLE:
        pass  # the turn that is under way decides at its end
    stream.stop()
