"""Limits of keys and tenants: token buckets, concurrent requests and budgets, of which each gateway holds leases.

A gateway admits requests as far as its leases go. Now and then it reports to the owner of the limits (`QuotaOwner`),
which divides what is left among those gateways that are asked for it. A gateway without an owner counts alone. Times
are seconds since the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from loray.errors import RateLimited
from loray.spec import Limits, Principal, duration_of, duration_s

QuotaKind = Literal["requests", "tokens", "parallel", "budget"]
Owner = Literal["key", "tenant"]

MOST_URGENT, LEAST_URGENT = -1_000, 999  # the priorities that a request may have
# Headers of a refusal: the kind of the limit, and that the same request is never admitted, which OpenAI's clients know.
LIMIT, SHOULD_RETRY = "x-loray-limit", "x-should-retry"
OPEN_ENDED_TOKENS = 1024  # reserved at once for an answer whose request gives no limit
IDLE_S = 0.5  # between two exchanges with the owner at most, about
LOW = 0.5  # of a gateway's part of a limit: with less, it goes on to ask for more
NO_DEBT = 1e-6  # a lease is used up below this; sums of floats do not reach 0 exactly
_LONGEST_S = 60.0  # OpenAI's clients take no longer wait from a server
_EXCHANGE_S = 1.0  # in which the owner has moved units that others do not use
_SOONEST_S = 0.1  # that a refused request may come again
_UNKNOWN_S = 1.0  # until a request ends; nobody knows when
_LEARN = 0.1  # the share of the newest request in a mean
_MAX_PRINCIPALS = 4096  # whose rules are kept
_NUM_LEASES = 1024  # full leases are forgotten above this
_MINUTE_S = 60.0


class Rule(NamedTuple):
    """One limit. A limit that is changed is another rule, which begins anew.

    requests, tokens  a minute: a bucket of `limit` that refills in `period_s`
    parallel          requests at once; `period_s` is 0
    budget            tokens in a period of `period_s`; periods are counted from the epoch, so `1d` begins at 0:00 UTC
    """

    owner: Owner
    subject: str  # the key's account, or the tenant's name
    kind: QuotaKind
    limit: float
    period_s: float

    @property
    def rate(self) -> float:
        """Units a second that come back."""
        return self.limit / self.period_s if self.kind in ("requests", "tokens") else 0.0

    def limit_of(self, num_owners: int) -> float:
        """The limit that one of so many owners grants. Each grants a request at once, where any are allowed."""
        part = self.limit / num_owners
        return max(part, min(self.limit, 1.0)) if self.kind == "parallel" else part

    def period(self, now: float) -> int:
        """The number of the budget's period that `now` is in; 0 for all others."""
        return int(now // self.period_s) if self.kind == "budget" else 0

    @property
    def words(self) -> str:
        """The rule in messages: `120 requests a minute of the key ab12`."""
        what = {
            "requests": "requests a minute",
            "tokens": "tokens a minute",
            "parallel": "requests at once",
            "budget": f"tokens in {duration_of(self.period_s)}",
        }
        return f"{self.limit:g} {what[self.kind]} of the {self.owner} {self.subject}"


def rules_of(principal: Principal) -> tuple[Rule, ...]:
    """The rules of the key, then those of the tenant."""
    key = () if principal.account is None else _rules("key", principal.account, principal.limits)
    return key + _rules("tenant", principal.tenant, principal.tenant_limits)


def _rules(owner: Owner, subject: str, limits: Limits) -> tuple[Rule, ...]:
    found: tuple[tuple[QuotaKind, float | None, float], ...] = (
        ("requests", limits.rpm_limit, _MINUTE_S),
        ("tokens", limits.tpm_limit, _MINUTE_S),
        ("parallel", limits.max_parallel_requests, 0.0),
        ("budget", limits.max_budget, duration_s(limits.budget_duration)),
    )
    return tuple(Rule(owner, subject, kind, limit, period) for kind, limit, period in found if limit is not None)


def allowed_priority(principal: Principal, priority: int) -> int:
    """Return the priority of a request for `priority`: within the range, no more urgent than key and tenant may ask.

    Either of them that does not say may ask 0, an administrator's anything: priority comes before fairness.
    """
    unsaid = MOST_URGENT if principal.is_admin else 0
    given = (principal.limits.min_priority, principal.tenant_limits.min_priority)
    most_urgent = max(unsaid if value is None else value for value in given)
    return min(max(priority, most_urgent, MOST_URGENT), LEAST_URGENT)


class Report(NamedTuple):
    """What a gateway reports of one rule to the owner.

    held      what it may still grant, after it has given back what is above its target; at least 0
    epoch     of the owner whose answer it had last; empty: of none
    known     what it believes that all gateways have left
    spent     units taken since its last report, less those given back
    is_asked  a request has asked for units since then, whether admitted or not
    in_use    parallel requests that run here now
    """

    rule: Rule
    period: int
    held: float
    epoch: str
    known: float
    spent: float
    is_asked: bool
    in_use: float


class Grant(NamedTuple):
    """The owner's answer for one rule.

    held    what the gateway may grant from its report on; None: it has not reported the rule, and is to do so
    left    what all gateways have left
    target  what it shall hold; it gives back the rest with its next report. None: its part of an unused limit
    idle    nothing of the limit is used: the gateway may forget it
    """

    rule: Rule
    period: int
    held: float | None
    left: float
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
    """An owner's count of one rule since the others last knew.

    units   taken, less those given back
    is_new  of a budget: what its period had used before is not known yet
    """

    rule: Rule
    period: int
    units: float
    is_new: bool


class QuotaLease:
    """This gateway's part of a rule: what it may grant without asking."""

    __slots__ = (
        "_last_turn",
        "_mean_cost",
        "_mean_held_s",
        "_moved",
        "_num_gateways",
        "_part",
        "_rate",
        "at",
        "epoch",
        "in_use",
        "is_asked",
        "is_dirty",
        "known",
        "level",
        "limit",
        "period",
        "rate",
        "rule",
        "spent",
        "target",
    )

    def __init__(self, rule: Rule, num_gateways: int, num_owners: int, now: float) -> None:
        self.rule, self._num_gateways = rule, num_gateways
        self._divide(num_owners)
        self.level, self.known = self._part, self.limit
        self.at, self.period = now, rule.period(now)
        self.spent = self.in_use = 0.0
        self._moved = 0.0  # given back by the last report
        self.target: float | None = None
        self.epoch = ""  # of the owner whose answer it had last
        self.is_dirty = self.is_asked = False  # since the last report
        self._mean_cost = self._mean_held_s = 0.0  # of the requests admitted here; 0: none yet
        self._last_turn = -math.inf

    def _divide(self, num_owners: int) -> None:
        """`limit` and `rate` are what the own owner grants to all its gateways."""
        self.limit, self.rate = self.rule.limit_of(num_owners), self.rule.rate / num_owners
        self._part, self._rate = self.limit / self._num_gateways, self.rate / self._num_gateways

    def divide(self, num_owners: int) -> None:
        """Divide the rule among another number of owners. The own one is to say what is left."""
        before = self.limit
        self._divide(num_owners)
        if before:
            self.level *= self.limit / before if self.level > 0 else 1.0
            self.known *= self.limit / before if self.known > 0 else 1.0
        self.is_dirty = True

    @property
    def remaining(self) -> float:
        """The units that the limit has left, as far as is known here."""
        return max(0.0, self.known)

    @property
    def is_full(self) -> bool:
        """True if nothing is missing: a new lease of the rule would be the same."""
        is_told = not self.is_dirty or self._part == self.rule.limit  # the only gateway tells nobody
        return is_told and self.known >= self.limit and self.level >= self._part and not self.in_use

    def refresh(self, now: float) -> None:
        """Add what has come back until `now`. A clock that goes back neither stops this for as long, nor begins a
        period of a budget anew.
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
        """Return whether `cost` fits. More than the own owner grants fits where nothing else is used."""
        is_possible = cost <= self.rule.limit + NO_DEBT
        return is_possible and self.level > NO_DEBT and self.known + NO_DEBT >= min(cost, self.limit)

    def admit(self, cost: float) -> None:
        """Take `cost` for a request for which there is room."""
        self.take(cost)
        self._mean_cost = _mean(self._mean_cost, cost)

    def ended(self, seconds: float) -> None:
        """A request has ended, so long after it was admitted."""
        self._mean_held_s = _mean(self._mean_held_s, seconds)

    def take(self, cost: float) -> None:
        """Take `cost`, even more than is left: a request may turn out to cost more than it had reserved."""
        self.level -= cost
        self.known -= cost
        self.spent += cost
        self.is_dirty = self.is_asked = True
        if self.rule.kind == "parallel":
            self.in_use += cost

    def give_back(self, units: float, period: int) -> None:
        """Give back what an earlier `take` took in `period`. What an earlier period of a budget gave is gone."""
        if self.rule.kind == "parallel":
            self.in_use -= units
        if period != self.period:
            return
        self.level = min(self.limit, self.level + units)
        self.known = min(self.limit, self.known + units)
        self.spent -= units
        self.is_dirty = True

    def refused(self) -> None:
        """Note that a request was refused, so that the owner moves units here."""
        self.is_dirty = self.is_asked = True

    def wait_s(self, cost: float) -> float:
        """Return the seconds after which a request that costs that may have room."""
        rule = self.rule
        if rule.kind == "budget":
            return (self.period + 1) * rule.period_s - self.at
        if not rule.rate:
            return _UNKNOWN_S if rule.limit else _LONGEST_S
        from_others = min(_EXCHANGE_S, -self.level / self._rate)
        return max((min(cost, self.limit) - self.known) / self.rate, from_others, 0.0)

    def turn_s(self, cost: float) -> float:
        """Return the seconds after which a request that is refused now may come again.

        If all were told the same, they would come back together. So each gets the next turn: the first is when there
        may be room, the others follow as fast as the rule is expected to admit them. Turns more than _LONGEST_S ahead
        are not given; they begin again at the first one.
        """
        if self._rate:
            spacing_s = max(cost, self._mean_cost) / self._rate
        else:
            spacing_s = min(_UNKNOWN_S, (self._mean_held_s or _UNKNOWN_S) / max(1.0, self._part))
        first = self.at + max(self.wait_s(cost), _SOONEST_S)
        turn = max(first, self._last_turn + spacing_s)
        if turn > max(first, self.at + _LONGEST_S):
            turn = first
        self._last_turn = turn
        return turn - self.at

    # -- with the owner -----------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Return the report, and give back what is above the target. A debt is not told: the owner has `spent`."""
        before = self.level
        if self.target is not None:
            self.level = min(self.level, self.target)
        self._moved = before - self.level
        held = max(0.0, self.level)
        told = Report(self.rule, self.period, held, self.epoch, self.known, self.spent, self.is_asked, self.in_use)
        self.spent = 0.0
        self.is_dirty = self.is_asked = False
        return told

    def unreport(self, told: Report) -> None:
        """Take back a report that did not arrive, as far as one knows. The owner may know what it gave back, or may be
        away for long: that is used again only where nothing comes back by itself.
        """
        if told.period == self.period:
            self.spent += told.spent
            if not self._rate:
                self.level += self._moved
        self.is_asked |= told.is_asked
        self.is_dirty = True

    @property
    def has_too_much(self) -> bool:
        """True if it holds what others need at once. For what comes back between two exchanges they can wait."""
        return self.target is not None and self.level > self.target + self._rate * IDLE_S

    def apply(self, grant: Grant, epoch: str) -> None:
        """Take what the owner grants, less what was taken since the report."""
        if grant.period != self.period:
            return
        if grant.held is not None:
            self.level, self.epoch = min(self.limit, grant.held - self.spent), epoch
        known = min(self.limit, grant.left - self.spent)
        self.known = known if self.epoch == epoch else min(self.known, known)  # a new owner may know less
        self.target = grant.target
        if grant.held is None:
            self.is_dirty = True
        elif self.target is not None:
            is_short = self.level < min(self.target, LOW * self._part) - NO_DEBT
            self.is_dirty |= is_short or self.level > self.target + NO_DEBT


def _mean(before: float, newest: float) -> float:
    return before + _LEARN * (newest - before) if before else newest


class _Taken(NamedTuple):
    lease: QuotaLease
    units: float
    period: int
    at: float


@dataclass(slots=True)
class Reservation:
    """The units that one request holds until its end. `headers`: OpenAI's, after it was admitted. `budget_factor`: the
    share of its tokens that budgets count.
    """

    _taken: Sequence[_Taken] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    budget_factor: float = 1.0

    def extend(self, num_tokens: int, now: float) -> bool:
        """Reserve more tokens for a request that goes on; False, and nothing is reserved, if a limit has no room."""
        of_tokens = [one.lease for one in self._taken if _is_of_tokens(one.lease)]
        for lease in of_tokens:
            lease.refresh(now)
        full = [lease for lease in of_tokens if not lease.has_room(self._units(lease, num_tokens))]
        for lease in full:
            lease.refused()
        if full:
            return False
        for lease in of_tokens:
            lease.take(self._units(lease, num_tokens))
        self._taken = [
            one._replace(units=one.units + self._units(one.lease, num_tokens)) if _is_of_tokens(one.lease) else one
            for one in self._taken
        ]
        return True

    def settle(self, num_tokens: int, now: float) -> None:
        """End the request, which has used `num_tokens`. A second call changes nothing."""
        taken, self._taken = self._taken, ()
        for lease, units, period, at in taken:
            lease.refresh(now)
            lease.ended(max(0.0, now - at))
            kind, used = lease.rule.kind, self._units(lease, num_tokens)
            if kind == "parallel":
                lease.give_back(units, period)
            elif kind != "requests" and used < units:
                lease.give_back(units - used, period)
            elif kind != "requests" and used > units:
                lease.take(used - units)

    def _units(self, lease: QuotaLease, num_tokens: int) -> float:
        return num_tokens * self.budget_factor if lease.rule.kind == "budget" else float(num_tokens)


class QuotaGate:
    """The leases of one gateway of `num_gateways`. It is not thread-safe."""

    def __init__(self, num_gateways: int = 1) -> None:
        self._num_gateways, self._num_owners = num_gateways, 1
        self._leases: dict[Rule, QuotaLease] = {}
        self._max_leases = _NUM_LEASES
        self._epoch = ""
        self._rules: dict[tuple[str, str | None], tuple[Limits, Limits, tuple[Rule, ...]]] = {}
        self._admitted = Reservation()  # of all requests without limits

    def enter(self, principal: Principal, now: float) -> None:
        """Take a request of those of a minute, which is not given back, before anything is known of it.

        Raises RateLimited, and takes nothing, where none can begin now, however small it is.
        """
        leases = self._leases_of(principal, now)
        if not leases:
            return
        self._refuse_without_room([(lease, 1.0) for lease in leases])
        for lease in leases:
            if lease.rule.kind == "requests":
                lease.admit(1.0)

    def admit(
        self,
        principal: Principal,
        num_tokens: int,
        now: float,
        *,
        num_requests: int = 1,
        num_sequences: int = 1,
        budget_factor: float = 1.0,
    ) -> Reservation:
        """Reserve requests of those of a minute (beside the one that `enter` took), tokens, and sequences at once, in
        all that limits the principal. RateLimited: nothing is reserved. `budget_factor`: of Reservation.
        """
        leases = self._leases_of(principal, now)
        if not leases:
            return self._admitted
        units = {"requests": num_requests, "parallel": num_sequences, "budget": num_tokens * budget_factor}
        costs = [(lease, float(units.get(lease.rule.kind, num_tokens))) for lease in leases]
        costs = [(lease, cost) for lease, cost in costs if cost]
        self._refuse_without_room(costs)
        taken = []
        for lease, cost in costs:
            lease.admit(cost)
            taken.append(_Taken(lease, cost, lease.period, now))
        return Reservation(taken, headers_of(leases), budget_factor)

    def charge(self, principal: Principal, num_tokens: float, now: float) -> None:
        """Take tokens of those of a minute for work that is done already; no budget pays for it."""
        for lease in self._leases_of(principal, now):
            if lease.rule.kind == "tokens":
                lease.take(num_tokens)

    def _refuse_without_room(self, costs: Sequence[tuple[QuotaLease, float]]) -> None:
        full = [(lease, cost) for lease, cost in costs if not lease.has_room(cost)]
        if not full:
            return
        for lease, _ in full:
            lease.refused()
        wait, lease, cost = max(((lease.turn_s(cost), lease, cost) for lease, cost in full), key=lambda one: one[0])
        told: dict[str, str] = {LIMIT: lease.rule.kind}
        if any(lease.rule.kind == "budget" or cost > lease.rule.limit for lease, cost in full):
            told[SHOULD_RETRY] = "false"  # which clients obey: the same again is refused for long
        raise RateLimited(_message(lease, cost, wait), wait, told | headers_of([lease for lease, _ in costs]))

    def _leases_of(self, principal: Principal, now: float) -> list[QuotaLease]:
        rules = self._rules_of(principal)
        return [self._lease(rule, now) for rule in rules] if rules else []

    def _rules_of(self, principal: Principal) -> tuple[Rule, ...]:
        limits, of_tenant = principal.limits, principal.tenant_limits
        key = (principal.tenant, principal.key_id)
        known = self._rules.get(key)
        # The middleware gives one object to all requests of a key.
        if known is not None and known[0] is limits and known[1] is of_tenant:
            return known[2]
        if len(self._rules) >= _MAX_PRINCIPALS:
            self._rules.clear()
        rules = rules_of(principal)
        self._rules[key] = limits, of_tenant, rules
        return rules

    def _lease(self, rule: Rule, now: float) -> QuotaLease:
        lease = self._leases.get(rule)
        if lease is None:
            if len(self._leases) >= self._max_leases:
                self._forget_full(now)
            lease = self._new_lease(rule, now)
        else:
            lease.refresh(now)
        return lease

    def _forget_full(self, now: float) -> None:
        for lease in list(self._leases.values()):
            lease.refresh(now)
            if lease.is_full:
                del self._leases[lease.rule]
        self._max_leases = max(_NUM_LEASES, 2 * len(self._leases))

    def _new_lease(self, rule: Rule, now: float) -> QuotaLease:
        lease = self._leases[rule] = QuotaLease(rule, self._num_gateways, self._num_owners, now)
        lease.epoch = self._epoch
        return lease

    # -- with the owner -----------------------------------------------------------------------------------------------

    def reports(self, now: float) -> tuple[Report, ...]:
        """Report the rules of which the owner does not know all."""
        dirty = [lease for lease in self._leases.values() if lease.is_dirty]
        for lease in dirty:
            lease.refresh(now)
        return tuple(lease.report() for lease in dirty)

    def not_reported(self, reports: Iterable[Report]) -> None:
        """Take reports back that the owner did not answer."""
        for told in reports:
            if (lease := self._leases.get(told.rule)) is not None:  # a full one may have been forgotten meanwhile
                lease.unreport(told)

    def apply(self, reply: Reply, now: float) -> bool:
        """Return whether the owner should hear more at once: what is given back here, or all if it has started anew."""
        urgent = bool(self._epoch) and reply.epoch != self._epoch
        if urgent:
            for lease in self._leases.values():
                lease.is_dirty = True
        self._epoch = reply.epoch
        if reply.num_owners != self._num_owners:
            self._num_owners = reply.num_owners
            for lease in self._leases.values():
                lease.refresh(now)
                lease.divide(reply.num_owners)
        for grant in reply.grants:
            urgent |= self._apply(grant, now)
        return urgent

    def _apply(self, grant: Grant, now: float) -> bool:
        lease = self._leases.get(grant.rule)
        if grant.idle:
            if lease is not None and not lease.is_dirty and not lease.in_use:
                del self._leases[grant.rule]
            return False
        if lease is None:
            lease = self._new_lease(grant.rule, now)
        else:
            lease.refresh(now)
        lease.apply(grant, self._epoch)
        return lease.has_too_much


def _is_of_tokens(lease: QuotaLease) -> bool:
    return lease.rule.kind in ("tokens", "budget")


def _message(lease: QuotaLease, cost: float, wait: float) -> str:
    rule = lease.rule
    if not rule.limit:
        return f"rate limit reached: {rule.words} are allowed"
    if _is_of_tokens(lease) and cost > rule.limit:
        return (
            f"the request asks for {cost:.0f} tokens, prompt and max_tokens together, and the limit is {rule.words}: "
            "send a shorter prompt or a smaller max_tokens"
        )
    if cost > rule.limit:
        what = "prompts" if rule.kind == "requests" else "sequences, which are prompts times n,"
        return f"the request has {cost:.0f} {what} and the limit is {rule.words}: send fewer in one"
    asked = f", of which {cost:.0f} were asked and {lease.remaining:.0f} are left" if _is_of_tokens(lease) else ""
    return f"rate limit reached: {rule.words}{asked}; try again in {span(wait)}"


def headers_of(leases: Sequence[QuotaLease]) -> dict[str, str]:
    """Return OpenAI's headers, of the rule with the least left of each kind."""
    headers = {}
    for kind in ("requests", "tokens"):
        of_kind = [lease for lease in leases if lease.rule.kind == kind]
        if of_kind:
            lease = min(of_kind, key=lambda lease: lease.known)
            rule = lease.rule
            full_in = (lease.limit - lease.known) / lease.rate if lease.rate else 0.0
            headers[f"x-ratelimit-limit-{kind}"] = f"{rule.limit:.0f}"
            headers[f"x-ratelimit-remaining-{kind}"] = f"{math.floor(lease.remaining + 1e-6)}"
            headers[f"x-ratelimit-reset-{kind}"] = span(full_in)
    return headers


def span(seconds: float) -> str:
    """Write a time as OpenAI does: `12ms`, `1.5s`, `6m0s`, `26h3m0s`."""
    if seconds < 1:
        return f"{math.ceil(max(0.0, seconds) * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 1000) / 1000:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{rest}s"
