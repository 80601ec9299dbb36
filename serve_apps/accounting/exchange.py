"""Keeps a gateway's shares up to date: with the owner of a deployment's limits, or alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from loray.catalog import Catalog
from loray.errors import LorayError
from loray.serving.quotas import QuotaGate, Reply, Report, Rule
from loray.telemetry import get_logger

_log = get_logger(__name__)

BUSY_S, IDLE_S = 0.1, 0.5  # between two exchanges
_TIMEOUT_S = 2.0
_RETRY_S = 1.0


class Exchange(Protocol):
    async def __call__(self, reports: Sequence[Report]) -> Reply:
        """Raises OwnerAway."""


class OwnerAway(Exception):
    pass


class UsedBefore:
    """How many tokens of a budget the catalog's usage has in its period. Not thread-safe."""

    def __init__(self, open_catalog: Callable[[], Catalog]) -> None:
        self._open = open_catalog
        self._catalog: Catalog | None = None

    def __call__(self, rule: Rule, now: float) -> float:
        """Raises CatalogError."""
        if self._catalog is None:
            self._catalog = self._open()
        since = datetime.fromtimestamp(rule.period(now) * rule.period_s, UTC)
        if rule.owner == "key":
            return self._catalog.tokens_used(key_id=rule.subject, since=since)
        return self._catalog.tokens_used(tenant=rule.subject, since=since)

    def close(self) -> None:
        if self._catalog is not None:
            self._catalog.close()


async def follow_owner(gate: QuotaGate, exchange: Exchange, is_limited: asyncio.Event | None = None) -> None:
    """Runs until it is cancelled. While the owner is away, the gateway goes on with its share.

    `is_limited` is set while anybody has a limit; without one there is nothing to share, and the owner is not asked. A
    gateway asks also where its own requests have none, since others may need what it holds. None: it is always so.
    """
    is_away = False
    while True:
        if is_limited is not None:
            await is_limited.wait()
        gate.new_budgets.clear()  # the owner knows what was used
        reports = gate.reports(time.time())
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reply = await exchange(reports)
        except (OwnerAway, TimeoutError) as e:
            gate.not_reported(reports)
            if not is_away:
                _log.warning("limits are not shared with other gateways: %s", e or "their owner does not answer")
            is_away = True
            await asyncio.sleep(_RETRY_S)
            continue
        is_away = False
        if not gate.apply(reply, time.time()):
            await asyncio.sleep(BUSY_S if reports or reply.grants else IDLE_S)


async def follow_usage(gate: QuotaGate, used_before: UsedBefore, woken: asyncio.Event) -> None:
    """For the only gateway: budgets begin with what was used before. Runs until it is cancelled."""
    while True:
        await woken.wait()
        woken.clear()
        while gate.new_budgets:
            rule = gate.new_budgets[0]
            try:
                used = await asyncio.to_thread(used_before, rule, time.time())
            except LorayError as e:
                _log.warning("what was used of %s is not known: %s", rule.words, e)
                await asyncio.sleep(_RETRY_S)
                continue
            gate.new_budgets.pop(0)
            gate.used_before(rule, used)
