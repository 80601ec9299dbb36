"""A gateway's share of one rule, and what gateway and owner tell each other about it."""

from __future__ import annotations

from typing import NamedTuple

from loray.serving.quotas.return_times import ReturnTimes
from loray.serving.quotas.rules import Rule

IDLE_S = 0.5  # between two exchanges at most, about
_EXCHANGE_S = 1.0  # in which the owner has moved units that others do not use
_SOONEST_S = 0.1  # that a refused request may come again
_UNKNOWN_S = 1.0  # until a request ends; nobody knows when
_LEARN = 0.1  # the share of the newest request in a mean
NO_DEBT = 1e-6  # a share is used up below this; sums of floats do not reach 0 exactly


class Report(NamedTuple):
    """What a gateway tells the owner of one rule. Its counts are since its last report.

    level    what it holds now, after it has given back what is above its target; at least 0
    known    what it believes that all gateways have left
    spent    units taken, less those given back
    wanted   units asked for, whether admitted or not
    in_use   parallel requests that run here now
    """

    rule: Rule
    level: float
    known: float
    spent: float
    wanted: float
    in_use: float
    period: int


class Grant(NamedTuple):
    """The owner's answer for one rule.

    granted  units that the gateway holds in addition
    known    what all gateways have left
    target   what it shall hold; it gives back the rest with its next report. None: its part of an unused limit
    idle     nothing of the limit is used: the gateway may forget it
    """

    rule: Rule
    granted: float
    known: float
    target: float | None
    idle: bool = False


class Reply(NamedTuple):
    """`grants` also of rules that the gateway did not report, where another one needs what it holds.

    epoch       of the owner: one that has started anew has another, and is told all
    num_owners  that divide each limit
    """

    epoch: str
    grants: tuple[Grant, ...]
    num_owners: int = 1


class Counted(NamedTuple):
    """What an owner counted of one rule since the others last knew.

    units   taken, less those given back
    is_new  of a budget: what its period had used before is not known yet
    """

    rule: Rule
    period: int
    units: float
    is_new: bool


