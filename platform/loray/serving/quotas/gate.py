"""A gateway's decisions: may this request begin, what it has reserved, and what its headers say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from loray.errors import RateLimited
from loray.serving.quotas.rules import Rule, rules_of
from loray.serving.quotas.shares import Grant, Reply, Report, Share
from loray.spec import Limits, Principal

OPEN_ENDED_TOKENS = 1024  # reserved at once for an answer whose request gives no limit
_MAX_PRINCIPALS = 4096  # whose rules are kept
_KEPT_SHARES = 1024  # full shares are forgotten above this


class _Taken(NamedTuple):
    share: Share
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
        self._shares: dict[Rule, Share] = {}
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

    def _refuse_without_room(self, costs: Sequence[tuple[Share, float]]) -> None:
        full = [(share, cost) for share, cost in costs if not share.has_room(cost)]
        if not full:
            return
        for share, cost in full:
            share.refused(cost)
        wait, share, cost = max(((share.turn_s(cost), share, cost) for share, cost in full), key=lambda one: one[0])
        raise RateLimited(_message(share, cost, wait), wait, headers_of([share for share, _ in costs]))

    def _shares_of(self, principal: Principal, now: float) -> list[Share]:
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

    def _share(self, rule: Rule, now: float) -> Share:
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

    def _new_share(self, rule: Rule, now: float) -> Share:
        share = self._shares[rule] = Share(rule, self._num_gateways, self._num_owners, now)
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


def _is_of_tokens(share: Share) -> bool:
    return share.rule.kind in ("tokens", "budget")


def _message(share: Share, cost: float, wait: float) -> str:
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


def headers_of(shares: Sequence[Share]) -> dict[str, str]:
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
