"""Rules of canaries: which requests one answers, and when it is ended."""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Literal, NamedTuple

from loray.spec import CanaryBounds, CanaryCounts, LogMoments, Principal, format_seconds

Bound = Literal["error_rate", "ttft", "itl"]

_DEVIATIONS = 2.0  # standard errors by which a ratio of times must lie above its bound


class Arm(NamedTuple):
    """One of the two versions among which a canary divides an alias's requests. `id` is the canary's."""

    id: int
    is_canary: bool


def session_of(principal: Principal, session_id: str | None, user: str | None) -> str | None:
    """Return what the requests of one session have in common: the session that the client names, else the `user` of the
    body, else the key, also when it is rotated. Tenants have sessions of their own. None: nothing is known.
    """
    for kind, value in (("session", session_id), ("user", user), ("key", principal.account)):
        if value:
            return f"{principal.tenant}/{kind}/{value}"
    return None


def is_taken(canary: str, session: str, percent: int) -> bool:
    """Return whether the canary answers this session. `canary` names it: another one draws other sessions.

    A session has one of 100 places, by its hash, and the canary the first `percent` of them: a larger share keeps the
    sessions that a smaller one had, and moves those alone that are missing.
    """
    place = int.from_bytes(blake2b(f"{canary}\0{session}".encode(), digest_size=8).digest()) % 100
    return place < percent


class Breach(NamedTuple):
    """The bound that a canary has left, and a sentence that says how."""

    bound: Bound
    reason: str


def breach(bounds: CanaryBounds, counts: CanaryCounts) -> Breach | None:
    """Return the first bound that the canary has left; None: it is inside of all.

    Errors count against `min_requests` until there are as many requests: a version that fails always is not served so
    long. Times are compared once each version has been measured `min_requests` times. Their ratio must lie above its
    bound by more than chance would explain.
    """
    canary, stable = counts.canary, counts.stable
    if bounds.max_error_rate is not None:
        allowed = bounds.max_error_rate * max(canary.num_requests, bounds.min_requests)
        if canary.num_errors > allowed:
            return Breach(
                "error_rate",
                f"{canary.num_errors} of {canary.num_requests} requests failed; of {bounds.min_requests} or more "
                f"{bounds.max_error_rate:.1%} may ({stable.num_errors} of {stable.num_requests} of the stable version)",
            )
    times: tuple[tuple[Bound, str, float | None, LogMoments, LogMoments], ...] = (
        ("ttft", "time to first token", bounds.max_ttft_ratio, canary.ttft, stable.ttft),
        ("itl", "time between tokens", bounds.max_itl_ratio, canary.itl, stable.itl),
    )
    for bound, what, most, new, old in times:
        if most is not None and min(new.num, old.num) >= bounds.min_requests and _is_above(most, new, old):
            return Breach(
                bound,
                f"its {what} is {new.mean / old.mean:.2f} times the stable version's ({format_seconds(new.mean)} and "
                f"{format_seconds(old.mean)}, of {new.num} and {old.num} requests); {most:g} times is allowed",
            )
    return None


def _is_above(most: float, new: LogMoments, old: LogMoments) -> bool:
    log_ratio = new.total / new.num - old.total / old.num
    return log_ratio - _DEVIATIONS * math.sqrt(new.variance + old.variance) > math.log(most)
