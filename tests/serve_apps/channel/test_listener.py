"""A listener and connections over real sockets: tokens, ends, TLS, what goes wrong, and who is no replica."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest

from loray.encryption import client_context, server_context
from loray.errors import ReplicaUnavailable
from loray.sockets import abstract
from loray.spec import TokenDelta, TokenLogprobs
from serve_apps.channel import connection, listener
from serve_apps.channel.connection import Connection, Connections, connect
from serve_apps.channel.frames import END, HELLO, REPORT, TOKENS, dial, frame, pack, parts
from serve_apps.channel.inbox import Inbox
from serve_apps.channel.listener import Listener
from tests.fixtures.authority import Authority
from tests.fixtures.channel import (
    ENCRYPTED,
    LINKS,
    LOOPS,
    NODE,
    PLACES,
    Out,
    contexts,
    ended,
    everything,
    linked,
    plane,
    until,
    wired,
)

SCORE = TokenLogprobs(-0.5, ((7, -0.5), (8, -1.0)), 1)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_LOST_S", 0.0)


@LINKS
@LOOPS
async def test_one_connection_carries_all_streams(node: str, loop: str) -> None:
    """A thread sends, as the engine does."""
    async with plane(node=node) as (gateway, replica):
        inboxes = [gateway.open() for _ in range(32)]
        to = await replica.to(gateway.address)
        assert await replica.to(gateway.address) is to

        def steps() -> None:
            for step in range(200):
                reason = "length" if step == 199 else None
                to.send([(inbox.stream, Out(step * 100 + inbox.stream, reason)) for inbox in inboxes])

        engine = threading.Thread(target=steps)
        engine.start()
        got = await asyncio.gather(*map(everything, inboxes))
        engine.join()
        assert got == [[step * 100 + inbox.stream for step in range(200)] for inbox in inboxes]
        assert all(gateway.forget(inbox, "abort") for inbox in inboxes)


@LINKS
async def test_logprobs_of_a_long_prompt(node: str) -> None:
    best = tuple((i, -0.25 * i) for i in range(20))
    prompt = tuple(TokenLogprobs(-0.5 * i, best, i + 1) for i in range(20_000))
    async with plane(node=node) as (gateway, replica):
        inbox = gateway.open()
        to = await replica.to(gateway.address)
        to.send([(inbox.stream, Out(7, "length", 3, prompt[1], prompt))])
        assert await inbox.take() == TokenDelta((7,), "length", 3, (prompt[1],), prompt)
        inbox = gateway.open()
        to.send([(inbox.stream, Out(7, prompt_logprobs=prompt)), (inbox.stream, Out(8, "stop"))])  # one step's
        assert await everything(inbox) == [7, 8]


@LOOPS
@pytest.mark.parametrize("reason", ["stop", "abort"])
async def test_a_stream_that_nobody_reads_any_more_is_ended(reason: str, loop: str) -> None:
    async with plane() as (gateway, replica):
        inbox, unseen = gateway.open(), gateway.open()
        left: list[str] = []
        to = await replica.to(gateway.address)
        to.watch(inbox.stream, left.append)
        to.send([(inbox.stream, Out(1))])
        await inbox.take()
        assert gateway.forget(inbox, reason)
        await until(lambda: left == [reason])
        to.send([(inbox.stream, Out(2))])  # on its way when the end came
        assert not gateway.forget(unseen, reason)  # nobody knows who has it: its call is to be cancelled


@LINKS
@LOOPS
async def test_a_gateway_that_ends_leaves_no_work_behind(node: str, loop: str) -> None:
    async with plane(node=node) as (gateway, replica):
        to, left = await replica.to(gateway.address), list[str]()
        for stream in (1, 2):
            to.watch(stream, left.append)
        await gateway.close()
        await until(lambda: left == ["lost", "lost"])
        to.watch(3, left.append)
        assert left == ["lost"] * 3
        to.send([(1, Out(1))])  # of no use, and no error
        with pytest.raises(OSError):
            await replica.to(gateway.address)


async def test_a_gateway_that_starts_again_is_connected_anew() -> None:
    async with plane() as (gateway, replica):
        old = await replica.to(gateway.address)
        again = Listener()
        await again.start(NODE, "127.0.0.1")
        new = await replica.to(again.address)
        assert new is not old
        await gateway.close()
        await until(lambda: not old.is_open)
        inbox = again.open()
        new.send([(inbox.stream, Out(1, "stop"))])
        assert await everything(inbox) == [1]
        again.forget(inbox, "abort")
        assert await replica.to(again.address) is new
        await again.close()
        await until(lambda: not new.is_open)


@LOOPS
async def test_an_embedding_comes_with_the_finish_reason(loop: str) -> None:
    async with plane() as (gateway, replica):
        inbox, to = gateway.open(), await replica.to(gateway.address)
        vector = tuple(i / 4096 for i in range(4096))
        to.send([(inbox.stream, Out(None, "stop", 16, embedding=vector))])
        delta = await inbox.take()
        assert (delta.token_ids, delta.finish_reason, delta.num_cached_tokens) == ((), "stop", 16)
        assert delta.embedding == vector


@LOOPS
async def test_a_broken_connection_is_replaced_and_its_streams_fail(loop: str) -> None:
    async with plane() as (gateway, replica):
        inbox, other = gateway.open(), gateway.open()
        to = await replica.to(gateway.address)
        to.send([(inbox.stream, Out(1)), (other.stream, Out(1, "stop"))])
        assert (await inbox.take()).token_ids == (1,)
        to.close()
        with pytest.raises(ReplicaUnavailable, match="lost; send it again") as lost:
            await inbox.take()
        assert lost.value.replica == "replica"
        assert await everything(other) == [1]
        again = await replica.to(gateway.address)
        assert again is not to
        late = gateway.open()
        gateway.returned(late, to.name)  # sent over the connection that broke
        with pytest.raises(ReplicaUnavailable):
            await late.take()


@LINKS
@LOOPS
async def test_the_next_connection_may_have_the_number_of_the_last_ones_socket(node: str, loop: str) -> None:
    """The loop has no turn between them."""
    async with plane(node=node) as (gateway, _):
        tls = contexts()[1] if node == ENCRYPTED else None
        old = await connect(gateway.address, node, "replica#old", tls=tls)
        await asyncio.sleep(0)  # it reads
        number = old._sock.fileno()
        old.close()
        new = await connect(gateway.address, node, "replica#new", tls=tls)
        if loop == "asyncio":
            assert new._sock.fileno() == number
        inbox, left = gateway.open(), list[str]()
        new.watch(inbox.stream, left.append)
        new.send([(inbox.stream, Out(1))])
        assert (await inbox.take()).token_ids == (1,)
        assert gateway.forget(inbox, "stop")
        await until(lambda: left == ["stop"])
        new.close()


@LINKS
@LOOPS
async def test_the_engine_never_waits_for_a_gateway_that_does_not_read(
    node: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not take is kept up to a bound; then the connection ends, and with it all its requests."""
    monkeypatch.setattr(connection, "MAX_BACKLOG", 1 << 20)
    async with linked(node=node) as (gateway, to, left):
        (peer,) = gateway._all
        assert peer._transport is not None
        peer._transport.pause_reading()
        step = [(i, Out(i)) for i in range(1000)]
        num_behind = 0
        for _ in range(2000):
            to.send(step)  # this loop does not turn: nobody else sends what is behind
            num_behind = max(num_behind, to._writer._num_behind)
        await until(lambda: left == ["lost"])
        assert (1 << 20) < num_behind < (1 << 20) + 20_000
        assert not to.is_open
        peer._transport.resume_reading()


