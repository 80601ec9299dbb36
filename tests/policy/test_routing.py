"""Routing by adapter: order, bounds, memory, decisions without reports; and what replicas report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.policy import routing
from loray.policy.routing import (
    Candidate,
    Held,
    ReplicaView,
    Routing,
    RoutingDelta,
    RoutingPolicy,
    RoutingReport,
    RoutingReports,
    RoutingSeries,
    apply,
    routing_key,
)

POLICY = RoutingPolicy(floor=4)
ADAPTERS = [f"{i:016x}" for i in range(200)]
adapters = st.sampled_from(ADAPTERS[:8])
adapter_sets = st.frozensets(adapters, max_size=8)


@st.composite
def views(draw: st.DrawFn, min_size: int = 1) -> list[ReplicaView]:
    names = draw(st.lists(st.text("abcdef0123456789", min_size=1, max_size=8), unique=True, min_size=min_size))
    return [
        ReplicaView(
            name,
            load=draw(st.integers(0, 40)),
            limit=draw(st.integers(1, 40)),
            in_pool=draw(adapter_sets),
            on_host=draw(adapter_sets),
            age_s=draw(st.sampled_from([0.0, 1.0, 1e6])),
            suspect=draw(st.booleans()),
        )
        for name in names
    ]


def replicas(n: int, *, load: int = 0, limit: int = 100) -> list[ReplicaView]:
    return [ReplicaView(f"r{i}", load, limit) for i in range(n)]


def best(adapter: str | None, among: Sequence[ReplicaView], routing: Routing | None = None) -> Candidate:
    return (routing or Routing(POLICY)).rank(among, adapter, now=0.0)[0]


def hash_order(adapter: str, among: Sequence[ReplicaView]) -> list[str]:
    return [c.replica for c in Routing(POLICY).rank([ReplicaView(r.id, 0, 1) for r in among], adapter, now=0.0)]


# -- properties of every decision -------------------------------------------------------------------------------------


@given(views(min_size=0), st.none() | adapters)
def test_every_replica_appears_exactly_once_whatever_the_order_they_come_in(
    among: list[ReplicaView], adapter: str | None
) -> None:
    ranked = Routing(POLICY).rank(among, adapter, now=0.0, tie="t")
    assert sorted(c.replica for c in ranked) == sorted(r.id for r in among)
    assert Routing(POLICY).rank(among[::-1], adapter, now=0.0, tie="t") == ranked


@given(views(), adapters)
def test_the_first_choice_is_within_the_bound(among: list[ReplicaView], adapter: str) -> None:
    free = {r.id: r for r in among if not r.suspect and r.load < r.limit}
    chosen = best(adapter, among).replica
    if free:
        assert free[chosen].load + 1 <= POLICY.max_load(sum(r.load for r in free.values()), len(free))
    else:
        usable = [r.id for r in among if not r.suspect]
        assert not usable or chosen in usable


@given(views(), adapters)
def test_a_holder_is_passed_over_only_for_a_load(among: list[ReplicaView], adapter: str) -> None:
    free = [r for r in among if not r.suspect and r.load < r.limit]
    if not free:
        return
    max_load = POLICY.max_load(sum(r.load for r in free), len(free))
    ready = [r for r in free if r.load < max_load and r.age_s < POLICY.max_age_s]
    in_pool, on_host = (
        {r.id for r in ready if adapter in held(r)} for held in (lambda r: r.in_pool, lambda r: r.on_host)
    )
    chosen = best(adapter, among)
    if in_pool:
        assert chosen in {(name, "pool") for name in in_pool}
    elif on_host:
        assert chosen in {(name, "host") for name in on_host} or any(is_crowded(r, free) for r in ready)
    else:
        assert chosen.reason in ("hash", "overflow")


def is_crowded(replica: ReplicaView, free: Sequence[ReplicaView]) -> bool:
    """Whether it holds more than its share of adapters."""
    held = {r.id: len(r.in_pool) + len(r.on_host) if r.age_s < POLICY.max_age_s else 0 for r in free}
    return held[replica.id] >= POLICY.bound(sum(held.values()), len(held))


@given(st.integers(2, 12), st.data())
def test_a_replica_that_leaves_moves_its_own_adapters_alone(n: int, data: st.DataObject) -> None:
    among = replicas(n)
    gone = data.draw(st.sampled_from(among))
    for adapter in ADAPTERS:
        before, after = hash_order(adapter, among), hash_order(adapter, [r for r in among if r is not gone])
        assert after == [name for name in before if name != gone.id]


def test_the_hash_is_the_same_in_every_process() -> None:
    """Otherwise gateways would disagree, and a restart would move every adapter."""
    assert hash_order(ADAPTERS[0], replicas(4)) == ["r1", "r2", "r0", "r3"]


@given(views(), st.text(max_size=4))
def test_requests_for_the_base_go_where_there_is_least_to_do(among: list[ReplicaView], tie: str) -> None:
    free = [r for r in among if not r.suspect and r.load < r.limit]
    chosen = Routing(POLICY).rank(among, None, now=0.0, tie=tie)[0]
    assert chosen.reason == "base"
    if free:
        assert chosen.replica in {r.id for r in free if r.load == min(f.load for f in free)}


def test_requests_for_the_base_spread_over_idle_replicas() -> None:
    counts = Counter(Routing(POLICY).rank(replicas(4), None, now=0.0, tie=f"{i}")[0].replica for i in range(400))
    assert min(counts.values()) > 60


# -- what is known ----------------------------------------------------------------------------------------------------


def test_pool_then_host_then_recently_sent_then_hash() -> None:
    among, adapter = replicas(4), ADAPTERS[0]
    pool, host, recent, home = reversed(hash_order(adapter, among))  # the reverse of the hash's order
    routing = Routing(POLICY)
    routing.sent(Candidate(recent, "overflow"), adapter, now=0.0)
    held = {pool: {"in_pool": frozenset({adapter})}, host: {"on_host": frozenset({adapter})}}
    ranked = routing.rank([replace(r, **held.get(r.id, {})) for r in among], adapter, now=1.0)
    assert ranked == [(pool, "pool"), (host, "host"), (recent, "recent"), (home, "hash")]


def test_what_was_sent_is_remembered_until_the_report_or_the_end_of_its_time() -> None:
    among, adapter = replicas(3), ADAPTERS[0]
    elsewhere = hash_order(adapter, among)[-1]
    routing = Routing(POLICY)

    def choice(now: float) -> Candidate:
        return routing.rank(among, adapter, now=now)[0]

    routing.sent(Candidate(elsewhere, "overflow"), adapter, now=0.0)
    assert choice(POLICY.recent_s) == (elsewhere, "recent")
    routing.sent(Candidate(elsewhere, "recent"), adapter, now=POLICY.recent_s)
    assert choice(2 * POLICY.recent_s) == (elsewhere, "recent")
    assert choice(2 * POLICY.recent_s + 0.1).reason == "hash"
    routing.sent(Candidate(elsewhere, "overflow"), adapter, now=100.0)
    routing.reported(elsewhere, {ADAPTERS[1]})  # not there yet
    assert choice(100.0) == (elsewhere, "recent")
    routing.reported(elsewhere, {adapter})  # from here on the reports say whether it is still there
    assert choice(100.0).reason == "hash"
    routing.sent(Candidate(elsewhere, "pool"), adapter, now=100.0)
    assert choice(100.0).reason == "hash"
    routing.sent(Candidate(elsewhere, "overflow"), adapter, now=100.0)
    routing.retain({r.id for r in among} - {elsewhere})
    assert choice(100.0).reason == "hash"


# -- bounds -----------------------------------------------------------------------------------------------------------


def simulate(num_replicas: int, requests: Sequence[str], *, at_once: int) -> tuple[Routing, dict[str, Counter[str]]]:
    """Routes the requests in turn while `at_once` are under way. Returns replica → adapter → number of requests."""
    routing, under_way = Routing(POLICY), list[str]()
    served: dict[str, Counter[str]] = {r.id: Counter() for r in replicas(num_replicas)}
    for now, adapter in enumerate(requests):
        loads = Counter(under_way)
        among = [replace(r, load=loads[r.id]) for r in replicas(num_replicas)]
        chosen = routing.rank(among, adapter, now=now / 100)[0]
        routing.sent(chosen, adapter, now=now / 100)
        served[chosen.replica][adapter] += 1
        under_way = [*under_way, chosen.replica][-at_once:]
    return routing, served


def test_an_adapter_in_high_demand_is_on_as_many_replicas_as_it_needs() -> None:
    adapter = ADAPTERS[0]
    order = hash_order(adapter, replicas(8))
    homes = {}
    for at_once in (1, 2, 4, 8, 32):
        _, served = simulate(8, [adapter] * 200, at_once=at_once)
        homes[at_once] = [name for name, counts in served.items() if counts]
        assert set(homes[at_once]) == set(order[: len(homes[at_once])])  # the next in rank, not just anyone
    numbers = [len(h) for h in homes.values()]
    assert numbers == sorted(numbers)
    assert numbers[:2] == [1, 1]
    assert numbers[-1] >= 5


def test_an_adapter_in_high_demand_does_not_move_the_others() -> None:
    """An adapter whose replica is full of another adapter's requests moves to a second replica, and stays there."""
    hot, cold = ADAPTERS[0], ADAPTERS[1:20]
    traffic = [adapter for i in range(300) for adapter in (hot, hot, hot, cold[i % len(cold)])]
    _, served = simulate(4, traffic, at_once=24)
    share = POLICY.max_load(24, 4) / 24
    assert max(sum(c.values()) for c in served.values()) <= share * len(traffic)
    homes = [sum(bool(counts[a]) for counts in served.values()) for a in cold]
    assert sum(homes) / len(homes) < 2.5  # of four


