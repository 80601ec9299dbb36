"""A gateway that cannot keep up notices it by when its replicas' tokens come."""

from __future__ import annotations

import asyncio
import math

import pytest

from tests.serve_apps.channel.plane import Out
from tests.serve_apps.gateway.test_engines import LAST, Handle, engines_of, tokens


def test_a_gateway_is_told_how_late_tokens_come_by_the_shortest_time_to_a_first_one() -> None:
    told: list[float] = []

    async def run() -> None:
        handle = Handle([Out(1), LAST, "return"], [Out(1), LAST, "return"])
        handle.broadcast = lambda *_: None  # type: ignore[attr-defined]
        async with engines_of(handle) as engines, engines.running(told.append):
            await tokens(engines)
            assert 0 < engines._shortest.value < math.inf
            engines._late(3 * engines._shortest.value)

    asyncio.run(run())
    *_, last = told
    assert last == pytest.approx(3)
