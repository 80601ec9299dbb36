"""Garbage collection beside what is large and stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_num_paused = 0


@contextmanager
def collection_paused() -> Iterator[None]:
    """While the block makes many objects, no collection looks through all of them again and again, which would hold the
    interpreter, and with it the event loop, for a tenth of a second and more each time.
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
    """No collection looks through the objects that there are now. Those that nobody refers to any more are freed as
    before, unless they refer to each other.
    """
    gc.freeze()


def freeze_garbage() -> None:
    """The same at the end of a start, when nothing waits: what refers to each other and is not needed goes first.

    Otherwise collections would take long in torch and transformers.
    """
    gc.collect()
    exempt_all()
