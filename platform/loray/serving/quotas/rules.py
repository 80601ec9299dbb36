"""What limits a principal: one rule for each limit of its key and of its tenant."""

from __future__ import annotations

from typing import Literal, NamedTuple

from loray.spec import Limits, Principal, duration_of, duration_s

Kind = Literal["requests", "tokens", "parallel", "budget"]
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
    kind: Kind
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
    found: tuple[tuple[Kind, float | None, float], ...] = (
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