@pytest.mark.parametrize("reported", [False, True])
def test_twenty_adapters_balance_over_two_replicas(reported: bool) -> None:
    """With binomial chance alone, one of two replicas would get five or fewer of twenty in 4 % of cases."""
    for trial in range(200):
        names = [f"{trial}-{i}" for i in range(2)]
        routing = Routing(POLICY)
        held: dict[str, set[str]] = {name: set() for name in names}
        for adapter in ADAPTERS[:20]:
            among = [ReplicaView(n, 0, 10, in_pool=frozenset(held[n]) if reported else frozenset()) for n in names]
            chosen = routing.rank(among, adapter, now=0.0)[0]
            held[chosen.replica].add(adapter)
            routing.sent(chosen, adapter, now=0.0)
            if reported:
                routing.reported(chosen.replica, held[chosen.replica])
        assert min(map(len, held.values())) >= 6


def test_a_replica_that_joins_takes_its_share_of_what_a_pool_has_no_room_for() -> None:
    """Twelve adapters in turn on a replica whose pool holds eight; the least recently used are on its host."""
    routing = Routing(POLICY)
    used: dict[str, list[str]] = {"old": ADAPTERS[:12], "new": []}
    where: list[str] = []
    for number in range(120):
        adapter = ADAPTERS[number % 12]
        among = [ReplicaView(n, 0, 10, frozenset(u[-8:]), frozenset(u[:-8])) for n, u in used.items()]
        chosen = routing.rank(among, adapter, now=0.0)[0]
        routing.sent(chosen, adapter, now=0.0)
        mine = used[chosen.replica]
        used[chosen.replica] = [a for a in mine if a != adapter] + [adapter]
        routing.reported(chosen.replica, used[chosen.replica])
        where.append(chosen.replica)
    assert where[-24:-12] == where[-12:]  # every adapter has a home
    assert 4 <= where[-12:].count("new") <= 8