@LOOPS
async def test_what_a_slow_gateway_has_not_taken_follows_in_order(loop: str) -> None:
    async with plane() as (gateway, replica):
        inbox = gateway.open()
        to = await replica.to(gateway.address)
        num = 20_000
        for i in range(num):
            to.send([(inbox.stream, Out(i, "length" if i == num - 1 else None))])
        assert to._writer._num_behind > 0
        assert await everything(inbox) == list(range(num))
        assert to._writer._num_behind == 0


async def test_without_the_token_nothing_is_read() -> None:
    async with plane() as (gateway, _):
        inbox, wrong = gateway.open(), replace(gateway.address, token="0" * 64)
        with pytest.raises(ConnectionError):
            await Connections(NODE, "thief").to(wrong)
        sock = await dial(wrong, NODE)
        hello = frame(HELLO, "thief#0") + frame(TOKENS, [(inbox.stream, 1, "stop", 0)])
        await asyncio.get_running_loop().sock_sendall(sock, b"0" * 64 + hello)
        await ended(sock)
        assert not inbox.has_ended


@PLACES
async def test_a_streams_tokens_are_taken_from_one_connection(node: str) -> None:
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
        another.close()


async def test_a_lost_connections_stream_is_taken_from_no_other() -> None:
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
        another.close()


