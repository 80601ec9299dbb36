"""Who connects without being a replica, or sends what no replica sends."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest

from loray.errors import ReplicaUnavailable
from loray.spec import TokenDelta, TokenLogprobs
from serve_apps.channel import connection, listener
from serve_apps.channel.connection import Connections
from serve_apps.channel.frames import END, HELLO, REPORT, TOKENS, abstract, dial, frame
from tests.serve_apps.channel.plane import NODE, PLACES, Out, ended, everything, go, plane, until


def test_without_the_token_nothing_is_read() -> None:
    async def test() -> None:
        async with plane() as (gateway, _):
            inbox = gateway.open()
            thief = Connections(NODE, "thief")
            wrong = replace(gateway.address, token="0" * 64)
            with pytest.raises(ConnectionError):
                await thief.to(wrong)
            sock = await dial(wrong, NODE)
            hello = frame(HELLO, "thief#0") + frame(TOKENS, [(inbox.stream, 1, "stop", 0)])
            await asyncio.get_running_loop().sock_sendall(sock, b"0" * 64 + hello)
            await ended(sock)
            assert not inbox.has_ended
            gateway.forget(inbox, "abort")

    go(test)


@PLACES
def test_a_streams_tokens_are_taken_from_one_connection(node: str) -> None:
    async def test() -> None:
        async with plane(node=node) as (gateway, replica):
            inbox, own, last = (gateway.open() for _ in range(3))
            left: list[str] = []
            to, another = await replica.to(gateway.address), Connections(node, "another")
            other = await another.to(gateway.address)
            other.watch(inbox.stream, left.append)
            to.send([(inbox.stream, Out(1))])
            assert (await inbox.take()).token_ids == (1,)
            foreign = Out(7, "stop", prompt_logprobs=(TokenLogprobs(-0.5, (), 1),))
            other.send([(inbox.stream, foreign), (inbox.stream, Out(8)), (own.stream, Out(2, "stop"))])
            gateway.returned(inbox, other.name)
            assert await everything(own) == [2]
            await until(lambda: not other._writer.behind)
            other.send([(last.stream, Out(4, "stop"))])
            assert await everything(last) == [4]  # so all that came before it has been read
            to.send([(inbox.stream, Out(3, "stop"))])
            assert await inbox.take() == TokenDelta((3,), "stop")
            await until(lambda: left == ["abort"])  # nobody wants what it generates
            assert other.is_open
            for each in (inbox, own, last):
                gateway.forget(each, "abort")
            another.close()

    go(test)


def test_a_lost_connections_stream_is_taken_from_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_LOST_S", 0.0)

    async def test() -> None:
        async with plane() as (gateway, replica):
            inbox, own = gateway.open(), gateway.open()
            to, another = await replica.to(gateway.address), Connections(NODE, "another")
            other = await another.to(gateway.address)
            to.send([(inbox.stream, Out(1))])
            assert (await inbox.take()).token_ids == (1,)
            to.close()
            await until(lambda: len(gateway._all) == 1)
            other.send([(inbox.stream, Out(7, "stop")), (own.stream, Out(2, "stop"))])
            assert await everything(own) == [2]
            with pytest.raises(ReplicaUnavailable, match="lost"):
                await inbox.take()
            for each in (inbox, own):
                gateway.forget(each, "abort")
            another.close()

    go(test)


def test_a_stream_is_known_to_whom_it_was_given_alone() -> None:
    async def test() -> None:
        async with plane() as (gateway, _):
            first, second = gateway.open(), gateway.open()
            assert abs(first.stream - second.stream) > 1 << 20  # a replica that has one does not find the other
            for each in (first, second):
                gateway.forget(each, "abort")

    go(test)


@PLACES
@pytest.mark.parametrize(
    "sent",
    [
        b"\xff\xff\xff\xff",
        frame(TOKENS, [(1, 1, None, 0)]),  # before it has said who it is
        frame(HELLO, 7),
        frame(HELLO, "r#0") + frame(TOKENS, 5),
        frame(HELLO, "r#0") + frame(TOKENS, [(1, 2)]),
        frame(HELLO, "r#0") + frame(END, 1, "stop"),
        frame(HELLO, "r#0") + frame(99),
        frame(HELLO, "r#0") + frame(REPORT, "s", "0", True, b"", b"", b""),
        frame(HELLO, "r#0") + frame(REPORT, "s", 0, True, b"", b"", bytes(7)),
        frame(HELLO, "r#0") + frame(REPORT, "s", 0, True, b"", ""),
        frame(HELLO, "r#0") + b"\x05\x00\x00\x00garbage",
    ],
)
def test_garbage_ends_its_connection_and_no_other(sent: bytes, node: str) -> None:
    async def test() -> None:
        async with plane(node=node) as (gateway, replica):
            loop = asyncio.get_running_loop()
            inbox = gateway.open()
            to = await replica.to(gateway.address)
            sock = await dial(gateway.address, node)
            await loop.sock_sendall(sock, gateway.address.token.encode() + sent)
            await ended(sock)
            to.send([(inbox.stream, Out(1, "stop"))])
            assert await everything(inbox) == [1]
            gateway.forget(inbox, "abort")

    go(test)


def test_garbage_from_a_gateway_ends_its_connection() -> None:
    async def test() -> None:
        async with plane() as (gateway, replica):
            left: list[str] = []
            to = await replica.to(gateway.address)
            to.watch(1, left.append)
            (peer,) = gateway._all
            peer.write(frame(TOKENS, []))
            await until(lambda: left == ["lost"])

    go(test)


def test_who_connects_and_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_HANDSHAKE_S", 0.0)

    async def test() -> None:
        async with plane(node="another") as (gateway, _):
            sock = await dial(gateway.address, "another")
            await ended(sock)

    go(test)


def test_strangers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_MAX_STRANGERS", 2)

    async def test() -> None:
        async with plane(node="another") as (gateway, replica):
            strangers = [await dial(gateway.address, "another") for _ in range(5)]
            await until(lambda: len(gateway._all) == 2)
            for sock in strangers:
                sock.close()
            await until(lambda: not gateway._all)
            assert (await replica.to(gateway.address)).is_open

    go(test)


def test_a_gateway_that_takes_the_connection_and_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HANDSHAKE_S", 0.05)

    async def test() -> None:
        async with plane() as (gateway, replica):
            with socket.socket(socket.AF_UNIX) as silent:
                silent.bind(abstract("loray-test-silent"))
                silent.listen()
                with pytest.raises(TimeoutError):
                    await replica.to(replace(gateway.address, name="loray-test-silent"))

    go(test)


def test_the_token_is_not_shown() -> None:
    async def test() -> None:
        async with plane() as (gateway, _):
            assert gateway.address.token not in repr(gateway.address)
            assert len(gateway.address.token) == 64

    go(test)
