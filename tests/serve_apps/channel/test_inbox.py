"""An inbox: a slow reader gets fewer deltas and the same tokens."""

from __future__ import annotations

import asyncio

import pytest

from loray.errors import EngineError
from loray.spec import TokenDelta, TokenLogprobs
from serve_apps.channel.inbox import Inbox
from tests.serve_apps.channel.plane import go

LP = TokenLogprobs(-0.5, ((1, -0.5),), 1)


def test_what_has_arrived_is_one_delta() -> None:
    async def test() -> None:
        inbox = Inbox()
        for token in (1, 2, 3):
            inbox.push(token, None, 5)
        assert await inbox.take() == TokenDelta((1, 2, 3), None, 5)
        reader = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        inbox.push(4, None, 5)
        inbox.push(6, "stop", 5)
        assert await reader == TokenDelta((4, 6), "stop", 5)

    go(test)


def test_logprobs_stay_with_their_tokens() -> None:
    async def test() -> None:
        inbox = Inbox()
        inbox.push_prompt([LP])
        inbox.push_prompt([LP._replace(rank=2)])
        inbox.push(1, None, 0, LP)
        inbox.push(2, None, 0, LP._replace(rank=3))
        assert await inbox.take() == TokenDelta((1, 2), None, 0, (LP, LP._replace(rank=3)), (LP, LP._replace(rank=2)))
        inbox.push(3, "length", 0, LP)
        assert await inbox.take() == TokenDelta((3,), "length", 0, (LP,), None)

    go(test)


def test_a_result_without_a_token() -> None:
    async def test() -> None:
        inbox = Inbox()
        inbox.push_prompt([LP])
        inbox.push(None, "length", 2)
        assert await inbox.take() == TokenDelta((), "length", 2, None, (LP,))

    go(test)


def test_an_error_comes_after_the_tokens_and_never_after_the_last_one() -> None:
    async def test() -> None:
        inbox = Inbox()
        inbox.push(1, None, 0)
        inbox.fail(EngineError("first"))
        inbox.fail(EngineError("second"))
        assert (await inbox.take()).token_ids == (1,)
        with pytest.raises(EngineError, match="first"):
            await inbox.take()
        inbox = Inbox()
        inbox.push(1, "stop", 0)
        inbox.fail(EngineError("late"))
        inbox.push(2, None, 0)
        assert await inbox.take() == TokenDelta((1,), "stop", 0)

    go(test)
