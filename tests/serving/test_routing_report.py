"""What replicas report to gateways: changes alone, and everything again whenever something was missed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.policy import routing
from loray.policy.routing import Held, RoutingDelta, RoutingReport, RoutingReports, RoutingSeries, apply, routing_key

DIGESTS = [f"{i // 2:016x}{i:048x}" for i in range(12)]  # two and two have one routing key
adapter_sets = st.frozensets(st.sampled_from(DIGESTS))
changes = st.tuples(st.just("change"), adapter_sets, adapter_sets, st.booleans())
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
        self.held = Held(in_pool, on_host - in_pool)
        self.report(is_lost=is_lost)

    def known(self) -> tuple[frozenset[str], frozenset[str]]:
        known = self.gateway.of("r")
        assert known is not None
        return known.report.in_pool, known.report.on_host


@given(events, adapter_sets, st.integers(1, 4))
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


def whole(held: Held) -> tuple[frozenset[str], frozenset[str]]:
    in_pool = frozenset(map(routing_key, held.in_pool))
    return in_pool, frozenset(map(routing_key, held.on_host)) - in_pool


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


FIRST = RoutingReport("s", 3, frozenset("ab"), frozenset("c"))


@pytest.mark.parametrize(
    ("report", "delta"),
    [
        (None, RoutingDelta("s", 0, False, ("d",))),
        (FIRST, RoutingDelta("s", 5, False, ("d",))),  # one is missing
        (FIRST, RoutingDelta("s", 3, False, ("d",))),  # known already
        (FIRST, RoutingDelta("t", 4, False, ("d",))),  # a predecessor's, or an older connection's
    ],
)
def test_what_does_not_follow_is_not_applied(report: RoutingReport | None, delta: RoutingDelta) -> None:
    assert apply(report, delta) is None


def test_the_whole_follows_anything() -> None:
    assert apply(FIRST, RoutingDelta("t", 0, True, ("d",))) == RoutingReport("t", 0, frozenset("d"))
    assert apply(FIRST, RoutingDelta("s", 4, False, ("c",), ("a",), ("b",))) == RoutingReport(
        "s", 4, frozenset("c"), frozenset("a")
    )


def test_signs_of_life_are_kept_beside_the_report_and_old_replicas_forgotten() -> None:
    reports = RoutingReports()
    reports.alive("one", 1.0)  # it has not reported yet
    assert reports.of("one") is None
    assert reports.take("one", RoutingDelta("s", 0, True, ("a",)), 2.0)
    reports.alive("one", 7.0)
    assert not reports.take("one", RoutingDelta("s", 2, False, ("b",)), 8.0)
    assert reports.of("one") == (RoutingReport("s", 0, frozenset("a")), 7.0)
    assert reports.take("two", RoutingDelta("t", 0, True), 1000.0)
    assert reports.of("one") is None
