"""How many replicas demand needs, and when their number changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.policy.autoscaling import Decision, ScalingState, decide
from loray.policy.demand import DemandMeter, Observation
from loray.policy.routing import routing_key
from loray.spec import AdapterBytes, AutoscalingSpec
from tests.serving.scaling.made import MIB, adapter, observation

SPEC = AutoscalingSpec(max_replicas=8, window_s=60, upscale_delay_s=10, downscale_delay_s=120, wait_slo_s=None)
AT_ONCE = SPEC.model_copy(update={"upscale_delay_s": 0.0, "downscale_delay_s": 0.0})
NOW = 10_000.0

Observations = Sequence[Observation | None]


def at_once(observations: Observations, target: int, spec: AutoscalingSpec = AT_ONCE) -> Decision:
    return decide(observations, spec, ScalingState(), target=target, now=NOW)


# -- how many ---------------------------------------------------------------------------------------------------------


def test_tokens_against_measured_capacity() -> None:
    seen = observation(tokens=60 * 1700.0, capacity=1000.0)
    assert at_once([seen], 1)[:3] == (
        3,
        "tokens",
        "tokens need 3 replicas (1700 of 1000 tokens/s each); working set 0.0 MiB of 0 adapters needs 1 replica at "
        "8.0 MiB of pool each, beside 0.0 MiB of KV cache",
    )


def test_requests_under_way_as_long_as_no_capacity_is_known() -> None:
    decision = at_once([observation(tokens=1e9, occupied_s=60 * 2.1)], 1)
    assert decision[:2] == (3, "requests")
    assert decision.reason.startswith("requests need 3 replicas (2.10 batches under way, capacity not yet measured)")


def test_a_wide_working_set_needs_pools_before_anything_waits() -> None:
    decision = at_once([observation(range(12))], 1)
    assert decision[:2] == (2, "working set")
    assert decision.reason.startswith("working set 12.0 MiB of 12 adapters needs 2 replicas at 8.0 MiB of pool each")


def test_kv_cache_takes_its_share_of_the_pools() -> None:
    crowd = observation(range(7), kv_byte_s=60 * 3.0 * MIB)
    assert at_once([observation(range(7))], 1).target == 1
    decision = at_once([crowd], 1)
    assert decision.target == 2
    assert "needs 2 replicas at 6.5 MiB of pool each, beside 1.5 MiB of KV cache" in decision.reason


def test_an_adapter_that_is_hot_on_many_replicas_needs_to_fit_once() -> None:
    assert at_once([observation(range(6))] * 5, 5).target == 1
    partitioned = [observation(range(6 * i, 6 * i + 6)) for i in range(5)]
    assert at_once(partitioned, 5).target == 5  # 30 MiB in pools of 8: 4, without the margin that removing one needs
    assert at_once(partitioned, 1).target == 4


def test_a_shared_pair_needs_to_fit_once() -> None:
    pair = {routing_key(adapter(100).digest): 4.0 * MIB}
    decision = at_once([observation(range(2), pairs=pair), observation(range(2, 4), pairs=pair)], 2)
    assert "working set 8.0 MiB of 4 adapters needs 1 replica" in decision.reason


def test_samples_of_different_depth_are_brought_to_one() -> None:
    numbers = range(600)
    shallow = observation(numbers, sample=1.0)
    deep = observation(numbers, sample=0.25)
    deep = replace(deep, adapters={k: v for k, v in deep.adapters.items() if int(k, 16) / 16**16 < 0.25})
    alone, both = at_once([shallow], 1), at_once([shallow, deep], 1)
    assert "600 adapters" in alone.reason
    number = float(both.reason.split(" MiB of ")[1].split()[0])
    assert number == pytest.approx(600, rel=0.2)


def test_capacity_is_the_mean_of_those_who_know_theirs() -> None:
    seen = [observation(tokens=60 * 450.0, capacity=c) for c in (400.0, 600.0, None)]
    assert "(1350 of 500 tokens/s each)" in at_once(seen, 3).reason


def test_a_young_deployment_is_measured_over_its_own_age() -> None:
    young = observation(age_s=30.0, tokens=30 * 900.0, capacity=1000.0)
    assert "(900 of 1000 tokens/s each)" in at_once([young], 1).reason
    newborn = observation(age_s=0.1, tokens=100.0, capacity=1000.0)  # one request is no rate
    assert at_once([newborn], 1).target == 1


@given(
    tokens=st.floats(0, 1e6),
    more_tokens=st.floats(0, 1e6),
    backlog=st.floats(0, 1e6),
    more_backlog=st.floats(0, 1e6),
    occupied=st.floats(0, 1e4),
    kv=st.floats(0, 1e9),
    capacity=st.none() | st.floats(1, 1e5),
    num_adapters=st.integers(0, 60),
    more_adapters=st.integers(0, 60),
    target=st.integers(1, 8),
    num_silent=st.integers(0, 3),
    state=st.builds(
        ScalingState,
        direction=st.sampled_from(["up", "down", "none"]),
        since=st.floats(0, NOW),
        most=st.integers(1, 8),
        changed_at=st.none() | st.floats(0, NOW),
    ),
)
def test_more_demand_never_means_fewer_replicas_and_the_bounds_hold(
    tokens: float,
    more_tokens: float,
    backlog: float,
    more_backlog: float,
    occupied: float,
    kv: float,
    capacity: float | None,
    num_adapters: int,
    more_adapters: int,
    target: int,
    num_silent: int,
    state: ScalingState,
) -> None:
    fields = {"occupied_s": occupied, "kv_byte_s": kv, "capacity": capacity, "pool_bytes": 1e7}

    def decided(tokens: float, backlog: float, num_adapters: int) -> int:
        seen = observation(range(num_adapters), tokens=tokens, backlog=backlog, **fields)
        return decide([seen] + [None] * num_silent, SPEC, state, target=target, now=NOW).target

    few = decided(tokens, backlog, num_adapters)
    assert few <= decided(tokens + more_tokens, backlog + more_backlog, num_adapters + more_adapters)
    assert SPEC.min_replicas <= few <= SPEC.max_replicas


def test_a_target_outside_the_bounds_comes_inside_at_once() -> None:
    spec = SPEC.model_copy(update={"min_replicas": 2, "max_replicas": 3})
    assert decide([None], spec, ScalingState(), target=5, now=NOW)[:2] == (3, "bounds")
    assert decide([None], spec, ScalingState(), target=1, now=NOW)[:2] == (2, "bounds")
    busy = observation(tokens=1e9, capacity=1.0)
    decision = at_once([busy], 2, spec.model_copy(update={"upscale_delay_s": 0.0}))
    assert decision.target == 3
    assert decision.reason.endswith("3 replicas are the most allowed")


# -- when -------------------------------------------------------------------------------------------------------------


class Run:
    """Decisions every second."""

    def __init__(self, target: int = 1, spec: AutoscalingSpec = SPEC) -> None:
        self.spec, self.target, self.now = spec, target, NOW
        self.state = ScalingState()
        self.changes: list[tuple[float, int]] = []

    def go(self, seconds: int, observations: Callable[[int], Observations]) -> None:
        for _ in range(seconds):
            decision = decide(observations(self.target), self.spec, self.state, target=self.target, now=self.now)
            if decision.target != self.target:
                self.changes.append((self.now - NOW, decision.target))
            self.target, self.state = decision.target, decision.state
            self.now += 1


def wide(num_adapters: int) -> Callable[[int], Observations]:
    """`num_adapters` adapters, partitioned over the replicas."""
    return cache(lambda n: [observation(range(i, num_adapters, n)) for i in range(n)])


def test_demand_must_persist_before_the_number_changes() -> None:
    run = Run()
    for _ in range(5):
        run.go(9, wide(20))
        run.go(1, wide(2))
    assert run.changes == []
    run.go(30, wide(20))
    assert run.changes == [(60, 3)]


def test_fewer_replicas_after_the_delay_and_never_fewer_than_demand_asked_for_meanwhile() -> None:
    run = Run(target=5)
    run.go(100, wide(3))
    run.go(10, wide(20))  # still asks for fewer: 3
    run.go(100, wide(3))
    assert run.changes[0] == (120, 3)


def test_one_goes_only_where_the_others_keep_a_margin() -> None:
    run = Run(target=2)
    run.go(500, wide(8))  # eight of 8 MiB: would fit into one, without a margin
    assert run.target == 2
    run.go(500, wide(7))
    assert run.target == 1


def test_a_whole_window_is_seen_before_one_goes() -> None:
    """The demand of a removed replica must first reach the others."""
    run = Run(target=4, spec=AT_ONCE)
    run.go(1, wide(17))
    assert run.changes == [(0, 3)]
    run.go(59, lambda n: [observation(range(6)), observation(range(6, 9)), observation()])
    assert run.target == 3
    run.go(60, wide(17))
    assert run.target == 3
    young = [observation(range(3), age_s=59.0)]
    assert decide(young, AT_ONCE, ScalingState(), target=2, now=NOW).target == 2


@pytest.mark.parametrize("num_adapters", [1, 7, 8, 13, 20, 50])
@pytest.mark.parametrize("rate", [0.0, 750.0, 2500.0])
def test_constant_demand_ends_in_one_number_of_replicas(num_adapters: int, rate: float) -> None:
    @cache
    def seen(n: int) -> Observations:
        return [
            observation(range(i, num_adapters, n), tokens=60 * rate / n, capacity=1000.0, kv_byte_s=60.0 * MIB / n)
            for i in range(n)
        ]

    for start in (1, 8):
        run = Run(target=start)
        run.go(300, seen)
        assert len(run.changes) <= 1
        before = run.target
        run.go(300, seen)
        assert run.target == before


def test_requests_that_spread_over_a_new_replica_do_not_call_for_another() -> None:
    """Real meters measure the load of 1.5 replicas, spread evenly. A new replica takes 20 s to start."""
    spec = SPEC.model_copy(update={"downscale_delay_s": 20.0})
    meters = [meter(0.0)]
    target, state, changes, waits = 1, ScalingState(), [], 0
    for second in range(600):
        now = float(second)
        if len(meters) < target:
            waits += 1
            if waits == 20:
                meters.append(meter(now))
                waits = 0
        for i in range(15):
            m = meters[i % len(meters)]
            request = m.arrived(60, 40, adapter(i % 8), now)
            request.num_output_tokens = 40
            m.finished(request, now)
        seen = [replace(m.observe(now), capacity=1000.0) for m in meters]
        decision = decide(seen, spec, state, target=target, now=now)
        state = decision.state
        if decision.target != target:
            changes.append(decision.target)
        target = decision.target
    assert changes == [2]


def meter(now: float) -> DemandMeter:
    return DemandMeter(
        window_s=60, max_num_seqs=32, pool_bytes=20.0 * MIB, adapter_bytes=lambda ref: AdapterBytes(ref.nbytes), now=now
    )


# -- what is not known ------------------------------------------------------------------------------------------------


def test_nobody_has_reported() -> None:
    assert at_once([None, None], 2)[:3] == (2, "no statistics", "no replica has reported; 2 replicas stay")
    assert at_once([], 1).target == 1


def test_none_goes_while_one_is_silent() -> None:
    """The silent one may have all the load and the other none, because requests are routed by adapter."""
    decision = at_once([observation(), None], 2)
    assert decision.target == 2
    assert decision.reason.endswith("; 1 of 2 replicas are silent, so none goes")
    assert at_once([observation(), observation(range(6), tokens=60 * 700.0, capacity=1000.0)], 2).target == 1


def test_a_silent_replica_is_no_reason_for_another_one() -> None:
    seen = observation(tokens=60 * 1500.0, capacity=1000.0)
    assert at_once([seen, None], 2).target == 2


def test_the_delay_begins_again_after_a_time_without_reports() -> None:
    run = Run()
    run.go(9, wide(20))
    run.go(1, lambda n: [None] * n)
    run.go(9, wide(20))
    assert run.changes == []
