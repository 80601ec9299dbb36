"""Token buckets of keys and tenants, leased to gateways."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from loray.errors import RateLimited
from loray.spec import Limits, Principal, duration_of, duration_s

QuotaKind = Literal["requests", "tokens", "parallel", "budget"]
Owner = Literal["key", "tenant"]

MINUTE_S = 60.0
MOST_URGENT, LEAST_URGENT = -1_000, 999  # the priorities that a request may have


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
        """What one of so many owners grants. Each grants a request at once, where any are allowed."""
        part = self.limit / num_owners
        return max(part, min(self.limit, 1.0)) if self.kind == "parallel" else part

    def period(self, now: float) -> int:
        """Which of the budget's periods `now` is in; 0 for all others."""
        return int(now // self.period_s) if self.kind == "budget" else 0

    @property
    def words(self) -> str:
        """For messages: `120 requests a minute of key ab12`."""
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
        ("requests", limits.rpm_limit, MINUTE_S),
        ("tokens", limits.tpm_limit, MINUTE_S),
        ("parallel", limits.max_parallel_requests, 0.0),
        ("budget", limits.max_budget, duration_s(limits.budget_duration)),
    )
    return tuple(Rule(owner, subject, kind, limit, period) for kind, limit, period in found if limit is not None)


def allowed_priority(principal: Principal, priority: int) -> int:
    """The priority of a request for `priority`: within the range, and no more urgent than key and tenant may ask.

    Either of them that does not say may ask 0, an administrator's anything: priority comes before fairness.
    """
    unsaid = MOST_URGENT if principal.is_admin else 0
    given = (principal.limits.min_priority, principal.tenant_limits.min_priority)
    most_urgent = max(unsaid if value is None else value for value in given)
    return min(max(priority, most_urgent, MOST_URGENT), LEAST_URGENT)


LONGEST_S = 60.0  # OpenAI's clients take no longer wait from a server


class ReturnTimes:
    """Times for the requests that one rule refuses. If all were told the same time, they would come back together.

    Each refusal gets the next time: the first at which there may be room, and then one after another as fast as the
    rule is expected to admit them. Times more than LONGEST_S ahead are not given; they begin again at the first one.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = -math.inf

    def next_s(self, now: float, first_s: float, spacing_s: float) -> float:
        """Seconds from `now`; takes the turn. `first_s`: until there may be room; `spacing_s`: between two turns."""
        first = now + first_s
        turn = max(first, self._last + spacing_s)
        if turn > max(first, now + LONGEST_S):
            turn = first
        self._last = turn
        return turn - now


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


class QuotaLease:
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


OPEN_ENDED_TOKENS = 1024  # reserved at once for an answer whose request gives no limit
_MAX_PRINCIPALS = 4096  # whose rules are kept
_KEPT_SHARES = 1024  # full shares are forgotten above this


class _Taken(NamedTuple):
    share: QuotaLease
    units: float
    period: int
    at: float


class Reservation:
    """What one request holds until its end. `headers`: OpenAI's, after it was admitted."""

    __slots__ = ("_gate", "_taken", "headers")

    def __init__(self, gate: QuotaGate, taken: Sequence[_Taken], headers: Mapping[str, str]) -> None:
        self._gate, self._taken, self.headers = gate, taken, headers

    def extend(self, num_tokens: int, now: float) -> bool:
        """Reserve more tokens for a request that goes on. False: a limit has no room, and nothing more is reserved."""
        extended = self._gate.extend(self._taken, num_tokens, now)
        if extended is None:
            return False
        self._taken = extended
        return True

    def settle(self, num_tokens: int, now: float) -> None:
        """The request has ended, and has used `num_tokens`. A second call changes nothing."""
        taken, self._taken = self._taken, ()
        self._gate.settle(taken, num_tokens, now)


