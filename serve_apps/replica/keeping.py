"""The node's cache is filled behind the engine's back: once the first step on an adapter is over.

Hashing, packing and computing want the cores until then, and others' first tokens after it; the cache is for those who
come later.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from loray.engine.pool.packed import PackedAdapter
from loray.telemetry import get_logger
from loray_kernels.memory import Recycled

_log = get_logger(__name__)

_MAX_WAIT_S = 0.25  # for an adapter that no step uses
_MAX_WAITING = 8  # adapters that are still to be kept; while there are more, loaders do it themselves
_NICENESS = 10  # a tenth of the share of a thread that computes


class Keeper:
    """One thread of low priority, one adapter after the other. A failure is logged and is no request's."""

    def __init__(self) -> None:
        self._room = threading.BoundedSemaphore(_MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-keep", initializer=_yield_the_cores)
        self._last: Future[None] | None = None

    def keep(
        self, label: str, packed: PackedAdapter, write: Callable[[], None], held: ExitStack, memory: Recycled
    ) -> None:
        """`write` it later; `held` is closed when that is done, and then memory touched for the next such load."""
        if self._room.acquire(blocking=False):
            due = time.monotonic() + _MAX_WAIT_S
            self._last = self._thread.submit(self._run_later, label, packed, write, held, memory, due)
        else:
            self._run(label, packed, write, held, memory, 0.0)

    def flush(self) -> None:
        """Wait until everything has been kept."""
        if self._last is not None:
            self._last.result()

    def _run_later(self, *args: Any) -> None:
        try:
            self._run(*args)
        finally:
            self._room.release()

    def _run(
        self,
        label: str,
        packed: PackedAdapter,
        write: Callable[[], None],
        held: ExitStack,
        memory: Recycled,
        due: float,
    ) -> None:
        try:
            with held:
                if packed.partial is not None:
                    packed.partial.wait_until_used(max(0.0, due - time.monotonic()))
                write()
        except Exception as e:  # noqa: BLE001 - whatever it is, the adapter itself is served
            _log.warning("adapter %s is here, but the node's cache has not kept it: %s", label, e)
        memory.prepare()


def _yield_the_cores() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
