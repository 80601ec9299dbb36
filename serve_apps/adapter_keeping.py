"""The node's cache is filled behind the engine's back: once the first step on an adapter is over.

Hashing, packing and computing want the cores until then; the cache is for those who come later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from loray.engine.packed import PackedAdapter
from loray.telemetry import get_logger
from loray_kernels.memory import Recycled

_log = get_logger(__name__)

_MAX_WAIT_S = 0.25  # for an adapter that no step uses
_MAX_WAITING = 16  # adapters that are still to be kept; loaders wait while there are more


class Keeper:
    """One thread, one adapter after the other. A failure is logged and is no request's."""

    def __init__(self) -> None:
        self._room = threading.BoundedSemaphore(_MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-keep")
        self._last: Future[None] | None = None

    def keep(
        self, label: str, packed: PackedAdapter, write: Callable[[], None], held: ExitStack, memory: Recycled
    ) -> None:
        """`write` it later; `held` is closed when that is done, and then memory touched for the next such load."""
        self._room.acquire()
        self._last = self._thread.submit(self._run, label, packed, write, held, memory, time.monotonic() + _MAX_WAIT_S)

    def flush(self) -> None:
        """Wait until everything has been kept."""
        if self._last is not None:
            self._last.result()

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
                if packed.arrival is not None:
                    packed.arrival.wait_until_used(max(0.0, due - time.monotonic()))
                write()
        except Exception as e:  # noqa: BLE001 - whatever it is, the adapter itself is served
            _log.warning("adapter %s is here, but the node's cache has not kept it: %s", label, e)
        finally:
            self._room.release()
        memory.prepare()
