"""A replica that dies while it sends: whatever byte was the last, no request gets a part of a frame."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from itertools import count

import pytest

from loray.errors import ReplicaUnavailable
from loray.spec import TokenLogprobs
from serve_apps.channel import listener
from serve_apps.channel.frames import HELLO, dial, frame, pack
from serve_apps.channel.inbox import Inbox
from serve_apps.channel.listener import Listener
from tests.serve_apps.channel.plane import LOOPS, PLACES, Out, ended, go, plane, until

SCORE = TokenLogprobs(-0.5, ((7, -0.5), (8, -1.0)), 1)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_LOST_S", 0.0)


async def killed_after(gateway: Listener, node: str, data: bytes) -> None:
    """A replica greets, sends `data`, and dies."""
    sock = await dial(gateway.address, node)
    hello = gateway.address.token.encode() + frame(HELLO, "replica#0")
    await asyncio.get_running_loop().sock_sendall(sock, hello + data)
    sock.shutdown(socket.SHUT_WR)
    await ended(sock)
    await until(lambda: not gateway._all)


async def outcome(inbox: Inbox) -> tuple[list[int], bool]:
    """All its tokens, and whether they end with an error rather than with the last one."""
    tokens: list[int] = []
    with suppress(ReplicaUnavailable):
        async for delta in inbox:
            tokens += delta.token_ids
            assert delta.logprobs is None or len(delta.logprobs) == len(delta.token_ids)
        return tokens, False
    with pytest.raises(ReplicaUnavailable, match="lost; send it again"):
        await inbox.take()  # and nothing after it
    return tokens, True


@PLACES
@pytest.mark.parametrize("loop", LOOPS)
def test_a_frame_that_is_cut_at_any_byte_reaches_nobody(node: str, loop: str) -> None:
    """Of two steps the first has been sent. In the second, one request goes on, one ends, one has its first token, and
    one has log-probabilities, in a frame of their own.
    """
    goes_on, ends, begins, scored = 1, 2, 3, 4
    first = pack([(goes_on, Out(1)), (ends, Out(1)), (scored, Out(1, logprobs=SCORE))])
    tokens = pack([(goes_on, Out(2)), (ends, Out(2, "stop")), (begins, Out(2))])
    scores = pack([(scored, Out(2, "length", logprobs=SCORE))])

    async def run(cut: int) -> None:
        async with plane(node=node) as (gateway, _):
            gateway._ids = count(goes_on)
            inboxes = [gateway.open() for _ in range(4)]
            assert [inbox.stream for inbox in inboxes] == [goes_on, ends, begins, scored]
            await killed_after(gateway, node, first + (tokens + scores)[:cut])
            gateway.returned(inboxes[2], "replica#0")  # where no token has come, the call says that it was lost
            has_tokens, has_scores = cut >= len(tokens), cut >= len(tokens) + len(scores)
            assert [await outcome(inbox) for inbox in inboxes] == [
                ([1, 2] if has_tokens else [1], True),
                ([1, 2], False) if has_tokens else ([1], True),
                ([2] if has_tokens else [], True),
                ([1, 2], False) if has_scores else ([1], True),
            ]
            for inbox in inboxes:
                gateway.forget(inbox, "abort")

    async def test() -> None:
        for cut in range(len(tokens) + len(scores) + 1):
            await run(cut)

    go(test, loop)


@pytest.mark.parametrize("num_sent", range(64 + len(frame(HELLO, "replica#0"))))
def test_a_replica_that_dies_in_its_greeting_is_none(num_sent: int) -> None:
    async def test() -> None:
        async with plane() as (gateway, _):
            sock = await dial(gateway.address, gateway.address.node)
            greeting = gateway.address.token.encode() + frame(HELLO, "replica#0")
            await asyncio.get_running_loop().sock_sendall(sock, greeting[:num_sent])
            await until(lambda: bool(gateway._all))
            sock.close()
            await until(lambda: not gateway._all)
            assert not gateway._peers

    go(test)
