"""An inbox: a slow reader gets fewer deltas and the same tokens; and how many readers a pass of the loop wakes."""

from __future__ import annotations

import asyncio

import pytest

from loray.errors import EngineError
from loray.spec import TokenDelta, TokenLogprobs
from serve_apps.channel.inbox import MOST, Inbox, Wakes

LP = TokenLogprobs(-0.5, ((1, -0.5),), 1)


async def test_what_has_arrived_is_one_delta() -> None:
    inbox = Inbox()
    for token in (1, 2, 3):
        inbox.push(token, None, 5)
    assert await inbox.take() == TokenDelta((1, 2, 3), None, 5)
    reader = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.push(4, None, 5)
    inbox.push(6, "stop", 5)
    assert await reader == TokenDelta((4, 6), "stop", 5)


async def test_logprobs_stay_with_their_tokens() -> None:
    inbox = Inbox()
    inbox.push_prompt([LP])
    inbox.push_prompt([LP._replace(rank=2)])
    inbox.push(1, None, 0, LP)
    inbox.push(2, None, 0, LP._replace(rank=3))
    assert await inbox.take() == TokenDelta((1, 2), None, 0, (LP, LP._replace(rank=3)), (LP, LP._replace(rank=2)))
    inbox.push(3, "length", 0, LP)
    assert await inbox.take() == TokenDelta((3,), "length", 0, (LP,), None)
    inbox = Inbox()
    inbox.push_prompt([LP])
    inbox.push(None, "length", 2)  # without a token
    assert await inbox.take() == TokenDelta((), "length", 2, None, (LP,))


async def test_an_error_comes_after_the_tokens_and_never_after_the_last_one() -> None:
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


async def test_a_pass_wakes_a_few_and_those_without_a_token_before_them() -> None:
    wakes, woken = Wakes(), list[int]()
    inboxes = [Inbox(stream, wakes) for stream in range(3 * MOST)]

    async def read(inbox: Inbox) -> None:
        await inbox.take()
        tokens = (await inbox.take()).token_ids
        woken.extend([inbox.stream] * len(tokens))

    readers = [asyncio.create_task(read(inbox)) for inbox in inboxes]
    await asyncio.sleep(0)
    for inbox in inboxes:
        inbox.push(0, None, 0)  # first tokens
    await asyncio.sleep(0)
    for inbox in inboxes:
        inbox.push(1, None, 0)
    late = Inbox(99, wakes)
    reader = asyncio.create_task(late.take())
    await asyncio.sleep(0)
    assert woken == list(range(MOST))
    late.push(0, None, 0)
    inboxes[-1].push(2, None, 0)  # while it waits for its turn: in the same delta
    await asyncio.sleep(0)
    assert reader.done(), "a first token waits for nobody"
    while not all(r.done() for r in readers):
        before = len(woken)
        await asyncio.sleep(0)
        assert len(woken) - before <= MOST + 1
    assert woken == [*range(3 * MOST), 3 * MOST - 1]


async def test_a_reader_that_has_left_takes_no_turn() -> None:
    wakes = Wakes()
    loop = asyncio.get_running_loop()
    readers = [loop.create_future() for _ in range(2 * MOST + 1)]
    for reader in readers:
        wakes.wake(reader, is_first=False)
    readers[MOST].cancel()
    await asyncio.sleep(0)
    assert sum(r.done() for r in readers) == 2 * MOST + 1