class QuotaGate:
    """The shares of one gateway of `num_gateways`. Not thread-safe. Times are seconds since the epoch.

    A gateway without an owner counts alone.
    """

    def __init__(self, num_gateways: int = 1) -> None:
        self._num_gateways, self._num_owners = num_gateways, 1
        self._shares: dict[Rule, QuotaLease] = {}
        self._max_shares = _KEPT_SHARES
        self._epoch = ""
        self._rules: dict[tuple[str, str | None], tuple[Limits, Limits, tuple[Rule, ...]]] = {}
        self._admitted = Reservation(self, (), {})  # of all requests without limits

    def enter(self, principal: Principal, now: float) -> None:
        """Take a request of those of a minute, which is not given back, before anything is known of it.

        Raises RateLimited, and takes nothing, where none can begin now, however small it is.
        """
        shares = self._shares_of(principal, now)
        if not shares:
            return
        self._refuse_without_room([(share, 1.0) for share in shares])
        for share in shares:
            if share.rule.kind == "requests":
                share.admit(1.0)

    def admit(
        self, principal: Principal, num_tokens: int, now: float, *, num_requests: int = 1, num_sequences: int = 1
    ) -> Reservation:
        """Reserve requests of those of a minute (beside the one that `enter` took), tokens, and sequences at once, in
        all that limits the principal. RateLimited: nothing is reserved.
        """
        shares = self._shares_of(principal, now)
        if not shares:
            return self._admitted
        units = {"requests": num_requests, "parallel": num_sequences}
        costs = [(share, float(units.get(share.rule.kind, num_tokens))) for share in shares]
        costs = [(share, cost) for share, cost in costs if cost]
        self._refuse_without_room(costs)
        taken = []
        for share, cost in costs:
            share.admit(cost)
            taken.append(_Taken(share, cost, share.period, now))
        return Reservation(self, taken, headers_of(shares))

    def charge(self, principal: Principal, num_tokens: float, now: float) -> None:
        """Take tokens of those of a minute for work that is done already; no budget pays for it."""
        for share in self._shares_of(principal, now):
            if share.rule.kind == "tokens":
                share.take(num_tokens)

    def extend(self, taken: Sequence[_Taken], num_tokens: int, now: float) -> Sequence[_Taken] | None:
        """What is taken with `num_tokens` more; None where a limit has no room."""
        of_tokens = [one.share for one in taken if _is_of_tokens(one.share)]
        for share in of_tokens:
            share.refresh(now)
        full = [share for share in of_tokens if not share.has_room(num_tokens)]
        for share in full:
            share.refused(num_tokens)
        if full:
            return None
        for share in of_tokens:
            share.take(num_tokens)
        return [one._replace(units=one.units + num_tokens) if _is_of_tokens(one.share) else one for one in taken]

    def settle(self, taken: Sequence[_Taken], num_tokens: int, now: float) -> None:
        for share, units, period, at in taken:
            share.refresh(now)
            share.ended(max(0.0, now - at))
            kind = share.rule.kind
            if kind == "parallel":
                share.give_back(units, period)
            elif kind != "requests" and num_tokens < units:
                share.give_back(units - num_tokens, period)
            elif kind != "requests" and num_tokens > units:
                share.take(num_tokens - units)

    def _refuse_without_room(self, costs: Sequence[tuple[QuotaLease, float]]) -> None:
        full = [(share, cost) for share, cost in costs if not share.has_room(cost)]
        if not full:
            return
        for share, cost in full:
            share.refused(cost)
        wait, share, cost = max(((share.turn_s(cost), share, cost) for share, cost in full), key=lambda one: one[0])
        raise RateLimited(_message(share, cost, wait), wait, headers_of([share for share, _ in costs]))

    def _shares_of(self, principal: Principal, now: float) -> list[QuotaLease]:
        rules = self._rules_of(principal)
        return [self._share(rule, now) for rule in rules] if rules else []

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

    def _share(self, rule: Rule, now: float) -> QuotaLease:
        share = self._shares.get(rule)
        if share is None:
            if len(self._shares) >= self._max_shares:
                self._forget_full(now)
            share = self._new_share(rule, now)
        else:
            share.refresh(now)
        return share

    def _forget_full(self, now: float) -> None:
        for share in list(self._shares.values()):
            share.refresh(now)
            if share.is_full:
                del self._shares[share.rule]
        self._max_shares = max(_KEPT_SHARES, 2 * len(self._shares))

    def _new_share(self, rule: Rule, now: float) -> QuotaLease:
        share = self._shares[rule] = QuotaLease(rule, self._num_gateways, self._num_owners, now)
        return share

    # -- with the owner -----------------------------------------------------------------------------------------------

    def reports(self, now: float) -> tuple[Report, ...]:
        """Of the rules of which the owner does not know all."""
        dirty = [share for share in self._shares.values() if share.is_dirty]
        for share in dirty:
            share.refresh(now)
        return tuple(share.report() for share in dirty)

    def not_reported(self, reports: Iterable[Report]) -> None:
        """The owner did not answer."""
        for told in reports:
            if (share := self._shares.get(told.rule)) is not None:  # a full one may have been forgotten meanwhile
                share.unreport(told)

    def apply(self, reply: Reply, now: float) -> bool:
        """Whether the owner should hear more at once: what this gateway gives back, or all if it has started anew."""
        urgent = bool(self._epoch) and reply.epoch != self._epoch
        if urgent:
            for share in self._shares.values():
                share.is_dirty = True
        self._epoch = reply.epoch
        if reply.num_owners != self._num_owners:
            self._num_owners = reply.num_owners
            for share in self._shares.values():
                share.refresh(now)
                share.divide(reply.num_owners)
        for grant in reply.grants:
            urgent |= self._apply(grant, now)
        return urgent

    def _apply(self, grant: Grant, now: float) -> bool:
        share = self._shares.get(grant.rule)
        if grant.idle:
            if share is not None and not share.is_dirty and not share.in_use:
                del self._shares[grant.rule]
            return False
        if share is None:
            share = self._new_share(grant.rule, now)
        else:
            share.refresh(now)
        share.apply(grant)
        return share.has_too_much


