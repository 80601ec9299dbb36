"""`QuotaOwner` grants what limits have left to the gateways that ask, and divides limits with other owners."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence

from loray.policy.quotas import NO_DEBT, Counted, Grant, Reply, Report, Rule

TOLD_S = 5.0  # between two times that owners tell each other what they counted
_RESERVE = 0.05  # of what is left: divided among all gateways, whether they ask or not
_GONE_S = 10.0  # without a word, after which a gateway's requests have ended
_DEMAND_S = 5.0  # in which demand fades
_LOW = 0.5  # of a gateway's part: below it, others are asked to give back
_SHORT_S = 2.0  # how long others are asked to give back for a gateway that asked for more


class _Holder:
    """A gateway, and what it holds of a rule at most, since its last report."""

    __slots__ = ("at", "demand", "in_use", "level")

    def __init__(self, level: float, now: float) -> None:
        self.level, self.at = level, now
        self.demand = self.in_use = 0.0


class _Meter:
    """One rule: all that is left of this owner's part, and who holds it.

    part     of a gateway, which gets `part_rate` units a second
    untold   units that other owners do not know of
    """

    def __init__(self, rule: Rule, num_gateways: int, num_owners: int, now: float) -> None:
        self.rule, self.at, self._num_gateways = rule, now, num_gateways
        self.divide(num_owners)
        self.left = self.limit
        self.period = rule.period(now)
        self.holders: dict[str, _Holder] = {}
        self.short_until = -math.inf
        self.untold = 0.0
        self.is_new = rule.kind == "budget"

    def divide(self, num_owners: int) -> None:
        self.limit, self.rate = self.rule.limit_of(num_owners), self.rule.rate / num_owners
        self.part, self.part_rate = self.limit / self._num_gateways, self.rate / self._num_gateways

    def refresh(self, now: float) -> None:
        elapsed, self.at = max(0.0, now - self.at), now
        self.left = min(self.limit, self.left + self.rate * elapsed)
        if self.rule.period(self.at) > self.period:
            self.period, self.left = self.rule.period(self.at), self.limit
            self.untold, self.is_new = 0.0, True
            self.holders.clear()
        for holder in self.holders.values():
            since, holder.at = max(0.0, now - holder.at), now
            holder.demand *= math.exp(-since / _DEMAND_S)
            if holder.level < self.part:
                holder.level = min(self.part, holder.level + self.part_rate * since)

    def spend(self, units: float) -> None:
        self.left = min(self.limit, self.left - units)
        self.untold += units

    def believe(self, known: float, *, is_anew: bool, is_alone: bool) -> None:
        """Believe the first gateway to report the rule, for it may know more than owners that are gone told."""
        lower = min(self.left, known)
        if is_alone and self.rate:
            self.untold += self.left - lower
        if is_anew or is_alone:
            self.left = lower

    def know(self, used: float, num_owners: int, *, is_anew: bool, was_new: bool) -> None:
        """Learn what all owners have used of the rule, without what is untold here. `is_anew`: they divide all that is
        left.

        Else each has the bucket that it had. One with a full bucket lends what it would get: what is left of all and
        not in the buckets of others, were they full, is granted here.
        """
        left = self.rule.limit - used - self.untold
        if was_new and num_owners == 1 and left > self.left:  # the gateways know of more than usage and owners told
            self.untold, left = self.untold + left - self.left, self.left
        others, soon = self.rule.limit - self.limit, self.rule.rate * TOLD_S  # soon: what nobody knows of yet
        if is_anew or self.rule.kind == "budget":
            self.left = left / num_owners
        elif num_owners > 1:
            self.left = max(self.left, left - others - soon)
        else:
            return
        self.left = min(self.left, left + soon, self.limit)

    def count_parallel(self) -> None:
        """Requests at once are counted, not summed up from what came and went."""
        if self.rule.kind == "parallel":
            self.left = self.limit - sum(holder.in_use for holder in self.holders.values())

    def target(self, gateway: str) -> float | None:
        """Return what the gateway shall hold by its demand; None where there is none at all."""
        total = sum(holder.demand for holder in self.holders.values())
        if total < NO_DEBT:
            return None
        holder = self.holders.get(gateway)
        share = (1 - _RESERVE) * (holder.demand / total if holder else 0.0) + _RESERVE / self._num_gateways
        return max(0.0, self.left) * share

    @property
    def free(self) -> float:
        """The units that no gateway holds. One that has not reported the rule holds its part."""
        silent = max(0, self._num_gateways - len(self.holders))
        return self.left - sum(holder.level for holder in self.holders.values()) - silent * self.part

    @property
    def is_idle(self) -> bool:
        """True if nothing of the limit is used."""
        full = self.left >= self.limit * (1 - 1e-9)
        return full and all(h.level <= self.part + NO_DEBT and not h.in_use for h in self.holders.values())


class QuotaOwner:
    """Answers the reports of `num_gateways` gateways, and divides limits with other owners, of which there are
    `num_owners`, this one included. It is not thread-safe.

    An owner that starts anew believes the first report of each rule, and what `divide` is told.
    """

    def __init__(self, num_gateways: int) -> None:
        self._num_gateways, self.num_owners = num_gateways, 1
        self._meters: dict[Rule, _Meter] = {}
        self._short: set[Rule] = set()
        self._heard: dict[str, float] = {}
        self._to_tell: dict[str, set[Rule]] = {}
        self._epoch = secrets.token_hex(8)

    def exchange(self, gateway: str, reports: Sequence[Report], now: float) -> Reply:
        if gateway not in self._heard:
            self._to_tell[gateway] = set(self._meters)
        self._heard[gateway] = now
        self._drop_gone(now)
        grants = [self._answer(gateway, report, now) for report in reports]
        reported = {report.rule for report in reports}
        return Reply(self._epoch, (*grants, *self._moved(gateway, reported, now)), self.num_owners)

    # -- with other owners --------------------------------------------------------------------------------------------

    @property
    def has_new_budgets(self) -> bool:
        return any(meter.is_new for meter in self._meters.values())

    def counted(self, now: float) -> list[Counted]:
        """Return what others are to know, and forget unused rules. Requests at once are told nobody: each owner has its
        part.
        """
        counted = []
        for rule, meter in list(self._meters.items()):
            meter.refresh(now)
            if meter.is_idle:
                self._forget(rule)
            elif rule.kind != "parallel":
                if rule.rate:  # what has come back meanwhile is not used
                    meter.untold = min(meter.untold, meter.limit - meter.left)
                counted.append(Counted(rule, meter.period, meter.untold, meter.is_new))
        return counted

    def divide(self, num_owners: int, used: Mapping[Rule, float], told: Sequence[Counted], now: float) -> None:
        """Grant so much of each limit from now on. `used`: what all owners had used of the rules when others were
        `told`, and at the start of any rule.
        """
        is_anew, self.num_owners = num_owners != self.num_owners, num_owners
        before = {}
        for rule, meter in self._meters.items():
            meter.refresh(now)
            before[rule] = meter.left
            meter.divide(num_owners)
            meter.left = min(meter.left, meter.limit)
            meter.count_parallel()
        told_of = {one.rule: one for one in told}
        for rule, units in used.items():
            known, one = self._meters.get(rule), told_of.get(rule)
            if known is None:
                self._new(rule, now).know(units, num_owners, is_anew=True, was_new=False)
            elif one is None or one.period == known.period:
                was_new = one is not None and one.is_new
                known.untold -= 0.0 if one is None else one.units
                known.is_new &= not was_new
                known.know(units, num_owners, is_anew=is_anew, was_new=was_new)
        changed = {rule for rule, m in self._meters.items() if abs(m.left - before.get(rule, math.inf)) > NO_DEBT}
        for rules in self._to_tell.values():
            rules |= set(self._meters) if is_anew else changed

    # -- with the own gateways ----------------------------------------------------------------------------------------

    def _answer(self, gateway: str, report: Report, now: float) -> Grant:
        rule = report.rule
        is_anew = rule not in self._meters
        meter = self._new(rule, now) if is_anew else self._meters[rule]
        meter.refresh(now)
        if report.period == meter.period:
            meter.spend(report.spent)
            if not meter.holders:
                meter.believe(report.known, is_anew=is_anew, is_alone=self.num_owners == 1)
        holder = meter.holders.setdefault(gateway, _Holder(0.0, now))
        if report.period == meter.period:
            holder.level = report.level
        holder.demand += report.wanted
        holder.in_use = report.in_use
        meter.count_parallel()
        target = meter.target(gateway)
        wish = (meter.part if target is None else target) - holder.level
        granted = min(wish, meter.free)
        if granted < wish and report.wanted and holder.level + granted < _LOW * meter.part:
            meter.short_until = now + _SHORT_S
            self._short.add(rule)
        granted = max(0.0, granted)
        holder.level += granted
        idle = meter.is_idle
        if idle:
            self._forget(rule)
        return Grant(rule, granted, meter.left, target, idle)

    def _new(self, rule: Rule, now: float) -> _Meter:
        meter = self._meters[rule] = _Meter(rule, self._num_gateways, self.num_owners, now)
        return meter

    def _forget(self, rule: Rule) -> None:
        del self._meters[rule]
        self._short.discard(rule)

    def _moved(self, gateway: str, reported: set[Rule], now: float) -> list[Grant]:
        """Grant what was not reported: where a gateway asks for more, what another one is to give back and
        what that one still waits for; and where other owners have used more, or less, than this gateway was told.
        """
        grants = []
        to_tell, self._to_tell[gateway] = self._to_tell[gateway] - reported, set()
        for rule in list(self._short):
            if not now <= self._meters[rule].short_until <= now + _SHORT_S:  # above: the clock has gone back
                self._short.discard(rule)
        for rule in (self._short - reported) | (to_tell & self._meters.keys()):
            meter = self._meters[rule]
            meter.refresh(now)
            holder = meter.holders.get(gateway)
            target = meter.target(gateway)
            held = meter.part if holder is None else holder.level
            if rule not in to_tell and (target is None or abs(held - target) < NO_DEBT):
                continue
            wish = (meter.part if target is None else target) - held
            granted = 0.0 if holder is None else max(0.0, min(wish, meter.free))
            if holder is not None:
                holder.level += granted
            grants.append(Grant(rule, granted, meter.left, target))
        return grants

    def _drop_gone(self, now: float) -> None:
        self._heard = {gateway: min(heard, now) for gateway, heard in self._heard.items()}  # clocks may go back
        gone = [gateway for gateway, heard in self._heard.items() if now - heard > _GONE_S]
        for gateway in gone:
            del self._heard[gateway], self._to_tell[gateway]
            for meter in self._meters.values():
                meter.holders.pop(gateway, None)
                meter.count_parallel()
