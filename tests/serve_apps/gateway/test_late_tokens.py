"""A gateway that cannot keep up notices it by when its replicas' tokens come."""

from __future__ import annotations

import asyncio
import math

import pytest

from tests.serve_apps.channel.plane import Out
from tests.serve_apps.gateway.test_engines import LAST, Handle, engines_of, tokens


def test_a_gateway_is_told_how_late_tokens_come_by_what_they_may_be() -> None:
    told: list[float] = []

    async def run() -> None:
        handle = Handle([Out(1), LAST, "return"])
        handle.broadcast = lambda *_: None  # type: ignore[attr-defined]
        async with engines_of(handle, max_token_lateness=0.5) as engines, engines.running(told.append):
            await tokens(engines)
            assert 0 < engines._shortest.value < math.inf
            engines._late(3 * engines._shortest.value)

    asyncio.run(run())
    *_, last = told
    assert last == pytest.approx(6), "half of the shortest time to a first token is allowed"
