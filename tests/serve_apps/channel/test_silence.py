"""Connections whose other side vanishes without a word: half-open, they are noticed by their silence alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from loray.errors import ReplicaUnavailable
from serve_apps.channel import frames, listener
from serve_apps.channel.frames import ChannelAddress
from tests.serve_apps.channel.plane import LOOPS, PLACES, Out, go, plane, until

PERIOD_S = 0.05
ELSEWHERE = "another"


@pytest.fixture(autouse=True)
def _short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "PERIOD_S", PERIOD_S)
    monkeypatch.setattr(listener, "_LOST_S", 0.0)


class Wire:
    """Between a replica and a gateway, as a network is. Once it is cut, both ends keep an open connection on which
    nothing comes, and whose kernel takes what they send.
    """

    def __init__(self) -> None:
        self.is_cut = False
        self.transports: list[asyncio.StreamWriter] = []

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if not self.is_cut:
                    writer.write(data)
        if not self.is_cut:
            writer.close()


@asynccontextmanager
async def wired(gateway: ChannelAddress) -> AsyncIterator[tuple[Wire, ChannelAddress]]:
    """The gateway's address for a replica behind the wire."""
    wire, tasks = Wire(), list[asyncio.Task[None]]()

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(gateway.host, gateway.port)
        wire.transports += [writer, there[1]]
        tasks.append(asyncio.create_task(wire.forward(reader, there[1])))
        tasks.append(asyncio.create_task(wire.forward(there[0], writer)))

    server = await asyncio.start_server(joined, "127.0.0.1", 0)
    try:
        yield wire, replace(gateway, port=server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await asyncio.gather(*tasks)
        for writer in wire.transports:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("is_sending", [True, False])
def test_both_ends_of_a_half_open_connection_give_it_up(loop: str, *, is_sending: bool) -> None:
    """Whether or not tokens are sent into it: the streams fail on both sides, and nothing of them is left."""

    async def test() -> None:
        async with plane(node=ELSEWHERE) as (gateway, replica), wired(gateway.address) as (wire, address):
            inbox, unseen = gateway.open(), gateway.open()
            left: list[str] = []
            to = await replica.to(address)
            for stream in (inbox.stream, unseen.stream):
                to.watch(stream, left.append)
            to.send([(inbox.stream, Out(1))])
            assert (await inbox.take()).token_ids == (1,)
            wire.is_cut = True
            while not left:
                if is_sending:
                    to.send([(inbox.stream, Out(2))])
                await asyncio.sleep(PERIOD_S / 10)
            assert left == ["lost"] * 2
            assert not to.is_open
            with pytest.raises(ReplicaUnavailable, match="lost; send it again"):
                await inbox.take()
            assert not gateway._all
            gateway.returned(unseen, to.name)  # its call, which went another way, has ended
            with pytest.raises(ReplicaUnavailable):
                await unseen.take()
            for each in (inbox, unseen):
                gateway.forget(each, "abort")

    go(test, loop)


@PLACES
def test_a_connection_without_requests_stays(node: str) -> None:
    async def test() -> None:
        async with plane(node=node) as (gateway, replica):
            to = await replica.to(gateway.address)
            await asyncio.sleep(20 * PERIOD_S)
            assert await replica.to(gateway.address) is to
            inbox = gateway.open()
            to.send([(inbox.stream, Out(1, "stop"))])
            assert (await inbox.take()).token_ids == (1,)
            gateway.forget(inbox, "abort")

    go(test)


def test_a_process_that_stood_still_keeps_its_connections() -> None:
    """It has heard nothing for long, but the silence was its own."""

    async def test() -> None:
        async with plane() as (gateway, replica):
            to = await replica.to(gateway.address)
            for _ in range(3):
                time.sleep(10 * PERIOD_S)
                await asyncio.sleep(PERIOD_S)
            assert to.is_open

    go(test)


def test_a_gateway_that_hangs_is_given_up() -> None:
    """Its kernel goes on taking what is sent, so only its own silence shows it."""

    async def test() -> None:
        async with plane() as (gateway, replica):
            left: list[str] = []
            to = await replica.to(gateway.address)
            to.watch(1, left.append)
            (peer,) = gateway._all
            assert peer._transport is not None
            assert peer._heartbeat is not None
            peer._transport.pause_reading()
            peer._heartbeat.stop()
            await until(lambda: left == ["lost"])
            assert not to.is_open
            peer._transport.resume_reading()

    go(test)