def test_long_queues_are_of_equal_length() -> None:
    """A quarter more than the mean would be ten requests here; one more is allowed."""
    assert [POLICY.max_load(total, 4) for total in (0, 19, 39, 159)] == [4, 6, 11, 41]
    among = [ReplicaView(f"r{i}", 41 if not i else 40, 100, frozenset(ADAPTERS[:1] if not i else ())) for i in range(4)]
    assert best(ADAPTERS[0], [replace(r, load=40) for r in among]) == ("r0", "pool")
    assert best(ADAPTERS[0], [replace(r, load=r.load + bool(r.in_pool)) for r in among]).replica != "r0"


def test_one_request_more_than_the_bound_goes_to_the_next_and_says_so() -> None:
    adapter = ADAPTERS[0]
    home, second = hash_order(adapter, replicas(2))
    busy = POLICY.max_load(0, 2)
    loads = {home: 12, second: 0}
    among = [ReplicaView(n, loads[n], 100, in_pool=frozenset({adapter}) if n == home else frozenset()) for n in loads]
    assert best(adapter, among) == (second, "overflow")
    assert best(adapter, [replace(r, load=min(r.load, busy - 1)) for r in among]) == (home, "pool")
    assert best(adapter, [replace(r, in_pool=frozenset()) for r in among]) == (second, "overflow")


