"""The threads that run an engine's steps, one at a time.

On a CPU, steps run in the background (`loray.priority`). That is right for most of them, and wrong for a first token of
a tenant that asks for little beside others (`GenerateRequest.is_modest`): where processors are busy, its steps would
wait for them as the steps of all other engines do. While there is one, steps run in a second thread, which has the
priority of its process. There are two since a thread may give up its priority, but not take it back.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from enum import IntEnum

from loray_kernels import release_threads


class Lane(IntEnum):
    """`FIRST`: while a modest request waits for its first token. `USUAL`: all other steps."""

    USUAL = 0
    FIRST = 1


class EngineThreads:
    """Two threads that take turns, or one. May be called from any thread.

    prepare  called once in each thread, before its first turn
    turn     does what is to be done. Returns when it is to be called next although nothing comes, in seconds of
             time.monotonic(): -inf for at once, inf for never. None: no turn follows
    lanes    those that have a thread of their own. The first one does the work of one that has none
    """

    def __init__(
        self, prepare: Callable[[Lane], None], turn: Callable[[], float | None], lanes: tuple[Lane, ...]
    ) -> None:
        self._prepare, self._turn, self._lanes = prepare, turn, lanes
        lock = self._lock = threading.Lock()
        self._theirs = {lane: threading.Condition(lock) for lane in lanes}
        self._wanted = lanes[0]
        self._holder: Lane | None = None
        self._has_news, self._ended = False, False
        self._due = -math.inf
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"engine-{lane.name.lower()}", daemon=True)
            for lane in lanes
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Something has come: there is a turn after this call."""
        with self._lock:
            self._has_news = True
            self._theirs[self._wanted].notify()

    def use(self, lane: Lane) -> None:
        """From the next turn on."""
        if lane is self._wanted or lane not in self._theirs:
            return
        with self._lock:
            self._wanted = lane
            self._theirs[lane].notify()

    def stop(self) -> None:
        """After the turn that is under way there is none. Returns when the threads have ended."""
        with self._lock:
            self._end()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _run(self, lane: Lane) -> None:
        self._prepare(lane)
        while self._take(lane):
            due = self._turn()
            if due is None:
                with self._lock:
                    self._end()
                return
            self._due = due

    def _take(self, lane: Lane) -> bool:
        """Gives up the turn that this thread had, and waits for its next one. False: there is none."""
        if self._holder is lane and self._wanted is not lane:
            release_threads()  # OpenMP's: with those of the other thread there would be more than cores
        with self._lock:
            if self._holder is lane:
                self._holder = None
                if self._wanted is not lane:
                    self._theirs[self._wanted].notify()
            while not self._ended:
                seconds = self._due - time.monotonic()
                if self._holder is not None or self._wanted is not lane:
                    self._theirs[lane].wait()
                elif not self._has_news and seconds > 0:
                    self._theirs[lane].wait(None if seconds > threading.TIMEOUT_MAX else seconds)
                else:
                    self._has_news, self._holder = False, lane
                    return True
        return False

    def _end(self) -> None:
        self._ended = True
        for condition in self._theirs.values():
            condition.notify()