def _is_of_tokens(share: QuotaLease) -> bool:
    return share.rule.kind in ("tokens", "budget")


def _message(share: QuotaLease, cost: float, wait: float) -> str:
    rule = share.rule
    if not rule.limit:
        return f"rate limit reached: {rule.words} are allowed"
    if _is_of_tokens(share) and cost > rule.limit:
        return (
            f"the request asks for {cost:.0f} tokens, prompt and max_tokens together, and the limit is {rule.words}: "
            "send a shorter prompt or a smaller max_tokens"
        )
    if cost > rule.limit:
        what = "prompts" if rule.kind == "requests" else "sequences, which are prompts times n,"
        return f"the request has {cost:.0f} {what} and the limit is {rule.words}: send fewer in one"
    asked = f", of which {cost:.0f} were asked and {share.remaining:.0f} are left" if _is_of_tokens(share) else ""
    return f"rate limit reached: {rule.words}{asked}; try again in {span(wait)}"


def headers_of(shares: Sequence[QuotaLease]) -> dict[str, str]:
    """OpenAI's headers, of the rule with the least left of each kind."""
    headers = {}
    for kind in ("requests", "tokens"):
        of_kind = [share for share in shares if share.rule.kind == kind]
        if of_kind:
            share = min(of_kind, key=lambda share: share.known)
            rule = share.rule
            full_in = (share.limit - share.known) / share.rate if share.rate else 0.0
            headers[f"x-ratelimit-limit-{kind}"] = f"{rule.limit:.0f}"
            headers[f"x-ratelimit-remaining-{kind}"] = f"{math.floor(share.remaining + 1e-6)}"
            headers[f"x-ratelimit-reset-{kind}"] = span(full_in)
    return headers


def span(seconds: float) -> str:
    """As OpenAI writes it: `12ms`, `1.5s`, `6m0s`, `26h3m0s`."""
    if seconds < 1:
        return f"{math.ceil(max(0.0, seconds) * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 1000) / 1000:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{rest}s"


RESERVE = 0.05  # of what is left: divided among all gateways, whether they ask or not
GONE_S = 10.0  # without a word, after which a gateway's requests have ended
TOLD_S = 5.0  # between two times that owners tell each other what they counted
_DEMAND_S = 5.0  # in which demand fades
_LOW = 0.5  # of a gateway's part: below it, others are asked to give back
_SHORT_S = 2.0  # how long others are asked to give back for a gateway that asked for more


