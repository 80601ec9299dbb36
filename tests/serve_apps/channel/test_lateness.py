"""How late what a replica sends arrives."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from serve_apps.channel import connection, listener
from serve_apps.channel.listener import Lateness, RecentLeast
from tests.fixtures.channel import LOOPS, PLACES, Out, plane


def test_late_is_what_takes_longer_than_usual_whatever_the_clocks() -> None:
    lateness = Lateness()
    found = [lateness.of(sent + 1000.0, sent + way) for sent, way in ((0.0, 0.2), (1.0, 0.1), (2.0, 0.1), (3.0, 0.5))]
    assert found == pytest.approx([0.0, 0.0, 0.0, 0.4])


def test_what_was_the_least_is_forgotten_after_two_minutes_at_the_latest() -> None:
    least = RecentLeast()
    assert least.value == math.inf
    assert least.add(1.0, 0.0) == 1.0
    assert [least.add(3.0, now) for now in (10.0, 59.0, 60.0, 119.0)] == [1.0] * 4
    assert least.add(2.0, 121.0) == 2.0
    assert least.value == 2.0


@PLACES
@LOOPS
async def test_a_gateway_hears_how_late_each_steps_tokens_come(
    monkeypatch: pytest.MonkeyPatch, loop: str, node: str
) -> None:
    late, now = list[float](), 5.0
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: 7000.0))
    monkeypatch.setattr(listener, "time", SimpleNamespace(monotonic=lambda: now))
    async with plane(node=node, late=late.append) as (gateway, replica):
        inboxes = [gateway.open() for _ in range(2)]
        to = await replica.to(gateway.address)
        for way, last in ((0.25, None), (0.125, None), (0.5, "length")):
            now = 5.0 + way
            to.send([(inbox.stream, Out(1, last)) for inbox in inboxes])  # type: ignore[arg-type]
            assert [(await inbox.take()).token_ids for inbox in inboxes] == [(1,), (1,)]
    assert late == [0.0, 0.0, 0.375]
