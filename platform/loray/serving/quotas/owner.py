"""The owner of all limits of a deployment: moves what one gateway does not use to another."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence

from loray.serving.quotas.rules import Rule
from loray.serving.quotas.shares import NO_DEBT, Grant, Reply, Report

RESERVE = 0.05  # of what is left: divided among all gateways, whether they ask or not
GONE_S = 10.0  # without a word, after which a gateway's requests have ended
_DEMAND_S = 5.0  # in which demand fades
_LOW = 0.5  # of a gateway's part: below it, others are asked to give back
_KEPT_METERS = 1024  # unused ones are forgotten above this
_SHORT_S = 2.0  # how long others are asked to give back for a gateway that asked for more

Used = Callable[[Rule, float], float]


class _Holder:
    """What a gateway holds of a rule at most, since its last report."""

    __slots__ = ("at", "demand", "in_use", "level")

    def __init__(self, level: float, now: float) -> None:
        self.level, self.at = level, now
        self.demand = self.in_use = 0.0


class _Meter:
    """All that is left of one rule, and who holds it."""

    def __init__(self, rule: Rule, left: float, now: float) -> None:
        self.rule, self.left, self.at = rule, left, now
        self.period = rule.period(now)
        self.holders: dict[str, _Holder] = {}
        self.short_until = -math.inf

    def refresh(self, now: float, part: float, rate: float) -> None:
        elapsed, self.at = max(0.0, now - self.at), now
        self.left = min(self.rule.limit, self.left + self.rule.rate * elapsed)
        if self.rule.period(self.at) > self.period:
            self.period, self.left = self.rule.period(self.at), self.rule.limit
            self.holders.clear()
        for holder in self.holders.values():
            since, holder.at = max(0.0, now - holder.at), now
            holder.demand *= math.exp(-since / _DEMAND_S)
            if holder.level < part:
                holder.level = min(part, holder.level + rate * since)

    def count_parallel(self) -> None:
        """Requests at once are counted, not summed up from what came and went."""
        if self.rule.kind == "parallel":
            self.left = self.rule.limit - sum(holder.in_use for holder in self.holders.values())

    def target(self, gateway: str, num_gateways: int) -> float | None:
        total = sum(holder.demand for holder in self.holders.values())
        if total < NO_DEBT:
            return None
        holder = self.holders.get(gateway)
        share = (1 - RESERVE) * (holder.demand / total if holder else 0.0) + RESERVE / num_gateways
        return max(0.0, self.left) * share


class QuotaOwner:
    """Answers the reports of `num_gateways` gateways. Not thread-safe.

    used_before  what a budget's period had used before this owner counted it. It may raise nothing.

    An owner that starts anew knows nothing: it believes the first report of each rule, and for budgets `used_before`.
    """

    def __init__(self, num_gateways: int, used_before: Used = lambda rule, now: 0.0) -> None:
        self._num_gateways, self._used_before = num_gateways, used_before
        self._meters: dict[Rule, _Meter] = {}
        self._short: set[Rule] = set()
        self._heard: dict[str, float] = {}
        self._max_meters = _KEPT_METERS
        self._epoch = secrets.token_hex(8)

    def exchange(self, gateway: str, reports: Sequence[Report], now: float) -> Reply:
        self._heard[gateway] = now
        self._drop_gone(now)
        grants = [self._answer(gateway, report, now) for report in reports]
        reported = {report.rule for report in reports}
        return Reply(self._epoch, (*grants, *self._moved(gateway, reported, now)))

    def _answer(self, gateway: str, report: Report, now: float) -> Grant:
        rule, part = report.rule, report.rule.limit / self._num_gateways
        meter = self._meters.get(rule)
        if meter is None:
            meter = self._new(report, now)
        else:
            meter.refresh(now, part, rule.rate / self._num_gateways)
            if report.period == meter.period:
                meter.left = min(rule.limit, meter.left - report.spent)
        holder = meter.holders.setdefault(gateway, _Holder(0.0, now))
        if report.period == meter.period:
            holder.level = report.level
        holder.demand += report.wanted
        holder.in_use = report.in_use
        meter.count_parallel()
        target = meter.target(gateway, self._num_gateways)
        wish = (part if target is None else target) - holder.level
        granted = min(wish, self._free(meter, part))
        if granted < wish and report.wanted and holder.level + granted < _LOW * part:
            meter.short_until = now + _SHORT_S
            self._short.add(rule)
        granted = max(0.0, granted)
        holder.level += granted
        idle = self._is_idle(meter, part)
        if idle:
            del self._meters[rule]
            self._short.discard(rule)
        return Grant(rule, granted, meter.left, target, idle)

    def _new(self, report: Report, now: float) -> _Meter:
        rule = report.rule
        left = min(rule.limit, report.known)
        if rule.kind == "budget":
            left = min(left, rule.limit - self._used_before(rule, now) - report.spent)
        if len(self._meters) >= self._max_meters:
            self._forget_idle(now)
        meter = self._meters[rule] = _Meter(rule, left, now)
        return meter

    def _forget_idle(self, now: float) -> None:
        for rule, meter in list(self._meters.items()):
            part = rule.limit / self._num_gateways
            meter.refresh(now, part, rule.rate / self._num_gateways)
            if self._is_idle(meter, part):
                del self._meters[rule]
                self._short.discard(rule)
        self._max_meters = max(_KEPT_METERS, 2 * len(self._meters))

    def _free(self, meter: _Meter, part: float) -> float:
        """What no gateway holds. One that has not reported the rule holds its part."""
        silent = max(0, self._num_gateways - len(meter.holders))
        return meter.left - sum(holder.level for holder in meter.holders.values()) - silent * part

    def _is_idle(self, meter: _Meter, part: float) -> bool:
        full = meter.left >= meter.rule.limit * (1 - 1e-9)
        return full and all(h.level <= part + NO_DEBT and not h.in_use for h in meter.holders.values())

    def _moved(self, gateway: str, reported: set[Rule], now: float) -> list[Grant]:
        """Of rules that a gateway asks more of: what another one is to give back, and what that one still waits for."""
        grants = []
        for rule in list(self._short):
            meter = self._meters[rule]
            if not now <= meter.short_until <= now + _SHORT_S:  # above: the clock has gone back
                self._short.discard(rule)
            elif rule not in reported:
                part = rule.limit / self._num_gateways
                meter.refresh(now, part, rule.rate / self._num_gateways)
                holder = meter.holders.get(gateway)
                target = meter.target(gateway, self._num_gateways)
                held = part if holder is None else holder.level
                if target is None or abs(held - target) < NO_DEBT:
                    continue
                granted = 0.0 if holder is None else max(0.0, min(target - held, self._free(meter, part)))
                if holder is not None:
                    holder.level += granted
                grants.append(Grant(rule, granted, meter.left, target))
        return grants

    def _drop_gone(self, now: float) -> None:
        self._heard = {gateway: min(heard, now) for gateway, heard in self._heard.items()}  # clocks may go back
        gone = [gateway for gateway, heard in self._heard.items() if now - heard > GONE_S]
        for gateway in gone:
            del self._heard[gateway]
            for meter in self._meters.values():
                meter.holders.pop(gateway, None)
                meter.count_parallel()
