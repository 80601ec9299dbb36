"""Readers of streams, of which a pass of the event loop wakes a few."""

from __future__ import annotations

import asyncio

from serve_apps.channel.inbox import Inbox
from serve_apps.channel.wakes import MOST, Wakes
from tests.serve_apps.channel.plane import go


def test_a_pass_wakes_a_few_and_those_without_a_token_before_them() -> None:
    async def test() -> None:
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

    go(test)


def test_a_reader_that_has_left_takes_no_turn() -> None:
    async def test() -> None:
        wakes = Wakes()
        loop = asyncio.get_running_loop()
        readers = [loop.create_future() for _ in range(2 * MOST + 1)]
        for reader in readers:
            wakes.wake(reader, is_first=False)
        readers[MOST].cancel()
        await asyncio.sleep(0)
        assert sum(r.done() for r in readers) == 2 * MOST + 1

    go(test)
