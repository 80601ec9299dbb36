"""Keeps a gateway's shares up to date with the owner of its deployment's limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from loray.serving.quotas import IDLE_S, QuotaGate, Reply, Report
from loray.telemetry import get_logger

_log = get_logger(__name__)

SOON_S, BUSY_S = 0.01, 0.1  # between two exchanges, or IDLE_S
_TIMEOUT_S = 2.0
_RETRY_S = 1.0


class Exchange(Protocol):
    async def __call__(self, reports: Sequence[Report]) -> Reply:
        """Raises OwnerAway."""


class OwnerAway(Exception):
    pass


async def follow_owner(gate: QuotaGate, exchange: Exchange, is_limited: asyncio.Event | None = None) -> None:
    """Runs until it is cancelled. While the owner is away, the gateway goes on with its share.

    `is_limited` is set while anybody has a limit; without one there is nothing to share, and the owner is not asked. A
    gateway asks also where its own requests have none, since others may need what it holds. None: it is always so.
    """
    is_away = False
    while True:
        if is_limited is not None:
            await is_limited.wait()
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
        if gate.apply(reply, time.time()):
            await asyncio.sleep(SOON_S)
        else:
            await asyncio.sleep(BUSY_S if reports or reply.grants else IDLE_S)
