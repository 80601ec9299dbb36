"""Limits that gateways share: their owner, in one gateway's process or as a Ray actor, and how it is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from loray.catalog import Catalog, QuotaUse
from loray.catalog.quotas import OWNER_IS_GONE_S
from loray.errors import LorayError
from loray.policy.quota_owner import TOLD_S, QuotaOwner
from loray.policy.quotas import IDLE_S, Counted, QuotaGate, Reply, Report, Rule
from loray.settings import DEFAULT_BATCH_FACTOR, Settings
from loray.telemetry import get_logger
from serve_apps.deployment import front_nodes

_log = get_logger(__name__)

SOON_S, BUSY_S = 0.01, 0.1  # between two exchanges, or IDLE_S
_TIMEOUT_S = 2.0
_RETRY_S = 1.0
_NAMESPACE = "serve"


# Tells the owner of the limits what a gateway has counted. Raises OwnerAway.
QuotaExchange = Callable[[Sequence[Report]], Awaitable[Reply]]


class OwnerAway(Exception):
    """The owner of limits does not answer."""


async def follow_owner(gate: QuotaGate, exchange: QuotaExchange, is_limited: asyncio.Event | None = None) -> None:
    """Exchange with the owner until cancelled. While the owner is away, the gateway goes on with its part.

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


class SharedOwner:
    """The owner of a deployment's limits. While its gateways ask, it tells the catalog each TOLD_S that it is there and
    what it counted, and learns what others did. While that is away, it goes on with the number of owners known last.
    """

    def __init__(
        self,
        name: str,
        num_gateways: int,
        open_catalog: Callable[[], Catalog],
        clock: Callable[[], float] = time.time,
        *,
        batch_factor: float = DEFAULT_BATCH_FACTOR,
    ) -> None:
        """`name`: one that starts anew with it takes the place of the one before. `batch_factor`: the share of the
        tokens of batches that budgets count.
        """
        self._batch_factor = batch_factor
        self._name, self._open, self._clock = name, open_catalog, clock
        self._owner = QuotaOwner(num_gateways)
        self._catalog: Catalog | None = None
        self._telling: asyncio.Task[None] | None = None
        self._told_at = 0.0
        self._known_at: float | None = None  # when the catalog last said what others did
        self._is_away: bool | None = None  # the catalog; None: it was not asked yet

    async def exchange(self, gateway: str, reports: Sequence[Report]) -> Reply:
        """Exchange with a gateway. The first one waits until it is known how many owners there are, or cannot be."""
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell())
        if self._is_away is None:
            await asyncio.wait([self._telling])
        reply = self._owner.exchange(gateway, reports, self._clock())
        if self._telling.done() and self._is_due():
            self._telling = asyncio.create_task(self._tell())
        return reply

    async def close(self) -> None:
        """Leave limits to others."""
        if self._telling is None:
            return
        await asyncio.wait([self._telling])
        if not self._is_away:
            await self._tell()
        await asyncio.to_thread(self._leave)

    def _is_due(self) -> bool:
        since = abs(self._clock() - self._told_at)  # clocks may go back
        return since >= TOLD_S or (since >= _RETRY_S and self._owner.has_new_budgets)

    async def _tell(self) -> None:
        now = self._told_at = self._clock()
        counted = self._owner.counted(now)
        try:
            num_owners, used = await asyncio.to_thread(self._told, counted, now)
        except LorayError as e:
            if not self._is_away:
                _log.warning("limits are not shared with other owners: %s", e)
            self._is_away = True
        else:
            # After so long without the catalog, others have yet to say that they are there.
            if self._known_at is not None and abs(now - self._known_at) >= OWNER_IS_GONE_S:
                num_owners = max(num_owners, self._owner.num_owners)
            self._is_away, self._known_at = False, now
            self._owner.divide(num_owners, used, counted, self._clock())

    # -- in a thread --------------------------------------------------------------------------------------------------

    def _told(self, counted: Sequence[Counted], now: float) -> tuple[int, dict[Rule, float]]:
        """Ask the catalog. Raises CatalogError."""
        if self._catalog is None:
            self._catalog = self._open()
        catalog, used = self._catalog, dict[Rule, float]()
        if self._known_at is None:
            for key, (units, at) in catalog.quotas.known(now).items():
                rule = _rule_of(key)
                used[rule] = max(0.0, units - rule.rate * max(0.0, now - at))
        keys = {_key(one.rule, one.period): one.rule for one in counted}
        state = catalog.quotas.count(self._name, [self._use(catalog, one, now) for one in counted], now)
        return state.num_owners, used | {keys[key]: units for key, units in state.used.items()}

    def _use(self, catalog: Catalog, one: Counted, now: float) -> QuotaUse:
        rule, key = one.rule, _key(one.rule, one.period)
        if rule.rate:
            return QuotaUse(key, one.units, rule.rate)
        before = None
        if one.is_new:
            since = datetime.fromtimestamp(one.period * rule.period_s, UTC)
            key_id, tenant = (rule.subject, None) if rule.owner == "key" else (None, rule.subject)
            before = catalog.usage.tokens(tenant=tenant, key_id=key_id, since=since, batch_factor=self._batch_factor)
        return QuotaUse(key, one.units, 0.0, (one.period + 1) * rule.period_s, before)

    def _leave(self) -> None:
        try:
            if self._catalog is not None:
                self._catalog.quotas.leave(self._name)
        except LorayError as e:
            _log.warning("others wait until this owner of limits is forgotten: %s", e)
        finally:
            if self._catalog is not None:
                self._catalog.close()


def _key(rule: Rule, period: int) -> str:
    return f"{rule.kind} {rule.owner} {rule.subject} {float(rule.limit)} {float(rule.period_s)} {period}"


def _rule_of(key: str) -> Rule:
    kind, owner, subject, limit, period_s, _ = key.split(" ")
    return Rule(owner, subject, kind, float(limit), float(period_s))  # type: ignore[arg-type]  # words of _key


class QuotaActor(SharedOwner):
    """The owner as a Ray actor. It ends with the gateway that made it; another one's next exchange makes a new one."""

    def __init__(self, application: str, num_gateways: int) -> None:
        import ray

        settings = Settings.from_env()
        name = f"{ray.get_runtime_context().get_session_name()}/{application}/{num_gateways}"
        super().__init__(name, num_gateways, lambda: Catalog(settings.catalog), batch_factor=settings.batch_factor)


class RayExchange:
    """The `QuotaExchange` of the gateway `name` of an application."""

    def __init__(self, application: str, name: str, num_gateways: int, settings: Settings) -> None:
        # Gateways with another number of gateways, while an application is replaced, have another owner.
        self._application, self._owner = application, f"loray-quotas-{application}-{num_gateways}"
        self._name, self._num_gateways, self._settings = name, num_gateways, settings
        self._handle: Any = None

    async def __call__(self, reports: Sequence[Report]) -> Reply:
        from ray.exceptions import RayError

        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(self._make)
            reply = await self._handle.exchange.remote(self._name, reports)
        except RayError as e:
            self._handle = None
            raise OwnerAway(f"their owner is lost: {e}") from e
        assert isinstance(reply, Reply)
        return reply

    def _make(self) -> Any:
        import ray

        return (
            ray.remote(QuotaActor)
            .options(
                name=self._owner,
                namespace=_NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                label_selector=front_nodes(self._settings) or None,
                runtime_env={"env_vars": self._settings.to_env(secrets=False)},
            )
            .remote(self._application, self._num_gateways)
        )
