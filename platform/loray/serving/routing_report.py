"""What a replica tells the routers: the adapters that it holds. Small, because every change goes to every router.

Adapters by the first 64 bits of their digest: where two agree, a request goes to the wrong replica and is served
there. In one string for each tier: a list of thousands would be pickled, hashed and compared item by item, every time.

The number of requests is not in it. It changes all the time, and Serve tells a router with each answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

_KEY = 16  # hex digits
_BEAT_S = 10.0


def routing_key(digest: str) -> str:
    return digest[:_KEY]


class RoutingStats(TypedDict):
    """A report as Ray Serve carries it. `pool` and `host`: routing keys in one string."""

    pool: str
    host: str
    beat: int


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Routing keys of the adapters in the pool, and of those that are only on the host."""

    in_pool: frozenset[str] = frozenset()
    on_host: frozenset[str] = frozenset()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> RoutingReport | None:
        """None where it is not one: a replica of another version, or one that has not reported yet."""
        pool, host = raw.get("pool"), raw.get("host")
        if not isinstance(pool, str) or not isinstance(host, str):
            return None
        return cls(_split(pool), _split(host))


def make_report(in_pool: Iterable[str], on_host: Iterable[str], *, now: float) -> RoutingStats:
    """From digests. `beat` changes every ten seconds of `now` (any clock), on all replicas at once where it is the
    time of day: a router can tell a replica at rest from one that has fallen silent."""
    return {"pool": _join(in_pool), "host": _join(on_host), "beat": int(now // _BEAT_S)}


def _join(digests: Iterable[str]) -> str:
    return "".join(sorted(routing_key(d) for d in digests))  # sorted: the same set is the same report


def _split(keys: str) -> frozenset[str]:
    return frozenset(keys[i : i + _KEY] for i in range(0, len(keys), _KEY))
