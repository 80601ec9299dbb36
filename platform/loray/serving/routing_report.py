"""What a replica reports to the gateways: the adapters that it holds, all of them once, then what has changed.

An adapter is named by the first 64 bits of its digest. If two adapters collide, a request goes to the wrong replica,
which serves it all the same.

Deltas form a series, one for each connection of a replica to a gateway, and are numbered in it. So a gateway knows when
it has missed one, and asks for everything again; and the deltas of a replica are never applied to what its predecessor,
or an older connection, has said.

The number of requests is not part of the report: it changes constantly, and Serve sends it with each response.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

KEY_DIGITS = 16
MAX_KEYS = 1 << 15  # in one delta: 256 KiB, a fraction of the channel's largest frame
_FORGOTTEN_S = 300.0  # a report that is so old: no policy of routing uses it


def routing_key(digest: str) -> str:
    """The first 16 hex digits of a digest, which are unique among millions of adapters."""
    return digest[:KEY_DIGITS]


class Held(NamedTuple):
    """Digests of the adapters in a replica's pool, and of those only on its host."""

    in_pool: Collection[str] = ()
    on_host: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class RoutingDelta:
    """What has changed since the delta before it. Adapters are named by their routing keys, each at most once.

    series, number    deltas of one series are numbered one after the other
    is_whole          what was said before counts no more
    in_pool, on_host  adapters that are in the pool now; only on the host now
    gone              adapters that are on neither now
    """

    series: str
    number: int
    is_whole: bool
    in_pool: tuple[str, ...] = ()
    on_host: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Routing keys of the adapters in the pool, and of those only on the host, after delta `number` of `series`."""

    series: str
    number: int
    in_pool: frozenset[str] = frozenset()
    on_host: frozenset[str] = frozenset()


def apply(report: RoutingReport | None, delta: RoutingDelta) -> RoutingReport | None:
    """The report after `delta`; None if the delta does not follow `report`, and the whole is needed."""
    in_pool: frozenset[str] = frozenset()
    on_host = in_pool
    if not delta.is_whole:
        if report is None or (delta.series, delta.number) != (report.series, report.number + 1):
            return None
        in_pool, on_host = report.in_pool, report.on_host
    moved = {*delta.in_pool, *delta.on_host, *delta.gone}
    return RoutingReport(
        delta.series, delta.number, (in_pool - moved).union(delta.in_pool), (on_host - moved).union(delta.on_host)
    )


class RoutingSeries:
    """A replica's side of one series: it knows what it has told."""

    def __init__(self, name: str) -> None:
        """`name`: no other series of any replica has it."""
        self._name = name
        self._number = -1
        self._held = Held()
        self._told: tuple[frozenset[str], frozenset[str]] | None = None  # of `_held`

    def restart(self) -> None:
        """The next deltas tell everything again."""
        self._told = None

    def deltas(self, held: Held) -> list[RoutingDelta]:
        """What is to be sent now, in this order. Nothing if nothing has changed."""
        if self._told is not None and held == self._held:  # the same digests in the same order: quick to see
            return []
        self._held = held
        in_pool = frozenset(map(routing_key, held.in_pool))
        on_host = frozenset(map(routing_key, held.on_host)) - in_pool
        is_whole = self._told is None
        was_in_pool, was_on_host = self._told or (frozenset[str](), frozenset[str]())
        self._told = in_pool, on_host
        gone = (was_in_pool | was_on_host) - in_pool - on_host
        deltas: list[RoutingDelta] = []
        for part in _parts(in_pool - was_in_pool, on_host - was_on_host, gone):
            self._number += 1
            deltas.append(RoutingDelta(self._name, self._number, is_whole, *part))
            is_whole = False
        if is_whole:
            self._number += 1
            deltas.append(RoutingDelta(self._name, self._number, is_whole))
        return deltas


def _parts(*kinds: Collection[str]) -> Iterator[list[tuple[str, ...]]]:
    """The keys of all kinds, at most MAX_KEYS at once."""
    keys = [(kind, key) for kind, of_kind in enumerate(kinds) for key in sorted(of_kind)]
    for start in range(0, len(keys), MAX_KEYS):
        part = keys[start : start + MAX_KEYS]
        yield [tuple(key for kind, key in part if kind == wanted) for wanted in range(len(kinds))]


class Known(NamedTuple):
    """`at`: when the replica last gave a sign of life."""

    report: RoutingReport
    at: float


class RoutingReports:
    """What a gateway knows of its replicas. Times are seconds of any monotonic clock.

    One thread writes; others may read meanwhile.
    """

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}

    def of(self, replica: str) -> Known | None:
        return self._known.get(replica)

    def take(self, replica: str, delta: RoutingDelta, now: float) -> bool:
        """False if a delta was missed before this one: the replica must tell everything again."""
        known = self._known.get(replica)
        report = apply(None if known is None else known.report, delta)
        if report is None:
            return False
        if known is None:
            for other in [r for r, k in self._known.items() if k.at < now - _FORGOTTEN_S]:
                del self._known[other]
        self._known[replica] = Known(report, now)
        return True

    def alive(self, replica: str, now: float) -> None:
        """The replica still gives signs of life: nothing has changed."""
        if (known := self._known.get(replica)) is not None:
            self._known[replica] = known._replace(at=now)
