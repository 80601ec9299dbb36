"""Tokens between nodes with TLS: what goes over the network, and who is refused."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from loray.encryption import client_context, server_context
from loray.spec import TokenLogprobs
from serve_apps.channel.connection import Connection, connect
from serve_apps.channel.frames import HELLO, ChannelAddress, frame, pack, parts
from serve_apps.channel.listener import Listener
from tests.fixtures.authority import Authority
from tests.serve_apps.channel.plane import ENCRYPTED, LOOPS, NODE, Out, contexts, everything, go, plane, until

OTHER_NODE = "another"


@asynccontextmanager
async def recorded(address: ChannelAddress, recording: bytearray) -> AsyncIterator[ChannelAddress]:
    """Stands between a replica and the gateway at `address`, and records every byte of both directions."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            recording.extend(data)
            writer.write(data)
        writer.close()

    writers: list[asyncio.StreamWriter] = []
    connections: list[asyncio.Task[None] | None] = []

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        from_gateway, to_gateway = await asyncio.open_connection(address.host, address.port)
        writers.extend((writer, to_gateway))
        with suppress(ConnectionError):
            await asyncio.gather(pump(reader, to_gateway), pump(from_gateway, writer))

    server = await asyncio.start_server(between, "127.0.0.1", 0)
    try:
        yield replace(address, port=server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*filter(None, connections))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("node", [OTHER_NODE, ENCRYPTED])
def test_who_listens_between_nodes_reads_nothing_with_tls_and_everything_without(node: str, loop: str) -> None:
    score = TokenLogprobs(-0.5, ((70_001, -0.5), (70_002, -1.0)), 1)
    step = Out(70_003, None, 5, score)
    prompt = Out(70_004, "stop", 5, None, (score, score))
    recording = bytearray()
    said: dict[str, bytes] = {}

    async def test() -> None:
        async with plane(node=node) as (gateway, replica), recorded(gateway.address, recording) as address:
            answered, scored = gateway.open(), gateway.open()
            to = await replica.to(address)
            to.send([(answered.stream, step)])
            to.send([(answered.stream, Out(70_005, "stop")), (scored.stream, prompt)])
            assert await everything(answered) == [70_003, 70_005]
            assert await everything(scored) == [70_004]
            said["token"] = address.token.encode()
            said["name"] = frame(HELLO, "replica#0")
            said["answer"] = pack([(answered.stream, step)])
            said["its end"] = pack([(answered.stream, Out(70_005, "stop"))])
            said["prompt"] = b"".join(parts(scored.stream, prompt))
            for inbox in (answered, scored):
                gateway.forget(inbox, "abort")

    go(test, loop)
    assert len(recording) > sum(map(len, said.values()))
    assert {name for name, data in said.items() if data in recording} == (set() if node == ENCRYPTED else set(said))


async def attempt(server: ssl.SSLContext | None, client: ssl.SSLContext | None) -> Connection | OSError:
    """What a replica on another node gets of a gateway."""
    gateway = Listener()
    await gateway.start(NODE, "127.0.0.1", server)
    try:
        connection = await connect(gateway.address, OTHER_NODE, "replica#0", tls=client)
        connection.close()
    except OSError as e:
        assert not gateway.replicas()
        return e
    finally:
        await until(lambda: not gateway._all)
        await gateway.close()
    return connection


@pytest.mark.parametrize("loop", LOOPS)
def test_who_is_refused(loop: str, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    own = ours.node("127.0.0.1")
    mixed = theirs.node("127.0.0.1") | {"RAY_TLS_CA_CERT": own["RAY_TLS_CA_CERT"]}  # it trusts us, and we not it
    nameless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nameless.load_verify_locations(own["RAY_TLS_CA_CERT"])
    old = client_context(own)
    assert old is not None
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    elsewhere = ours.node("127.0.0.9")  # a node that passes itself off as the gateway's

    async def test() -> None:
        assert isinstance(await attempt(server_context(own), client_context(own)), Connection)
        for server, client in (
            (server_context(own), client_context(theirs.node("127.0.0.1"))),
            (server_context(own), client_context(mixed)),
            (server_context(own), nameless),
            (server_context(own), old),
            (server_context(own), None),
            (None, client_context(own)),
            (server_context(mixed), client_context(own)),
            (server_context(elsewhere), client_context(own)),
        ):
            assert isinstance(await attempt(server, client), OSError)

    go(test, loop)


def test_a_node_s_own_replicas_need_no_tls() -> None:
    """A socket of the node has no network."""

    async def test() -> None:
        gateway = Listener()
        await gateway.start(NODE, "127.0.0.1", contexts()[0])
        connection = await connect(gateway.address, NODE, "replica#0", tls=contexts()[1])
        connection.close()
        await until(lambda: not gateway._all)
        await gateway.close()

    go(test)


@pytest.mark.parametrize("loop", LOOPS)
def test_bytes_that_somebody_changes_on_the_way_end_the_connection(loop: str) -> None:
    async def test() -> None:
        left: list[str] = []
        async with plane(node=ENCRYPTED) as (gateway, replica):
            to = await replica.to(gateway.address)
            to.watch(1, left.append)
            (peer,) = gateway._all
            assert peer._transport is not None
            os.write(peer._transport.get_extra_info("socket").fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
            await until(lambda: left == ["lost"])
            to.send([(1, Out(1))])  # of no use, and no error

    go(test, loop)


def test_a_step_that_cannot_be_encrypted_any_more_ends_the_connection_and_not_the_engine() -> None:
    """What has come may have ended TLS while the engine's thread sends."""

    def broken(data: bytes) -> bytes:
        raise ssl.SSLError("protocol is shutdown")

    async def test() -> None:
        left: list[str] = []
        async with plane(node=ENCRYPTED) as (gateway, replica):
            to = await replica.to(gateway.address)
            to.watch(1, left.append)
            to._writer._encrypt = broken
            to.send([(1, Out(1))])
            await until(lambda: left == ["lost"])

    go(test)
