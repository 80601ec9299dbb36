"""A row of the table: what one router made of the trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from benchmarks.cluster.measured import Figures, Seen
from benchmarks.cluster.trace import HOT_SHARE
from benchmarks.report import Cell, Verdict, quantile
from loray.policy.routing import RoutingPolicy

COLUMNS = (
    "router", "in pool\t.1%", "on host\t.1%", "cold loads", "p50 TTFT, ms\t.1f", "p99 TTFT, ms\t.1f", "busiest\t.2f",
    "most", "above", "tok/s\t.1f", "hot after, s\t.2f", "errors", "load\t.2f",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """pool, host       shares of the requests that found their adapter in the replica's pool, or in its host memory
    cold_loads       loads into host memory
    p50_ttft_s, p99_ttft_s   from a request's due time to its first token, without probes
    busiest          requests of the replica that got most, by the mean
    above            requests whose replica had more than loray's bound when it had accepted them, as the client saw it
    above_known      the same by what the router knew; loray's only
    most             the most requests that a replica had, when it had accepted one, as the client saw it
    tokens_per_s     generated, from the first due time to the last token
    hot_replicas     replicas that the sudden adapter needs; hot_s: seconds until so many answered for it, NaN: never
    errors           requests that failed
    load             load average of the machine before
    """

    router: str
    requests: int
    pool: float
    host: float
    cold_loads: int
    p50_ttft_s: float
    p99_ttft_s: float
    busiest: float
    above: int
    above_known: int
    most: int
    tokens_per_s: float
    hot_replicas: int
    hot_s: float
    errors: int
    load: float

    @property
    def cells(self) -> list[Cell]:
        ms = [1e3 * self.p50_ttft_s, 1e3 * self.p99_ttft_s]
        ends = [self.busiest, self.most, self.above, self.tokens_per_s, self.hot_s, self.errors, self.load]
        return [self.router, self.pool, self.host, self.cold_loads, *ms, *ends]


def row(
    router: str,
    counted: Sequence[Seen],
    hot: Sequence[Seen],
    hot_adapter: int,
    before: Sequence[Figures],
    after: Sequence[Figures],
    load: float,
) -> Row:
    """`before` and `after`: of all replicas, around what is counted."""

    def counts(field: str) -> int:
        return sum(int(getattr(f, field)) for f in after) - sum(int(getattr(f, field)) for f in before)

    good = [seen for seen in counted if not seen.error]
    loads = client_loads(good)
    ttft = [seen.ttft for seen in good if not seen.probe]
    by_replica = Counter(seen.replica for seen in good)
    needed = replicas_needed(HOT_SHARE, len(after))
    return Row(
        router=router,
        requests=len(counted),
        pool=counts("num_pool_hits") / len(counted),
        host=counts("num_host_hits") / len(counted),
        cold_loads=counts("num_loads"),
        p50_ttft_s=quantile(ttft, 0.5),
        p99_ttft_s=quantile(ttft, 0.99),
        busiest=max(by_replica.values(), default=0) * len(after) / max(1, len(good)),
        above=num_above(loads, len(after)),
        above_known=num_above([(s.load, sum(s.loads)) for s in good if s.loads], len(after)),
        most=max((load for load, _ in loads), default=0),
        tokens_per_s=sum(s.num_output for s in good) / (max(s.last for s in good) - counted[0].at) if good else 0.0,
        hot_replicas=needed,
        hot_s=spread_after(hot, hot_adapter, needed),
        errors=sum(bool(seen.error) for seen in (*counted, *hot)),
        load=load,
    )


def replicas_needed(share: float, num_replicas: int) -> int:
    """By an adapter with this share of the requests, each replica having at most c times their mean."""
    return min(num_replicas, ceil(share * num_replicas / RoutingPolicy().factor))


def client_loads(seen: Sequence[Seen]) -> list[tuple[int, int]]:
    """For each request, when its replica had accepted it: the requests on that replica and on all, itself included.
    Those are on a replica that it has accepted and whose last token has not come.
    """
    return [
        (sum(other.replica == s.replica for other in busy), len(busy))
        for s in seen
        for busy in [[other for other in seen if other is s or other.routed <= s.routed < other.last]]
    ]


def num_above(loads: Iterable[tuple[int, int]], num_replicas: int) -> int:
    """Requests after which their replica had more than the bound allows. `loads`: see `client_loads`."""
    policy = RoutingPolicy()
    return sum(load > policy.max_load(total - 1, num_replicas) for load, total in loads)


def spread_after(hot: Sequence[Seen], adapter: int, num_replicas: int) -> float:
    """Seconds from the first request for the adapter until so many replicas have sent a first token for it. NaN: they
    never did.
    """
    asked = [seen for seen in hot if seen.adapter == adapter and not seen.error]
    found: set[str] = set()
    for seen in sorted(asked, key=lambda seen: seen.first):
        found.add(seen.replica)
        if len(found) == num_replicas:
            return seen.first - min(s.at for s in asked)
    return float("nan")


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """What is asked of loray."""
    by_name = {r.router: r for r in rows}
    if (ours := by_name.get("loray")) is None:
        return []
    found = [Verdict("requests above the bound that the router knew", "≤", 0, ours.above_known)]
    if (ray := by_name.get("ray")) is not None:
        share = ours.cold_loads / max(1, ray.cold_loads)
        found.append(Verdict("cold loads by those of Ray Serve's default", "≤", 1 / 3, share))
    found.append(Verdict(f"a sudden adapter on {ours.hot_replicas} replicas, s", "≤", 5, ours.hot_s))
    return found