def test_an_adapter_that_is_held_and_was_just_sent_counts_once() -> None:
    """The request went to a holder as overflow, or while the report was on its way: no report removes it then."""
    routing = Routing(POLICY)
    adapter, others = ADAPTERS[0], ADAPTERS[1:5]
    held = frozenset({adapter, *others[:2]})
    among = [ReplicaView("full", 0, 10, in_pool=held), ReplicaView("other", 0, 10, in_pool=frozenset(others[2:]))]
    routing.rank(among, adapter, now=0.0)
    before = routing._num_adapters(among[0])
    routing.sent(Candidate("full", "overflow"), adapter, now=0.0)
    assert routing._num_adapters(among[0]) == before == 3
    routing.sent(Candidate("full", "overflow"), ADAPTERS[9], now=0.0)
    assert routing._num_adapters(among[0]) == 4


ADAPTER = "0" * 16
HELD = frozenset({ADAPTER})


def best_of(*among: ReplicaView, policy: RoutingPolicy | None = None) -> Candidate:
    return Routing(policy).rank(among, ADAPTER, now=0.0)[0]


def test_a_holder_with_a_long_prompt_before_it_is_skipped_for_a_load() -> None:
    holder, other = ReplicaView("holder", 1, 100, in_pool=HELD), ReplicaView("other", 1, 100)
    assert best_of(replace(holder, unanswered=1024), other) == ("holder", "pool")
    assert best_of(replace(holder, unanswered=1025), other) == ("other", "overflow")
    assert best_of(replace(holder, unanswered=1025), replace(other, unanswered=1)) == ("holder", "pool")


def test_of_several_that_hold_it_none_waits_for_a_long_prompt() -> None:
    among = [ReplicaView(f"r{i}", 1, 100, in_pool=HELD, unanswered=8000 * (i != 3)) for i in range(5)]
    assert best_of(*among) == ("r3", "pool")


def test_the_bound_on_requests_holds_however_short_their_prompts_are() -> None:
    """The comparison is with replicas that may have another request."""
    full, other = ReplicaView("full", 6, 100, unanswered=0), ReplicaView("other", 2, 100, unanswered=8000)
    assert best_of(full, other).replica == "other"
    assert best_of(replace(full, in_pool=HELD), other) == ("other", "overflow")


def test_every_replica_is_offered_once() -> None:
    among = [ReplicaView(f"r{i}", i % 3, 100, unanswered=5000 * i) for i in range(9)]
    ranked = Routing().rank(among, ADAPTER, now=0.0)
    assert sorted(c.replica for c in ranked) == sorted(r.id for r in among)
    assert ranked[0].replica == "r0"


DIGESTS = [f"{i // 2:016x}{i:048x}" for i in range(12)]  # two and two have one routing key
digest_sets = st.frozensets(st.sampled_from(DIGESTS))
changes = st.tuples(st.just("change"), digest_sets, digest_sets, st.booleans())
events = st.lists(changes | st.sampled_from([("reconnect",), ("restart",), ("idle",)]), max_size=20)


class Replica:
    """Its gateway, and a way to there which may lose deltas."""

    def __init__(self) -> None:
        self.held, self.gateway = Held(), RoutingReports()
        self._num_series = 0
        self.connect()

    def connect(self) -> None:
        self._num_series += 1
        self._series = RoutingSeries(f"s{self._num_series}")
        self.report()

    def report(self, *, is_lost: bool = False) -> list[RoutingDelta]:
        sent = self._series.deltas(self.held)
        followed = [] if is_lost else [self.gateway.take("r", delta, 0.0) for delta in sent]
        if not all(followed):
            self._series.restart()
            assert all(self.gateway.take("r", delta, 0.0) for delta in self._series.deltas(self.held))
        return sent

    def change(self, in_pool: frozenset[str], on_host: frozenset[str], is_lost: bool = False) -> None:
        prefixes = {routing_key(digest)[::-1] for digest in in_pool ^ on_host}
        self.held = Held(in_pool, on_host - in_pool, prefixes)
        self.report(is_lost=is_lost)

    def known(self) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
        known = self.gateway.of("r")
        assert known is not None
        return known.report.in_pool, known.report.on_host, known.report.prefixes


