"""A replica's report to the routers: the adapters that it holds. It is small: every change is sent to every router.

An adapter is named by the first 64 bits of its digest. If two adapters collide, a request goes to the wrong replica,
which serves it all the same. Each tier is one string, because a list of thousands would be pickled, hashed and compared
item by item every time.

The number of requests is not part of the report: it changes constantly, and Serve sends it with each response.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

_KEY = 16  # hex digits
_BEAT_S = 10.0


def routing_key(digest: str) -> str:
    """The first 16 hex digits of a digest, which are unique among millions of adapters."""
    return digest[:_KEY]


class RoutingStats(TypedDict):
    """A report as Ray Serve transports it. `pool` and `host`: routing keys, concatenated."""

    pool: str
    host: str
    beat: int


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Routing keys of the adapters in the pool, and of those only on the host."""

    in_pool: frozenset[str] = frozenset()
    on_host: frozenset[str] = frozenset()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RoutingReport | None:
        """None if `raw` is no report: the replica has another version, or has not reported yet."""
        pool, host = raw.get("pool"), raw.get("host")
        if not isinstance(pool, str) or not isinstance(host, str):
            return None
        return cls(_split(pool), _split(host))


def make_report(in_pool: Iterable[str], on_host: Iterable[str], *, now: float) -> RoutingStats:
    """Builds a report from digests.

    `beat` changes every ten seconds of `now`, so that a router can distinguish an idle replica from one that no longer
    reports. If `now` is the time of day, it changes on all replicas at once.
    """
    return {"pool": _join(in_pool), "host": _join(on_host), "beat": int(now // _BEAT_S)}


def _join(digests: Iterable[str]) -> str:
    return "".join(sorted(routing_key(d) for d in digests))  # sorted, so that equal sets give equal reports


def _split(keys: str) -> frozenset[str]:
    return frozenset(keys[i : i + _KEY] for i in range(0, len(keys), _KEY))
