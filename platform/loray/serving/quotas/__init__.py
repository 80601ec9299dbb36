"""Quotas: limits of keys and tenants, counted over all gateways of a deployment.

Each of N gateways holds a share of every limit: a token bucket with 1/N of its size and 1/N of its rate, until the
owner moves what one gateway does not use to another. A decision is made from what the gateway holds and has been told,
so no request waits for another process.

Stated bound. In any window of w seconds all gateways together admit at most `limit · (1 + w/60)` (of a budget or of
parallel requests: `limit`), and one request more for each gateway: a request is admitted when its gateway's share is
not used up and the limit, as far as the gateway knows, has room for it. What was admitted beyond a share is paid back
first. At most 5 % of a limit lies unused in shares of gateways without demand for it.

Several deployments on one database have an owner each, which grants the limit divided by their number, and learns
each TOLD_S what all have used: all together admit at most the bound and what one of them grants in that time.

Without the owner each gateway goes on with its share: at most the limit is admitted, and less where requests come to
some of the gateways alone.
"""

from loray.serving.quotas.gate import OPEN_ENDED_TOKENS, QuotaGate, Reservation
from loray.serving.quotas.owner import TOLD_S, QuotaOwner
from loray.serving.quotas.rules import Rule, allowed_priority, rules_of
from loray.serving.quotas.shares import IDLE_S, Counted, Grant, Reply, Report

__all__ = [
    "IDLE_S",
    "OPEN_ENDED_TOKENS",
    "TOLD_S",
    "Counted",
    "Grant",
    "QuotaGate",
    "QuotaOwner",
    "Reply",
    "Report",
    "Reservation",
    "Rule",
    "allowed_priority",
    "rules_of",
]
