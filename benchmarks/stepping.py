"""An engine that its caller steps, without a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from loray.engine.engine import Engine
from loray.engine.request import TokenOutput


def finish(engine: Engine) -> Iterator[TokenOutput]:
    """Step `engine` until it has no work, and yield its outputs. A request's error is raised.

    While all requests wait for their adapters, the caller's thread sleeps until a load has finished.
    """
    loaded = threading.Event()
    engine.wake = loaded.set
    while engine.has_work:
        loaded.clear()
        for output in engine.step():
            if output.error is not None:
                raise output.error
            yield output
        if engine.idle:
            loaded.wait()