class _Holder:
    """What a gateway holds of a rule at most, since its last report."""

    __slots__ = ("at", "demand", "in_use", "level")

    def __init__(self, level: float, now: float) -> None:
        self.level, self.at = level, now
        self.demand = self.in_use = 0.0


class _Meter:
    """All that is left of this owner's part of one rule, and who holds it.

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
        """What the first gateway to report the rule has known, for it may know more than owners that are gone told."""
        lower = min(self.left, known)
        if is_alone and self.rate:
            self.untold += self.left - lower
        if is_anew or is_alone:
            self.left = lower

    def know(self, used: float, num_owners: int, *, is_anew: bool, was_new: bool) -> None:
        """What all owners have used of the rule, without what is untold here. `is_anew`: they divide all that is left.

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

    def target(self, gateway: str, num_gateways: int) -> float | None:
        total = sum(holder.demand for holder in self.holders.values())
        if total < NO_DEBT:
            return None
        holder = self.holders.get(gateway)
        share = (1 - RESERVE) * (holder.demand / total if holder else 0.0) + RESERVE / num_gateways
        return max(0.0, self.left) * share


class QuotaOwner:
    """Answers the reports of `num_gateways` gateways, and divides limits with other owners, of which there are
    `num_owners`, this one included. Not thread-safe.

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
        """What others are to know. Requests at once are told nobody: each owner has its part. Forgets unused rules."""
        counted = []
        for rule, meter in list(self._meters.items()):
            meter.refresh(now)
            if self._is_idle(meter):
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
        target = meter.target(gateway, self._num_gateways)
        wish = (meter.part if target is None else target) - holder.level
        granted = min(wish, self._free(meter))
        if granted < wish and report.wanted and holder.level + granted < _LOW * meter.part:
            meter.short_until = now + _SHORT_S
            self._short.add(rule)
        granted = max(0.0, granted)
        holder.level += granted
        idle = self._is_idle(meter)
        if idle:
            self._forget(rule)
        return Grant(rule, granted, meter.left, target, idle)

    def _new(self, rule: Rule, now: float) -> _Meter:
        meter = self._meters[rule] = _Meter(rule, self._num_gateways, self.num_owners, now)
        return meter

    def _forget(self, rule: Rule) -> None:
        del self._meters[rule]
        self._short.discard(rule)

    def _free(self, meter: _Meter) -> float:
        """What no gateway holds. One that has not reported the rule holds its part."""
        silent = max(0, self._num_gateways - len(meter.holders))
        return meter.left - sum(holder.level for holder in meter.holders.values()) - silent * meter.part

    def _is_idle(self, meter: _Meter) -> bool:
        full = meter.left >= meter.limit * (1 - 1e-9)
        return full and all(h.level <= meter.part + NO_DEBT and not h.in_use for h in meter.holders.values())

    def _moved(self, gateway: str, reported: set[Rule], now: float) -> list[Grant]:
        """Grants of rules that were not reported: where a gateway asks for more, what another one is to give back and
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
            target = meter.target(gateway, self._num_gateways)
            held = meter.part if holder is None else holder.level
            if rule not in to_tell and (target is None or abs(held - target) < NO_DEBT):
                continue
            wish = (meter.part if target is None else target) - held
            granted = 0.0 if holder is None else max(0.0, min(wish, self._free(meter)))
            if holder is not None:
                holder.level += granted
            grants.append(Grant(rule, granted, meter.left, target))
        return grants

    def _drop_gone(self, now: float) -> None:
        self._heard = {gateway: min(heard, now) for gateway, heard in self._heard.items()}  # clocks may go back
        gone = [gateway for gateway, heard in self._heard.items() if now - heard > GONE_S]
        for gateway in gone:
            del self._heard[gateway], self._to_tell[gateway]
            for meter in self._meters.values():
                meter.holders.pop(gateway, None)
                meter.count_parallel()
