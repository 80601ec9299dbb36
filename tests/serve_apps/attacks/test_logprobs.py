"""Answers with very many log-probabilities do not break the connection that a replica's other streams use."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest

from loray.spec import TokenLogprobs
from serve_apps.channel import connection
from serve_apps.channel.connection import SocketWriter
from tests.fixtures.channel import LOOPS, PLACES, Out, everything, plane, until

BEST = tuple((200_000 + i, -0.25 * i) for i in range(20))
PROMPT = tuple(TokenLogprobs(-0.5, BEST, i + 1) for i in range(3_000))  # about 800 KB


@PLACES
@LOOPS
async def test_a_gateway_that_pauses_beside_sixteen_long_prompts(
    node: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "MAX_BACKLOG", 1 << 20)
    async with plane(node=node) as (gateway, replica):
        other, *attack = [gateway.open() for _ in range(17)]
        to = await replica.to(gateway.address)
        to.send([(inbox.stream, Out(1, prompt_logprobs=PROMPT)) for inbox in attack])
        for step in range(100):  # all in one turn of the loop: the gateway reads nothing meanwhile
            streams = attack[:8] if step == 50 else [] if step > 50 else attack
            reason = "length" if step == 50 else None
            to.send([(other.stream, Out(step, "length" if step == 99 else None))])
            to.send([(inbox.stream, Out(2, reason)) for inbox in streams])
        assert await everything(other) == list(range(100))
        assert to._writer.behind  # the other stream has not waited for those
        for inbox in attack[:8]:
            first = await inbox.take()
            assert first.prompt_logprobs == PROMPT
            tokens = list(first.token_ids)
            if first.finish_reason is None:
                tokens += await everything(inbox)
            assert tokens == [1, *[2] * 51]
        assert to.is_open
        for inbox in (other, *attack):
            gateway.forget(inbox, "abort")
        await until(lambda: not to._writer.behind)  # of streams that nobody reads, nothing more is sent


async def test_parts_are_packed_when_there_is_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stream has takes no memory before it is sent, and no other stream waits for more than a part of it."""
    sent: list[bytes] = []
    packed = count()

    def parts_of(stream: int) -> Iterator[bytes]:
        for _ in range(3):
            yield b"%d:%d" % (stream, next(packed) // 2)

    def send(self: SocketWriter, data: bytes) -> int:
        sent.append(bytes(data))
        return len(data)

    monkeypatch.setattr(SocketWriter, "_send", send)
    here = SocketWriter(None, asyncio.get_running_loop(), lambda _: None, bytes)  # type: ignore[arg-type]
    monkeypatch.setattr(here, "_arm", lambda: None)
    for stream in (1, 2):
        here.write_later(stream, parts_of(stream))
    assert sent == []
    here._loop.remove_writer = lambda _: True  # type: ignore[method-assign, assignment]
    for _ in range(2):
        here._flush()
    here.write(b"other")
    here.drop(2)
    while here.behind:
        here._flush()
    assert sent == [b"1:0", b"2:0", b"other", b"1:1", b"1:1"]