@given(events, digest_sets, st.integers(1, 4))
def test_whatever_is_lost_the_gateway_knows_what_the_replica_holds(
    happened: list[tuple[object, ...]], at_last: frozenset[str], max_keys: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(routing, "MAX_KEYS", max_keys)
        replica = Replica()
        for kind, *change in happened:
            if kind == "change":
                replica.change(*change)  # type: ignore[arg-type]
            elif kind == "idle":
                replica.report()
                assert replica.report() == []
            else:
                replica.held = Held() if kind == "restart" else replica.held
                replica.connect()
                assert replica.known() == whole(replica.held)
        replica.change(at_last, frozenset(DIGESTS[:1]))
        replica.change(frozenset() if at_last else frozenset(DIGESTS), frozenset())  # certainly with other keys
        assert replica.known() == whole(replica.held)


def whole(held: Held) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    in_pool = frozenset(map(routing_key, held.in_pool))
    return in_pool, frozenset(map(routing_key, held.on_host)) - in_pool, frozenset(held.prefixes)


NAMES = [f"{i:016x}" for i in range(100, 112)]


def test_who_holds_a_long_prefix_goes_before_who_holds_the_adapter_within_the_bounds_on_load() -> None:
    among = replicas(4)
    order = hash_order(ADAPTERS[0], among)
    by_name = {r.id: r for r in among}
    by_name[order[1]] = replace(by_name[order[1]], in_pool=frozenset(ADAPTERS[:1]))
    by_name[order[2]] = replace(by_name[order[2]], prefixes=frozenset(NAMES[:4]))
    by_name[order[3]] = replace(by_name[order[3]], prefixes=frozenset(NAMES[:6]))

    def ranked(prefix: Sequence[str], adapter: str | None = ADAPTERS[0]) -> list[Candidate]:
        return Routing(POLICY).rank([*by_name.values()], adapter, now=0.0, prefix=prefix)

    assert [c.replica for c in ranked(NAMES[:3])] == [order[i] for i in (1, 2, 3, 0)]  # too short to outweigh
    assert ranked(NAMES[:4])[:3] == [(order[2], "prefix"), (order[3], "prefix"), (order[1], "pool")]
    assert ranked(NAMES[:8])[:2] == [(order[3], "prefix"), (order[2], "prefix")]
    assert ranked(NAMES[:8], None)[:2] == [(order[3], "prefix"), (order[2], "prefix")]
    assert {c.reason for c in ranked(NAMES[:8], None)[2:]} == {"base"}
    for crowded in (replace(by_name[order[3]], load=90), replace(by_name[order[3]], unanswered=5000)):
        by_name[order[3]] = crowded
        assert ranked(NAMES[:8])[:2] == [(order[2], "prefix"), (order[1], "pool")]
        assert ranked(NAMES[:8], None)[0] == (order[2], "prefix")


def test_the_next_turn_follows_the_last_one_before_a_report_says_so() -> None:
    among, routing = replicas(4), Routing(POLICY)
    last = hash_order(ADAPTERS[0], among)[-1]
    assert routing.rank(among, ADAPTERS[0], now=0.0, prefix=NAMES[:5])[0].replica != last
    routing.sent(Candidate(last, "overflow"), ADAPTERS[0], now=0.0, prefix=NAMES[:5])
    turn = {"prefix": NAMES[:9]}
    assert routing.rank(among, ADAPTERS[0], now=1.0, **turn)[0] == (last, "prefix")
    assert routing.rank(among, None, now=1.0, **turn)[0] == (last, "prefix")
    assert routing.rank(among, ADAPTERS[0], now=POLICY.recent_s + 1.0, **turn)[0].reason == "hash"
    routing.sent(Candidate(last, "overflow"), None, now=40.0, prefix=NAMES[:5])
    routing.retain([r.id for r in among if r.id != last])
    assert routing.rank(among, None, now=41.0, **turn)[0].reason == "base"


class Counted(frozenset[str]):
    num = 0

    def __contains__(self, name: object) -> bool:
        Counted.num += 1
        return super().__contains__(name)


@pytest.mark.parametrize("num_held", [0, 1, 300, 511, 512])
def test_of_a_long_prompt_few_names_are_looked_at(num_held: int) -> None:
    names = [f"{i:016x}" for i in range(512)]
    (replica,) = replicas(1)
    routing, held = Routing(POLICY), replace(replica, prefixes=Counted(names[:num_held]))
    Counted.num = 0
    assert routing.num_known(held, names) == num_held
    assert Counted.num <= 10
    routing.sent(Candidate(replica.id, "prefix"), None, now=0.0, prefix=names[:400])
    assert routing.num_known(held, names) == max(num_held, 400)


def test_the_longest_prefixes_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_MAX_SENT", 6)
    sent, (replica,) = Routing(POLICY), replicas(1)
    sent.sent(Candidate(replica.id, "prefix"), None, now=0.0, prefix=NAMES[:9])
    sent.rank([replica], None, now=0.0)
    assert sent.num_known(replica, NAMES) == 6


def test_only_what_changes_is_told() -> None:
    a, b, c = (routing_key(DIGESTS[i]) for i in (0, 2, 4))
    series = RoutingSeries("s")
    steps = [Held(), Held([a], [b]), Held([a], [b]), Held([b], [a]), Held([c]), Held([c])]
    assert [series.deltas(held) for held in steps] == [
        [RoutingDelta("s", 0, True)],
        [RoutingDelta("s", 1, False, (a,), (b,))],
        [],
        [RoutingDelta("s", 2, False, (b,), (a,))],
        [RoutingDelta("s", 3, False, (c,), (), (a, b))],
        [],
    ]


KNOWN = RoutingReport("s", 3, frozenset("ab"), frozenset("c"))


@pytest.mark.parametrize(
    ("report", "delta"),
    [
        (None, RoutingDelta("s", 0, False, ("d",))),
        (KNOWN, RoutingDelta("s", 5, False, ("d",))),  # one is missing
        (KNOWN, RoutingDelta("s", 3, False, ("d",))),  # known already
        (KNOWN, RoutingDelta("t", 4, False, ("d",))),  # a predecessor's, or an older connection's
    ],
)
def test_what_does_not_follow_is_not_applied(report: RoutingReport | None, delta: RoutingDelta) -> None:
    assert apply(report, delta) is None


def test_the_whole_follows_anything() -> None:
    assert apply(KNOWN, RoutingDelta("t", 0, True, ("d",))) == RoutingReport("t", 0, frozenset("d"))
    assert apply(KNOWN, RoutingDelta("s", 4, False, ("c",), ("a",), ("b",))) == RoutingReport(
        "s", 4, frozenset("c"), frozenset("a")
    )


def test_signs_of_life_are_kept_beside_the_report_and_old_replicas_forgotten() -> None:
    reports = RoutingReports()
    reports.alive("one", 1.0)  # it has not reported yet
    assert reports.of("one") is None
    assert reports.take("one", RoutingDelta("s", 0, True, ("a",)), 2.0)
    reports.alive("one", 7.0)
    assert not reports.take("one", RoutingDelta("s", 2, False, ("b",)), 8.0)
    reports.loaded("one", 3, 9.0)
    assert reports.of("one") == (RoutingReport("s", 0, frozenset("a")), 9.0, 3)
    assert reports.take("one", RoutingDelta("s", 1, False, ("b",)), 9.0)
    assert reports.of("one") == (RoutingReport("s", 1, frozenset("ab")), 9.0, 3)
    assert reports.take("one", RoutingDelta("t", 0, True, ("a",)), 9.0)
    assert reports.of("one") == (RoutingReport("t", 0, frozenset("a")), 9.0, 0)
    reports.loaded("two", 3, 9.0)  # which has not reported yet
    assert reports.of("two") is None
    assert reports.take("two", RoutingDelta("t", 0, True), 1000.0)
    assert reports.of("one") is None
