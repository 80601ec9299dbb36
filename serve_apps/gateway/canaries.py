"""Canaries at one gateway, which counts what their requests were like and reports it to the catalog, which decides.

Without a request for an alias that has a canary nothing is counted, and nobody wakes.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from loray.catalog import Catalog
from loray.catalog.aliases import ReportAnswer
from loray.errors import BaseStarting, CatalogError, DeadlineExceeded
from loray.policy.canary import Arm
from loray.spec import CanaryCounts, Delta, VersionCounts
from loray.telemetry import get_logger
from serve_apps.gateway.metrics import GatewayMetrics

_log = get_logger(__name__)

REPORT_S = 2.0  # between two reports
_LAST_S = 5.0  # for the last report, when the gateway stops
_SHORTEST_S = 1e-6  # a time is counted as so much at least: its logarithm is taken


class CanaryMeter:
    """Measures one request: times of its first choice, and how it ended. Used from one event loop.

    received_at  a time of the event loop
    has_timeout  the client has chosen how long the request may take: running out of that is not the version's fault
    """

    def __init__(self, arm: Arm, canaries: CanaryCounters, received_at: float, *, has_timeout: bool) -> None:
        self._arm, self._canaries, self._received_at, self._has_timeout = arm, canaries, received_at, has_timeout
        self._time = asyncio.get_running_loop().time
        self._first_at: float | None = None
        self._last_at = 0.0
        self._is_error = False

    def came(self) -> None:
        """Take the time at which tokens of the first choice have come."""
        self._last_at = self._time()
        if self._first_at is None:
            self._first_at = self._last_at

    def failed(self, error: Exception, status: int) -> None:
        is_no_fault = isinstance(error, BaseStarting) or (self._has_timeout and isinstance(error, DeadlineExceeded))
        self._is_error = status >= 500 and not is_no_fault

    def end(self, outcome: str, last: Delta | None) -> None:
        """Count the request. `outcome` is of `UsageEvent`; `last`: the first choice's last delta, None without any."""
        if outcome != "ok" and not self._is_error:
            return
        counts = VersionCounts(num_requests=1, num_errors=int(self._is_error))
        if self._first_at is not None and not self._is_error:
            counts = counts._replace(ttft=counts.ttft.plus(max(_SHORTEST_S, self._first_at - self._received_at)))
            num_after = 0 if last is None else last.num_output_tokens - 1
            if num_after > 0 and self._last_at > self._first_at:
                counts = counts._replace(itl=counts.itl.plus((self._last_at - self._first_at) / num_after))
        self._canaries.add(self._arm, counts)


class CanaryCounters:
    """Counts what requests of canaries were like at one gateway. Used from one event loop.

    `ask` answers a question to the catalog from a thread; it raises CatalogError while that is away. What could not be
    reported is part of the next report.
    """

    def __init__(
        self,
        ask: Callable[[Callable[[Catalog], ReportAnswer]], Awaitable[ReportAnswer]],
        metrics: GatewayMetrics,
    ) -> None:
        self._ask, self._metrics = ask, metrics
        self._name = uuid.uuid4().hex[:12]  # of this process: after a restart it counts from zero
        self._counted: dict[int, CanaryCounts] = {}
        self._changed: set[int] = set()
        self._woken = asyncio.Event()

    def meter(self, arm: Arm | None, received_at: float, *, has_timeout: bool) -> CanaryMeter | None:
        """Make the meter of a request of this arm; None for one that no canary concerns."""
        return None if arm is None else CanaryMeter(arm, self, received_at, has_timeout=has_timeout)

    def add(self, arm: Arm, counts: VersionCounts) -> None:
        self._metrics.canary_request("canary" if arm.is_canary else "stable", "error" if counts.num_errors else "ok")
        added = CanaryCounts(canary=counts) if arm.is_canary else CanaryCounts(stable=counts)
        self._counted[arm.id] = self._counted.get(arm.id, CanaryCounts()) + added
        self._changed.add(arm.id)
        self._woken.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Report meanwhile, and a last time."""
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            try:
                async with asyncio.timeout(_LAST_S):
                    await self.report()
            except TimeoutError:
                _log.debug("the last counts of canaries were not reported in time")

    async def report(self) -> None:
        """Tell the catalog what has changed since the last report that it took."""
        reported = {canary: self._counted[canary] for canary in self._changed}
        if not reported:
            return
        try:
            over, ended = await self._ask(lambda catalog: catalog.canaries.report(self._name, reported))
        except Exception as e:  # noqa: BLE001 - after any error of the database, the next report has it too
            _log.log(logging.DEBUG if isinstance(e, CatalogError) else logging.WARNING, "canaries: %r", e)
            return
        for canary in over:
            self._counted.pop(canary, None)
        self._changed = {c for c in self._changed - over if self._counted[c] is not reported.get(c)}
        for label, model, bound, reason in ended:
            self._metrics.canary_rolled_back(bound)
            _log.warning("%s is no canary of %s any more: %s", label, model, reason)

    async def _follow(self) -> None:
        while True:
            await self._woken.wait()
            await asyncio.sleep(REPORT_S)
            self._woken.clear()
            await self.report()
            if self._changed:
                self._woken.set()
