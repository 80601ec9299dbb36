"""A replica's status comes in any case, with the pool's blocks by position where the engine says them in time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from loray.errors import EngineError
from loray.spec import EngineFigures, Stretch
from serve_apps.replica import metrics
from serve_apps.replica.metrics import replica_status

LAYOUT = (Stretch("kv", 2), Stretch("free", 10))


class Stream:
    def __init__(self, answer: object) -> None:
        self._answer = answer

    def stats(self) -> EngineFigures:
        return EngineFigures(num_running=1)

    async def layout(self) -> object:
        if isinstance(self._answer, Exception):
            raise self._answer
        if self._answer is None:
            await asyncio.Event().wait()
        return self._answer


@pytest.mark.parametrize("answer", [LAYOUT, EngineError("stopped"), None], ids=["in time", "stopped", "hangs"])
def test_layouts(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    monkeypatch.setattr(metrics, "_LAYOUT_TIMEOUT_S", 0.01)
    stream: Any = Stream(answer)
    status = asyncio.run(replica_status(stream, "r1", 0.0, layout=frozenset({"r1"})))
    assert (status.num_running, status.layout) == (1, LAYOUT if answer is LAYOUT else ())
    for layout in (False, frozenset({"r2"})):
        assert asyncio.run(replica_status(stream, "r1", 0.0, layout)).layout == ()
