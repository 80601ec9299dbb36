"""What a replica's connection tells a gateway of its adapters, and its end where the other side is silent."""

from __future__ import annotations

import asyncio
import time

import pytest

from loray.errors import ReplicaUnavailable
from loray.policy.routing import Held, RoutingReport, RoutingSeries, routing_key
from serve_apps.channel import connection, frames, listener
from serve_apps.channel.connection import Connections
from serve_apps.channel.frames import AGAIN, ALIVE, REPORT, FrameReader, pack_delta, unpack_delta
from serve_apps.channel.listener import Listener
from tests.fixtures.channel import LOOPS, NODE, PLACES, Out, linked, plane, until, wired

PERIOD_S = 0.05
DIGESTS = [f"{i:016x}" * 4 for i in range(1 << 17)]
KEYS = [routing_key(d) for d in DIGESTS]


@pytest.fixture(autouse=True)
def _short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PERIOD_S", 0.01)
    monkeypatch.setattr(frames, "PERIOD_S", PERIOD_S)
    monkeypatch.setattr(listener, "_LOST_S", 0.0)


def known(gateway: Listener) -> RoutingReport | None:
    found = gateway._reports.of("replica")
    return None if found is None else found.report


async def holds(gateway: Listener, in_pool: list[str], on_host: list[str]) -> RoutingReport:
    """Waits until the gateway knows that."""
    wanted = (frozenset(in_pool), frozenset(on_host))
    async with asyncio.timeout(60):
        while (report := known(gateway)) is None or (report.in_pool, report.on_host) != wanted:
            await asyncio.sleep(0.001)
    return report


@PLACES
@LOOPS
async def test_everything_at_first_then_what_changes_and_everything_again_if_something_was_missed(
    loop: str, node: str
) -> None:
    held = Held(DIGESTS[:3], DIGESTS[3:4])
    async with plane(node=node, held=lambda: held) as (gateway, replica):
        to = await replica.to(gateway.address)
        first = await holds(gateway, KEYS[:3], KEYS[3:4])
        held = Held(DIGESTS[1:4], DIGESTS[:1])
        second = await holds(gateway, KEYS[1:4], KEYS[:1])
        assert (second.series, second.number) == (first.series, 1)

        held = Held(DIGESTS[5:6], DIGESTS[:1])
        to._reporting._series.deltas(held)  # told, and lost on the way
        held = Held(DIGESTS[5:6])
        third = await holds(gateway, KEYS[5:6], [])
        assert (third.series, third.number) == (first.series, 4)

        to.close()
        assert gateway.replicas() == {"replica"}
        await until(lambda: not gateway.replicas())
        assert known(gateway) == third  # the router sees its age
        await replica.to(gateway.address)
        held = Held()
        assert (await holds(gateway, [], [])).series != first.series


async def test_a_hundred_thousand_adapters_are_told_in_parts() -> None:
    async with plane(held=lambda: Held(DIGESTS)) as (gateway, replica):
        await replica.to(gateway.address)
        assert (await holds(gateway, KEYS, [])).number == 3


async def test_the_last_connection_of_a_replica_counts_not_its_predecessors() -> None:
    async with plane(held=lambda: Held(DIGESTS[:1])) as (gateway, replica):
        old = await replica.to(gateway.address)
        await holds(gateway, KEYS[:1], [])
        restarted = Connections(NODE, "replica", lambda: Held(DIGESTS[1:2]))
        new = await restarted.to(gateway.address)
        report = await holds(gateway, KEYS[1:2], [])
        old._reporting.again()
        at = gateway._reports.of("replica")
        await until(lambda: gateway._reports.of("replica") != at)  # the new connection lives
        assert known(gateway) == report
        old.close()
        await until(lambda: len(gateway._all) == 1)
        assert gateway.replicas() == {"replica"}
        new.close()


