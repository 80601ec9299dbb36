"""A listener and connections over real sockets: tokens, ends, and what goes wrong."""

from __future__ import annotations

import asyncio
import threading

import pytest

from loray.errors import ReplicaUnavailable
from loray.spec import TokenDelta, TokenLogprobs
from serve_apps.channel import connection, listener
from serve_apps.channel.connection import connect
from serve_apps.channel.listener import Listener
from tests.serve_apps.channel.plane import ENCRYPTED, LINKS, LOOPS, NODE, Out, contexts, everything, go, plane, until


@LINKS
@pytest.mark.parametrize("loop", LOOPS)
def test_one_connection_carries_all_streams(node: str, loop: str) -> None:
    """A thread sends, as the engine does."""

    async def test() -> None:
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

    go(test, loop)


@LINKS
def test_logprobs_of_a_long_prompt(node: str) -> None:
    best = tuple((i, -0.25 * i) for i in range(20))
    prompt = tuple(TokenLogprobs(-0.5 * i, best, i + 1) for i in range(20_000))

    async def test() -> None:
        async with plane(node=node) as (gateway, replica):
            inbox = gateway.open()
            to = await replica.to(gateway.address)
            to.send([(inbox.stream, Out(7, "length", 3, prompt[1], prompt))])
            assert await inbox.take() == TokenDelta((7,), "length", 3, (prompt[1],), prompt)
            gateway.forget(inbox, "abort")

    go(test)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("reason", ["stop", "abort"])
def test_a_stream_that_nobody_reads_any_more_is_ended(reason: str, loop: str) -> None:
    async def test() -> None:
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

    go(test, loop)


@LINKS
@pytest.mark.parametrize("loop", LOOPS)
def test_a_gateway_that_ends_leaves_no_work_behind(node: str, loop: str) -> None:
    async def test() -> None:
        async with plane(node=node) as (gateway, replica):
            left: list[str] = []
            to = await replica.to(gateway.address)
            for stream in (1, 2):
                to.watch(stream, left.append)
            await gateway.close()
            await until(lambda: left == ["lost", "lost"])
            to.watch(3, left.append)
            assert left == ["lost"] * 3
            to.send([(1, Out(1))])  # of no use, and no error
            with pytest.raises(OSError):
                await replica.to(gateway.address)

    go(test, loop)


def test_a_gateway_that_starts_again_is_connected_anew() -> None:
    async def test() -> None:
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

    go(test)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_broken_connection_is_replaced_and_its_streams_fail(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_LOST_S", 0.0)

    async def test() -> None:
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
            gateway.forget(inbox, "abort")
            gateway.forget(other, "abort")
            late = gateway.open()
            gateway.returned(late, to.name)  # sent over the connection that broke
            with pytest.raises(ReplicaUnavailable):
                await late.take()
            gateway.forget(late, "abort")

    go(test, loop)


@LINKS
@pytest.mark.parametrize("loop", LOOPS)
def test_the_next_connection_may_have_the_number_of_the_last_ones_socket(node: str, loop: str) -> None:
    """The loop has no turn between them."""

    async def test() -> None:
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

    go(test, loop)


@LINKS
@pytest.mark.parametrize("loop", LOOPS)
def test_the_engine_never_waits_for_a_gateway_that_does_not_read(
    node: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not take is kept up to a bound; then the connection ends, and with it all its requests."""
    monkeypatch.setattr(connection, "MAX_BACKLOG", 1 << 20)

    async def test() -> None:
        async with plane(node=node) as (gateway, replica):
            left: list[str] = []
            to = await replica.to(gateway.address)
            to.watch(1, left.append)
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

    go(test, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_slow_gateway_has_not_taken_follows_in_order(loop: str) -> None:
    async def test() -> None:
        async with plane() as (gateway, replica):
            inbox = gateway.open()
            to = await replica.to(gateway.address)
            num = 20_000
            for i in range(num):
                to.send([(inbox.stream, Out(i, "length" if i == num - 1 else None))])
            assert to._writer._num_behind > 0
            assert await everything(inbox) == list(range(num))
            assert to._writer._num_behind == 0
            gateway.forget(inbox, "abort")

    go(test, loop)