class Share:
    """What this gateway holds of a rule."""

    __slots__ = (
        "_mean_cost",
        "_mean_held_s",
        "_moved",
        "_num_gateways",
        "_part",
        "_rate",
        "_turns",
        "at",
        "in_use",
        "is_dirty",
        "known",
        "level",
        "limit",
        "period",
        "rate",
        "rule",
        "spent",
        "target",
        "wanted",
    )

    def __init__(self, rule: Rule, num_gateways: int, num_owners: int, now: float) -> None:
        self.rule, self._num_gateways = rule, num_gateways
        self._divide(num_owners)
        self.level, self.known = self._part, self.limit
        self.at, self.period = now, rule.period(now)
        self.spent = self.wanted = self.in_use = self._moved = 0.0
        self.target: float | None = None
        self.is_dirty = False
        self._mean_cost = self._mean_held_s = 0.0  # of the requests admitted here; 0: none yet
        self._turns = ReturnTimes()

    def _divide(self, num_owners: int) -> None:
        """`limit` and `rate` are what the own owner grants to all its gateways."""
        self.limit, self.rate = self.rule.limit_of(num_owners), self.rule.rate / num_owners
        self._part, self._rate = self.limit / self._num_gateways, self.rate / self._num_gateways

    def divide(self, num_owners: int) -> None:
        """Among another number of owners. The own one is to say what is left."""
        before = self.limit
        self._divide(num_owners)
        if before:
            self.level *= self.limit / before if self.level > 0 else 1.0
            self.known *= self.limit / before if self.known > 0 else 1.0
        self.is_dirty = True

    @property
    def remaining(self) -> float:
        """What the limit has left, as far as is known here."""
        return max(0.0, self.known)

    @property
    def is_full(self) -> bool:
        """Nothing is missing: a new share of the rule would be the same."""
        is_told = not self.is_dirty or self._part == self.rule.limit  # the only gateway tells nobody
        return is_told and self.known >= self.limit and self.level >= self._part and not self.in_use

    def refresh(self, now: float) -> None:
        """What has come back until `now`. A clock that goes back neither stops this for as long, nor begins a period of
        a budget anew.
        """
        elapsed, self.at = max(0.0, now - self.at), now
        if self._rate:
            if self.level < self._part:
                self.level = min(self._part, self.level + self._rate * elapsed)
            self.known = min(self.limit, self.known + self.rate * elapsed)
        elif self.rule.period(self.at) > self.period:
            self.period = self.rule.period(self.at)
            self.level, self.known = self._part, self.limit
            self.spent = 0.0
            self.target = None

    def has_room(self, cost: float) -> bool:
        """One that is larger than what the own owner grants has room where nothing else is used."""
        is_possible = cost <= self.rule.limit + NO_DEBT
        return is_possible and self.level > NO_DEBT and self.known + NO_DEBT >= min(cost, self.limit)

    def admit(self, cost: float) -> None:
        """A request for which there is room."""
        self.take(cost)
        self._mean_cost = _mean(self._mean_cost, cost)

    def ended(self, seconds: float) -> None:
        """A request has ended, so long after it was admitted."""
        self._mean_held_s = _mean(self._mean_held_s, seconds)

    def take(self, cost: float) -> None:
        """Also more than is left, for a request that turned out to cost more than it had reserved."""
        self.level -= cost
        self.known -= cost
        self.spent += cost
        self.wanted += cost
        self.is_dirty = True
        if self.rule.kind == "parallel":
            self.in_use += cost

    def give_back(self, units: float, period: int) -> None:
        """Of an earlier `take` in `period`. What was taken in an earlier period of a budget is gone."""
        if self.rule.kind == "parallel":
            self.in_use -= units
        if period != self.period:
            return
        self.level = min(self.limit, self.level + units)
        self.known = min(self.limit, self.known + units)
        self.spent -= units
        self.is_dirty = True

    def refused(self, cost: float) -> None:
        """It counts as demand, so that the owner moves units here."""
        self.wanted += min(cost, self.limit)
        self.is_dirty = True

    def wait_s(self, cost: float) -> float:
        """After which it may have room."""
        rule = self.rule
        if rule.kind == "budget":
            return (self.period + 1) * rule.period_s - self.at
        if not rule.rate:
            return _UNKNOWN_S if rule.limit else 60.0
        from_others = min(_EXCHANGE_S, -self.level / self._rate)
        return max((min(cost, self.limit) - self.known) / self.rate, from_others, 0.0)

    def turn_s(self, cost: float) -> float:
        """After which a request that is refused now may come again: as `wait_s`, and behind those refused before it."""
        return self._turns.next_s(self.at, max(self.wait_s(cost), _SOONEST_S), self._spacing_s(cost))

    def _spacing_s(self, cost: float) -> float:
        """Between two requests that this share admits, about."""
        if self._rate:
            return max(cost, self._mean_cost) / self._rate
        return min(_UNKNOWN_S, (self._mean_held_s or _UNKNOWN_S) / max(1.0, self._part))

    # -- with the owner -----------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Gives back what is above the target. A debt becomes the owner's: it has `spent`."""
        before = self.level
        self.level = max(0.0, self.level if self.target is None else min(self.level, self.target))
        self._moved = before - self.level
        told = Report(self.rule, self.level, self.known, self.spent, self.wanted, self.in_use, self.period)
        self.spent = self.wanted = 0.0
        self.is_dirty = False
        return told

    def unreport(self, told: Report) -> None:
        """The report did not arrive: all is as it was before it."""
        if told.period == self.period:
            self.level += self._moved
            self.spent += told.spent
        self.wanted += told.wanted
        self.is_dirty = True

    @property
    def has_too_much(self) -> bool:
        """Whether it holds what others need at once. For what comes back between two exchanges they can wait."""
        return self.target is not None and self.level > self.target + self._rate * IDLE_S

    def apply(self, grant: Grant) -> None:
        self.level = min(self.limit, self.level + grant.granted)
        self.known = min(self.limit, grant.known - self.spent)  # what was taken since the report
        self.target = grant.target
        if self.target is not None and self.level > self.target:
            self.is_dirty = True


def _mean(before: float, newest: float) -> float:
    return before + _LEARN * (newest - before) if before else newest
