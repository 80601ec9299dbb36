"""When a gateway asks the owner of a deployment's limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import pytest

from loray.policy.quota_owner import QuotaOwner
from loray.policy.quotas import QuotaGate, Reply, Report
from loray.spec import Limits, Principal
from serve_apps.accounting import quotas
from serve_apps.accounting.quotas import follow_owner


async def test_the_owner_is_asked_only_while_somebody_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "IDLE_S", 0.001)
    monkeypatch.setattr(quotas, "BUSY_S", 0.001)
    gate, owner, asked = QuotaGate(2), QuotaOwner(2), list[int]()

    async def ask(reports: Sequence[Report]) -> Reply:
        asked.append(len(reports))
        return owner.exchange("g1", reports, 0.0)

    async def until_asked(number: int) -> None:
        async with asyncio.timeout(30):
            while len(asked) < number:
                await asyncio.sleep(0.001)

    is_limited = asyncio.Event()
    task = asyncio.create_task(follow_owner(gate, ask, is_limited))
    await asyncio.sleep(0.05)
    assert asked == []
    gate.admit(Principal(key_id="k1", limits=Limits(rpm_limit=10)), 1, 0.0)
    is_limited.set()
    await until_asked(3)  # also without requests of its own: others may need what it holds
    assert asked[0] == 1
    is_limited.clear()
    await asyncio.sleep(0.01)  # the exchange that is under way ends
    number = len(asked)
    await asyncio.sleep(0.05)
    assert len(asked) == number
    is_limited.set()
    await until_asked(number + 1)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def test_an_owner_in_the_same_process_is_asked_again_after_a_pause() -> None:
    """What comes back while both are asked is not given back at once, again and again."""
    gate, owner, now, asked = QuotaGate(1), QuotaOwner(1), 0.0, 0
    gate.admit(Principal(key_id="k1", limits=Limits(rpm_limit=600)), 1, now)
    for _ in range(20):
        reply = owner.exchange("g", gate.reports(now), now)
        now += 0.001
        asked += gate.apply(reply, now)
    assert not asked


async def test_others_have_their_turn_between_urgent_exchanges() -> None:
    class Urgent(QuotaGate):
        def apply(self, reply: Reply, now: float) -> bool:
            return True

    asked = 0

    async def ask(reports: Sequence[Report]) -> Reply:
        nonlocal asked
        asked += 1
        return Reply("epoch", ())

    task = asyncio.create_task(follow_owner(Urgent(), ask))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert asked == 1