async def test_a_gateway_is_told_how_many_streams_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LOAD_S", 0.001)

    def of_others(gateway: Listener) -> int | None:
        found = gateway._reports.of("replica")
        return None if found is None else found.num_of_others

    async with plane(held=lambda: Held(DIGESTS[:1])) as (gateway, replica):
        other = Listener()
        await other.start(NODE, "127.0.0.1")
        mine, theirs = await replica.to(gateway.address), await replica.to(other.address)
        for stream in range(3):
            theirs.watch(stream, lambda _: None)
        mine.watch(9, lambda _: None)
        await replica.to(gateway.address)  # as each request does
        await until(lambda: (of_others(gateway), of_others(other)) == (3, 1))
        theirs._take(AGAIN)
        await until(lambda: of_others(other) == 1)
        theirs.unwatch(0)
        await until(lambda: of_others(gateway) == 2)
        theirs.close()
        await until(lambda: of_others(gateway) == 0)
        mine.unwatch(9)
        await until(lambda: replica._timer is None)
        await until(lambda: not other._all)
        await other.close()


async def test_an_idle_replica_sends_nothing_but_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    held = Held(DIGESTS[:1000])

    class Writer(connection.SocketWriter):
        def write(self, data: bytes) -> None:
            sent.append(data)
            super().write(data)

    monkeypatch.setattr(connection, "SocketWriter", Writer)

    async def age(gateway: Listener) -> float:
        await holds(gateway, KEYS[:1000], [])
        found = gateway._reports.of("replica")
        assert found is not None
        return found.at

    async with plane(held=lambda: held) as (gateway, replica):
        await replica.to(gateway.address)
        began = await age(gateway)
        while await age(gateway) < began + 4 * PERIOD_S:
            await asyncio.sleep(connection.PERIOD_S)
    kinds = [kind for kind, *_ in FrameReader().feed(b"".join(sent))]
    assert kinds[0] == REPORT
    assert set(kinds[1:]) == {ALIVE}


def test_a_change_costs_the_same_however_many_adapters_there_are() -> None:
    def size(num_held: int) -> int:
        series = RoutingSeries("s")
        series.deltas(Held(DIGESTS[:num_held]))
        (delta,) = series.deltas(Held(DIGESTS[1:num_held], DIGESTS[:1]))
        packed = pack_delta(delta)
        ((kind, *fields),) = FrameReader().feed(packed)
        assert kind == REPORT
        assert unpack_delta(fields) == delta
        return len(packed)

    assert size(10) == size(10_000) < 32


@LOOPS
@pytest.mark.parametrize("is_sending", [True, False])
async def test_both_ends_of_a_half_open_connection_give_it_up(loop: str, *, is_sending: bool) -> None:
    """Whether or not tokens are sent into it: the streams fail on both sides, and nothing of them is left."""
    async with plane(node="another") as (gateway, replica), wired(gateway.address) as (wire, address):
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


@PLACES
async def test_a_connection_without_requests_stays(node: str) -> None:
    async with plane(node=node) as (gateway, replica):
        to = await replica.to(gateway.address)
        await asyncio.sleep(20 * PERIOD_S)
        assert await replica.to(gateway.address) is to
        inbox = gateway.open()
        to.send([(inbox.stream, Out(1, "stop"))])
        assert (await inbox.take()).token_ids == (1,)


async def test_a_process_that_stood_still_keeps_its_connections() -> None:
    """It has heard nothing for long, but the silence was its own."""
    async with linked() as (_, to, _):
        for _ in range(3):
            time.sleep(10 * PERIOD_S)
            await asyncio.sleep(PERIOD_S)
        assert to.is_open


async def test_a_gateway_that_hangs_is_given_up() -> None:
    """Its kernel goes on taking what is sent, so only its own silence shows it."""
    async with linked() as (gateway, to, left):
        (peer,) = gateway._all
        assert peer._transport is not None
        assert peer._heartbeat is not None
        peer._transport.pause_reading()
        peer._heartbeat.stop()
        await until(lambda: left == ["lost"])
        assert not to.is_open
        peer._transport.resume_reading()
