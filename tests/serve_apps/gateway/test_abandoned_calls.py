"""Calls that nobody reads to their end: Serve would keep them in the gateway, and count them as under way."""

from __future__ import annotations

import asyncio

import pytest

from loray.errors import Overloaded
from tests.serve_apps.channel.plane import Out
from tests.serve_apps.gateway.test_engines import Handle, Response, engines_of, raised_by, tokens


def calls_of(*script: object) -> list[bool]:
    """Whether the call, and what Serve has made of it once it was accepted, are cancelled when its reader leaves."""

    async def run() -> list[bool]:
        handle = Handle(list(script))
        async with engines_of(handle) as engines:
            task = asyncio.create_task(tokens(engines))
            await asyncio.sleep(0.01)
            (response,) = handle.responses
            accepted = Response([], response._gateway, response._stream)
            response._replica_result_future.set_result(accepted)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return [response.cancelled, accepted.cancelled]

    return asyncio.run(run())


def test_a_call_that_is_accepted_in_the_moment_in_which_its_reader_leaves() -> None:
    """Serve's own `cancel` does not see what nobody has read yet."""
    assert calls_of("wait") == [False, True]


@pytest.mark.parametrize("before", [[], [Out(1)]])
def test_a_call_that_fails_is_not_read_further(before: list[Out]) -> None:
    async def run() -> bool:
        handle = Handle([*before, raised_by(Overloaded("too many", retry_after_s=1.0))])
        async with engines_of(handle) as engines:
            with pytest.raises(Overloaded):
                await tokens(engines)
            return handle.responses[0].cancelled

    assert asyncio.run(run())
