"""The owner of a deployment's limits, beside those of other deployments on the same database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from loray.catalog import Catalog, QuotaUse
from loray.catalog.identity.quotas import OWNER_IS_GONE_S
from loray.errors import LorayError
from loray.serving.quotas import TOLD_S, Counted, QuotaOwner, Reply, Report, Rule
from loray.telemetry import get_logger

_log = get_logger(__name__)

_RETRY_S = 1.0  # where a budget waits for what was used of it


class SharedOwner:
    """While its gateways ask, it tells the catalog each TOLD_S that it is there and what it counted, and learns what
    others did. While the catalog is away, it goes on with the number of owners that it knew last.
    """

    def __init__(
        self,
        name: str,
        num_gateways: int,
        open_catalog: Callable[[], Catalog],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`name`: one that starts anew with it takes the place of the one before."""
        self._name, self._open, self._clock = name, open_catalog, clock
        self._owner = QuotaOwner(num_gateways)
        self._catalog: Catalog | None = None
        self._telling: asyncio.Task[None] | None = None
        self._told_at = 0.0
        self._known_at: float | None = None  # when the catalog last said what others did
        self._is_away: bool | None = None  # the catalog; None: it was not asked yet

    async def exchange(self, gateway: str, reports: Sequence[Report]) -> Reply:
        """The first one waits until the catalog has said how many owners there are, or cannot."""
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
        """Raises CatalogError."""
        if self._catalog is None:
            self._catalog = self._open()
        catalog, used = self._catalog, dict[Rule, float]()
        if self._known_at is None:
            for key, (units, at) in catalog.known_quotas(now).items():
                rule = _rule_of(key)
                used[rule] = max(0.0, units - rule.rate * max(0.0, now - at))
        keys = {_key(one.rule, one.period): one.rule for one in counted}
        state = catalog.count_quotas(self._name, [self._use(catalog, one, now) for one in counted], now)
        return state.num_owners, used | {keys[key]: units for key, units in state.used.items()}

    def _use(self, catalog: Catalog, one: Counted, now: float) -> QuotaUse:
        rule, key = one.rule, _key(one.rule, one.period)
        if rule.rate:
            return QuotaUse(key, one.units, rule.rate)
        before = None
        if one.is_new:
            since = datetime.fromtimestamp(one.period * rule.period_s, UTC)
            key_id, tenant = (rule.subject, None) if rule.owner == "key" else (None, rule.subject)
            before = float(catalog.tokens_used(tenant=tenant, key_id=key_id, since=since))
        return QuotaUse(key, one.units, 0.0, (one.period + 1) * rule.period_s, before)

    def _leave(self) -> None:
        try:
            if self._catalog is not None:
                self._catalog.leave_quotas(self._name)
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
