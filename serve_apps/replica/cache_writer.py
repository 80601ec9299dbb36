"""Writes adapters into the node's cache in the background, after the first step on an adapter.

Until then hashing, packing and computing need the cores; the cache only helps later loads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from loray.engine.pool.packed import PackedAdapter
from loray.priority import compute_in_background
from loray.telemetry import get_logger
from loray_kernels.memory import Recycled

_log = get_logger(__name__)

_MAX_WAIT_S = 0.25  # for the first step on an adapter
_MAX_WAITING = 8  # adapters that wait to be written; a loader that has one more writes it itself


class CacheWriter:
    """One thread in the background that writes one adapter at a time. A failure is logged and affects no request."""

    def __init__(self) -> None:
        self._free_slots = threading.BoundedSemaphore(_MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-cache", initializer=compute_in_background)
        self._last: Future[None] | None = None

    def submit(
        self, label: str, packed: PackedAdapter, write: Callable[[], None], held: ExitStack, memory: Recycled
    ) -> None:
        """Schedules `write`. After it, `held` is closed and `memory` is prepared for the next load.

        If too many adapters wait already, `write` is called at once.
        """
        if self._free_slots.acquire(blocking=False):
            due = time.monotonic() + _MAX_WAIT_S
            self._last = self._thread.submit(self._run_and_release, label, packed, write, held, memory, due)
        else:
            self._run(label, packed, write, held, memory, 0.0)

    def flush(self) -> None:
        """Waits until everything has been written."""
        if self._last is not None:
            self._last.result()

    def _run_and_release(self, *args: Any) -> None:
        try:
            self._run(*args)
        finally:
            self._free_slots.release()

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
        except Exception as e:  # noqa: BLE001 - the adapter is served nevertheless
            _log.warning("adapter %s is here, but the node's cache has not kept it: %s", label, e)
        memory.prepare()