async def test_a_stream_is_known_to_whom_it_was_given_alone_and_the_token_is_not_shown() -> None:
    async with plane() as (gateway, _):
        first, second = gateway.open(), gateway.open()
        assert abs(first.stream - second.stream) > 1 << 20  # a replica that has one does not find the other
        assert gateway.address.token not in repr(gateway.address)
        assert len(gateway.address.token) == 64


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
async def test_garbage_ends_its_connection_and_no_other(sent: bytes, node: str) -> None:
    async with plane(node=node) as (gateway, replica):
        loop = asyncio.get_running_loop()
        inbox = gateway.open()
        to = await replica.to(gateway.address)
        sock = await dial(gateway.address, node)
        await loop.sock_sendall(sock, gateway.address.token.encode() + sent)
        await ended(sock)
        to.send([(inbox.stream, Out(1, "stop"))])
        assert await everything(inbox) == [1]


async def test_who_connects_and_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_HANDSHAKE_S", 0.0)
    async with plane(node="another") as (gateway, _):
        sock = await dial(gateway.address, "another")
        await ended(sock)


async def test_another_users_process_is_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it has the token: whoever is on the node finds the socket."""
    user = os.getuid()
    async with plane() as (gateway, replica):
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        with pytest.raises(ConnectionError):
            await replica.to(gateway.address)
        assert not gateway.replicas()
        monkeypatch.undo()
        assert (await replica.to(gateway.address)).is_open


async def test_strangers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_MAX_STRANGERS", 2)
    async with plane(node="another") as (gateway, replica):
        strangers = [await dial(gateway.address, "another") for _ in range(5)]
        await until(lambda: len(gateway._all) == 2)
        for sock in strangers:
            sock.close()
        await until(lambda: not gateway._all)
        assert (await replica.to(gateway.address)).is_open


async def test_a_gateway_that_takes_the_connection_and_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HANDSHAKE_S", 0.05)
    async with plane() as (gateway, replica):
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(abstract("loray-test-silent"))
            silent.listen()
            with pytest.raises(TimeoutError):
                await replica.to(replace(gateway.address, name="loray-test-silent"))


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
@LOOPS
async def test_a_frame_that_is_cut_at_any_byte_reaches_nobody(node: str, loop: str) -> None:
    """Of two steps the first has been sent. In the second, one request goes on, one ends, one has its first token, and
    one has log-probabilities, in a frame of their own.
    """
    goes_on, ends, begins, scored = 1, 2, 3, 4
    first = pack([(goes_on, Out(1)), (ends, Out(1)), (scored, Out(1, logprobs=SCORE))])
    tokens = pack([(goes_on, Out(2)), (ends, Out(2, "stop")), (begins, Out(2))])
    scores = pack([(scored, Out(2, "length", logprobs=SCORE))])

    for cut in range(len(tokens) + len(scores) + 1):
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


@pytest.mark.parametrize("num_sent", range(64 + len(frame(HELLO, "replica#0"))))
async def test_a_replica_that_dies_in_its_greeting_is_none(num_sent: int) -> None:
    async with plane() as (gateway, _):
        sock = await dial(gateway.address, gateway.address.node)
        greeting = gateway.address.token.encode() + frame(HELLO, "replica#0")
        await asyncio.get_running_loop().sock_sendall(sock, greeting[:num_sent])
        await until(lambda: bool(gateway._all))
        sock.close()
        await until(lambda: not gateway._all)
        assert not gateway._peers


@LOOPS
@pytest.mark.parametrize("node", ["another", ENCRYPTED])
async def test_who_listens_between_nodes_reads_nothing_with_tls_and_everything_without(node: str, loop: str) -> None:
    score = TokenLogprobs(-0.5, ((70_001, -0.5), (70_002, -1.0)), 1)
    step = Out(70_003, None, 5, score)
    prompt = Out(70_004, "stop", 5, None, (score, score))
    async with plane(node=node) as (gateway, replica), wired(gateway.address) as (wire, address):
        answered, scored = gateway.open(), gateway.open()
        to = await replica.to(address)
        to.send([(answered.stream, step)])
        to.send([(answered.stream, Out(70_005, "stop")), (scored.stream, prompt)])
        assert await everything(answered) == [70_003, 70_005]
        assert await everything(scored) == [70_004]
        said = {
            "token": address.token.encode(),
            "name": frame(HELLO, "replica#0"),
            "answer": pack([(answered.stream, step)]),
            "its end": pack([(answered.stream, Out(70_005, "stop"))]),
            "prompt": b"".join(parts(scored.stream, prompt)),
        }
    assert len(wire.recording) > sum(map(len, said.values()))
    read = {name for name, data in said.items() if data in wire.recording}
    assert read == (set() if node == ENCRYPTED else set(said))


async def attempt(
    server: ssl.SSLContext | None, client: ssl.SSLContext | None, node: str = "another"
) -> Connection | OSError:
    """What a replica on `node` gets of a gateway."""
    gateway = Listener()
    await gateway.start(NODE, "127.0.0.1", server)
    try:
        connection = await connect(gateway.address, node, "replica#0", tls=client)
        connection.close()
    except OSError as e:
        assert not gateway.replicas()
        return e
    finally:
        await until(lambda: not gateway._all)
        await gateway.close()
    return connection


@LOOPS
async def test_who_is_refused(loop: str, tmp_path: Path) -> None:
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


async def test_a_node_s_own_replicas_need_no_tls() -> None:
    """A socket of the node has no network."""
    assert isinstance(await attempt(*contexts(), NODE), Connection)


def says_what_no_gateway_says(gateway: Listener, to: Connection) -> None:
    (peer,) = gateway._all
    peer.write(frame(TOKENS, []))


def has_bytes_changed(gateway: Listener, to: Connection) -> None:
    (peer,) = gateway._all
    assert peer._transport is not None
    os.write(peer._transport.get_extra_info("socket").fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))


def cannot_be_encrypted(gateway: Listener, to: Connection) -> None:
    """What has come may have ended TLS while the engine's thread sends, which this does not end."""
    to._writer._encrypt = Mock(side_effect=ssl.SSLError("protocol is shutdown"))
    to.send([(1, Out(1))])


@LOOPS
@pytest.mark.parametrize("harm", [says_what_no_gateway_says, has_bytes_changed, cannot_be_encrypted])
async def test_what_ends_a_connection(loop: str, harm: Callable[[Listener, Connection], None]) -> None:
    async with linked(node=ENCRYPTED) as (gateway, to, left):
        harm(gateway, to)
        await until(lambda: left == ["lost"])
        to.send([(1, Out(1))])  # of no use, and no error
