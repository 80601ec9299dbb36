"""Python's garbage collections, at times when they delay nobody."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Thread

_LOOK_S = 0.5  # between two looks whether a full collection is due
_DUE = 10  # collections of the younger generations since the last full one, as is Python's default
_OVERDUE = 100  # after so many it does not wait for a quiet moment any more
_NEVER = 2**31 - 1

_lock = Lock()
_num_paused = 0


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause collections while the block makes many objects: each would look through all of them again, and hold the
    interpreter, and with it the event loop, for a tenth of a second and more.
    """
    global _num_paused
    with _lock:
        _num_paused += 1
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            _num_paused -= 1
            if not _num_paused:
                gc.enable()


def exempt_all() -> None:
    """Exempt the objects that there are now from all collections. Those that nobody refers to any more are freed as
    before, unless they refer to each other.
    """
    gc.freeze()


def freeze_garbage() -> None:
    """Exempt all objects at the end of a start, when nothing waits: what only refers to each other goes first.

    Otherwise collections would take long in torch and transformers.
    """
    gc.collect()
    exempt_all()


def collect_when_quiet(is_quiet: Callable[[], bool]) -> None:
    """Do the full collections from now on in a thread of this process' priority, in moments in which nobody waits.

    Otherwise they come in the thread that happens to make an object. In a replica that is mostly the engine's, which
    runs in the background: where others use the processors, it holds the interpreter, and with it the event loop, for
    ten times as long as the collection takes. With a thousand adapters that is a tenth of a second.
    """
    youngest, young, _ = gc.get_threshold()
    gc.set_threshold(youngest, young, _NEVER)
    Thread(target=_collect_forever, args=(is_quiet,), name="garbage", daemon=True).start()


def _collect_forever(is_quiet: Callable[[], bool]) -> None:
    while True:
        time.sleep(_LOOK_S)
        _, _, num_younger = gc.get_count()
        if gc.isenabled() and (num_younger > _OVERDUE or (num_younger > _DUE and is_quiet())):
            gc.collect()
