"""`QuotaOwner` grants what limits have left to the gateways that ask, and divides limits with other owners."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loray.policy.quotas import LOW, NO_DEBT, Counted, Grant, Reply, Report, Rule

TOLD_S = 5.0  # between two times that owners tell each other what they counted
_RESERVE = 0.05  # of what is left: divided among all gateways, whether they ask or not
_GONE_S = 10.0  # without a word, after which a gateway's requests have ended
_ASKS_S = 5.0  # since the last request for units at a gateway, in which it counts as one that is asked for them


@dataclass(slots=True)
class _Holder:
    """A gateway, and what it holds of a rule at most, since its last report. `asks_s`: how long it counts as asked."""

    at: float
    held: float = 0.0
    asks_s: float = 0.0
    in_use: float = 0.0


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
            holder.asks_s -= since
            if holder.held < self.part:
                holder.held = min(self.part, holder.held + self.part_rate * since)

    def spend(self, units: float) -> None:
        self.left = min(self.limit, self.left - units)
        self.untold += units

    def believe(self, known: float, *, is_anew: bool, is_alone: bool) -> None:
        """Believe a gateway that another owner told last: it may know more than the others."""
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
        """Return what the gateway shall hold: an equal part of what is left if it is one of those that are asked for
        units, else next to nothing. None where nobody is.
        """
        num_asking = sum(holder.asks_s > 0 for holder in self.holders.values())
        if not num_asking:
            return None
        holder = self.holders.get(gateway)
        share = (1 - _RESERVE) / num_asking if holder is not None and holder.asks_s > 0 else 0.0
        return max(0.0, self.left) * (share + _RESERVE / self._num_gateways)

    @property
    def free(self) -> float:
        """The units that no gateway holds. One that has not reported the rule holds its part."""
        silent = max(0, self._num_gateways - len(self.holders))
        return self.left - sum(holder.held for holder in self.holders.values()) - silent * self.part

    @property
    def is_idle(self) -> bool:
        """True if nothing of the limit is used."""
        full = self.left >= self.limit * (1 - 1e-9)
        return full and all(h.held <= self.part + NO_DEBT and not h.in_use for h in self.holders.values())


class QuotaOwner:
    """Answers the reports of `num_gateways` gateways, and divides limits with other owners, of which there are
    `num_owners`, this one included. It is not thread-safe.

    An owner that starts anew believes the gateways' first reports of each rule, and what `divide` is told.
    """

    def __init__(self, num_gateways: int) -> None:
        self._num_gateways, self.num_owners = num_gateways, 1
        self._meters: dict[Rule, _Meter] = {}
        self._heard: dict[str, float] = {}
        self._to_tell: dict[str, set[Rule]] = {}  # gateway → rules that it is to report
        self._epoch = secrets.token_hex(8)

    def exchange(self, gateway: str, reports: Sequence[Report], now: float) -> Reply:
        if gateway not in self._heard:
            self._to_tell[gateway] = set(self._meters)
        self._heard[gateway] = now
        self._drop_gone(now)
        to_tell, self._to_tell[gateway] = self._to_tell[gateway], set()
        grants = [self._answer(gateway, report, now) for report in reports]
        for rule in to_tell.difference(report.rule for report in reports):
            if (meter := self._meters.get(rule)) is not None:
                meter.refresh(now)
                grants.append(Grant(rule, meter.period, None, meter.left, meter.target(gateway)))
        return Reply(self._epoch, tuple(grants), self.num_owners)

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
                del self._meters[rule]
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
            if report.epoch != self._epoch:
                meter.believe(report.known, is_anew=is_anew, is_alone=self.num_owners == 1)
        holder = meter.holders.setdefault(gateway, _Holder(now))
        if report.period == meter.period:
            holder.held = report.held
        if report.is_asked:
            holder.asks_s = _ASKS_S
        holder.in_use = report.in_use
        meter.count_parallel()
        target = meter.target(gateway)
        wish = (meter.part if target is None else target) - holder.held
        granted = min(wish, meter.free)
        holder.held += max(0.0, granted)
        if granted < wish and holder.asks_s > 0 and holder.held < LOW * meter.part:
            for other in self._to_tell.keys() - {gateway}:
                self._to_tell[other].add(rule)
        idle = meter.is_idle
        if idle:
            del self._meters[rule]
        return Grant(rule, meter.period, holder.held, meter.left, target, idle)

    def _new(self, rule: Rule, now: float) -> _Meter:
        meter = self._meters[rule] = _Meter(rule, self._num_gateways, self.num_owners, now)
        return meter

    def _drop_gone(self, now: float) -> None:
        self._heard = {gateway: min(heard, now) for gateway, heard in self._heard.items()}  # clocks may go back
        gone = [gateway for gateway, heard in self._heard.items() if now - heard > _GONE_S]
        for gateway in gone:
            del self._heard[gateway], self._to_tell[gateway]
            for meter in self._meters.values():
                meter.holders.pop(gateway, None)
                meter.count_parallel()
