"""How many replicas demand, queues and bursts need, when their number changes, and scale to zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.policy.autoscaling import BURST_MEMORY_S, Bursts, Decision, ScalingState, decide, decide_from_zero
from loray.policy.demand import DemandMeter, EngineLoad, Observation, TrackedRequest
from loray.policy.routing import routing_key
from loray.spec import AdapterBytes, AutoscalingSpec
from tests.fixtures.demand import MIB, adapter, observation

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


amounts = st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 60))  # of tokens, backlog and adapters
states = st.builds(
    ScalingState,
    direction=st.sampled_from(["up", "down", "none"]),
    since=st.floats(0, NOW),
    most=st.integers(1, 8),
    changed_at=st.none() | st.floats(0, NOW),
)
others = st.tuples(st.floats(0, 1e4), st.floats(0, 1e9), st.none() | st.floats(1, 1e5))


@given(amounts, amounts, others, st.integers(1, 8), st.integers(0, 3), states)
def test_more_demand_never_means_fewer_replicas_and_the_bounds_hold(
    some: tuple[float, float, int],
    more: tuple[float, float, int],
    other: tuple[float, float, float | None],
    target: int,
    num_silent: int,
    state: ScalingState,
) -> None:
    occupied, kv, capacity = other
    fields = {"occupied_s": occupied, "kv_byte_s": kv, "capacity": capacity, "pool_bytes": 1e7}

    def decided(tokens: float, backlog: float, num_adapters: int) -> int:
        seen = observation(range(num_adapters), tokens=tokens, backlog=backlog, **fields)
        return decide([seen] + [None] * num_silent, SPEC, state, target=target, now=NOW).target

    few = decided(*some)
    assert few <= decided(some[0] + more[0], some[1] + more[1], some[2] + more[2])
    assert SPEC.min_replicas <= few <= SPEC.max_replicas


def test_a_target_outside_the_bounds_comes_inside_at_once() -> None:
    spec = SPEC.model_copy(update={"min_replicas": 2, "max_replicas": 3})
    assert decide([None], spec, ScalingState(), target=5, now=NOW)[:2] == (3, "bounds")
    assert decide([None], spec, ScalingState(), target=1, now=NOW)[:2] == (2, "bounds")


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


QUEUED = AutoscalingSpec(max_replicas=8, target_utilization=0.8, window_s=60, startup_s=20, drain_s=10, wait_slo_s=None)
QUEUED_AT_ONCE = QUEUED.model_copy(update={"upscale_delay_s": 0.0, "downscale_delay_s": 0.0})


def test_a_queue_counts_with_what_the_running_replicas_leave_of_it() -> None:
    """Two replicas with a demand of one can do 20 s of work in the 20 s of a start, beside the demand."""

    def decided(backlog: float) -> Decision:
        seen = [observation(tokens=60 * 500.0, capacity=1000.0, backlog=backlog * 500.0) for _ in range(2)]
        return decide(seen, QUEUED, ScalingState(), target=2, now=NOW)

    assert decided(20).target == 2
    assert "backlog" not in decided(20).reason
    decision = decided(45)  # 25 s are left: 2.5 replicas for 10 s, beside the demand; without a delay
    assert decision[:2] == (4, "backlog")
    assert decision.reason.startswith(
        "backlog of 45000 tokens needs 4 replicas (25 s of one replica's work are left when another has started, to be "
        "done in 10 s); tokens need 2 replicas (1000 of 1000 tokens/s each); working set"
    )
    assert decided(1000).reason.endswith("; 8 replicas are the most allowed")


def test_a_queue_is_no_reason_while_the_capacity_is_unknown() -> None:
    assert decide([observation(backlog=1e9)], QUEUED_AT_ONCE, ScalingState(), target=1, now=NOW).target == 1


def test_a_queue_that_the_running_replicas_leave_keeps_them() -> None:
    """Demand alone would need one of four."""
    seen = [observation(tokens=60 * 100.0, capacity=1000.0, backlog=27_000.0) for _ in range(4)]
    decision = decide(
        seen, QUEUED_AT_ONCE, ScalingState(), target=4, now=NOW
    )  # 108 s of work, less 20 s of 3.6 replicas
    assert decision.target == 4
    assert decision.reason.startswith("backlog of 108000 tokens needs 4 replicas (36 s of one replica's work are left")


def test_a_queue_lifts_the_delay_of_its_own_number_only() -> None:
    """The working set needs eight replicas; the queue four, at once. The eight come when their delay has passed."""
    spec = QUEUED.model_copy(update={"upscale_delay_s": 10.0})
    seen = [observation(range(60), capacity=1000.0, backlog=60_000.0)]  # 40 s of work are left: 4 replicas
    first = decide(seen, spec, ScalingState(), target=1, now=NOW)
    assert first[:2] == (4, "backlog")
    assert first.reason.startswith("backlog of 60000 tokens needs 4 replicas")
    assert "working set 60.0 MiB of 60 adapters needs 8 replicas" in first.reason
    second = decide(seen, spec, first.state, target=4, now=NOW + 9)
    assert second.target == 4
    third = decide(seen, spec, second.state, target=4, now=NOW + 10)
    assert third[:2] == (8, "working set")


def test_a_queue_from_before_the_window_counts_once() -> None:
    """Two replicas do 30 s of work in the 20 s of a start if half a replica's requests come meanwhile. The rest of the
    tokens, those of the queue itself, come no more.
    """

    def decided(old: float) -> Decision:
        seen = observation(tokens=60 * 500.0 + 42_000.0, capacity=1000.0, backlog=42_000.0, old_backlog=old)
        idle = observation(capacity=1000.0)
        return decide([seen, idle], QUEUED, ScalingState(), target=2, now=NOW)

    assert "(26 s of one replica's work" in decided(0.0).reason
    assert decided(0.0).target == 4
    assert "(12 s of one replica's work" in decided(42_000.0).reason
    assert decided(42_000.0).target == 2


BURSTY = AutoscalingSpec(max_replicas=40, startup_s=20, wait_slo_s=5.0)
LONG_AGO = ScalingState(bursts=Bursts(since=NOW - 2000))


def bursty(state: ScalingState = LONG_AGO, target: int = 10, now: float = NOW, **fields: float) -> Decision:
    """One report of `target`, in tokens of a replica's 1,000 a second."""
    return decide([observation(capacity=1000.0, **fields)], BURSTY, state, target=target, now=now)


def test_replicas_do_the_work_of_a_burst_in_its_time_and_that_of_a_wait() -> None:
    """300 s of one replica's work within 20 s: twelve are done after 25 s."""
    decision = bursty(tokens=60 * 4000.0, burst=300_000.0)
    assert decision[:2] == (12, "bursts")
    assert decision.reason.startswith(
        "bursts need 12 replicas (300000 tokens within the 20 s of a start, for which first tokens may wait 5.0 s); "
        "tokens need 5 replicas"
    )


def test_first_tokens_of_long_prompts_may_wait_as_long_as_a_prompt_takes() -> None:
    """Half of the prompts have 10 tokens, half 10,000, and a token is of one of the long ones: 10 s."""
    prompts = {"prompt_tokens": 100_100.0, "prompt_squares": 10 * (10.0**2 + 10_000.0**2)}
    assert bursty(target=1, burst=290_000.0, **prompts).target == 10  # in 30 s
    assert bursty(target=1, burst=290_000.0, prompt_tokens=100.0, prompt_squares=1000.0).target == 12


def test_the_largest_burst_is_remembered_for_a_time_and_then_the_number_falls() -> None:
    state, target = bursty(burst=300_000.0).state, 12
    for second in range(2, 2000, 2):
        decision = bursty(state, target, NOW + second, burst=20_000.0)
        state = decision.state
        if decision.target != target:
            break
    assert decision.target == 1
    assert 1200 + BURSTY.downscale_delay_s <= second <= 1220 + BURSTY.downscale_delay_s + 4


def test_a_new_load_is_expected_to_have_bursts_and_one_that_has_been_watched_has_those_seen() -> None:
    """Five replicas' work in the mean: bursts of twice that for 20 s need eight."""
    steady = {"tokens": 60 * 5000.0, "burst": 20 * 5000.0}
    new = bursty(ScalingState(), 1, **steady)
    assert new[:2] == (8, "bursts")
    assert bursty(new.state, 8, NOW + 1199, **steady).cause == "bursts"
    watched = bursty(new.state, 8, NOW + 1201, **steady)
    assert watched.cause == "tokens"


def test_none_is_for_bursts_without_a_target_or_a_capacity() -> None:
    seen = observation(tokens=60 * 500.0, burst=1e9)
    assert decide([seen], BURSTY, LONG_AGO, target=2, now=NOW).target == 2
    off = BURSTY.model_copy(update={"wait_slo_s": None})
    decision = decide([observation(capacity=1000.0, burst=1e9)], off, ScalingState(), target=1, now=NOW)
    assert decision.target == 1
    assert decision.state.bursts == Bursts()


def test_a_burst_has_no_delay_and_other_loads_keep_theirs() -> None:
    """The working set needs more than the burst, and waits."""
    seen = observation(range(400), capacity=1000.0, burst=100_000.0)
    first = decide([seen], BURSTY, LONG_AGO, target=1, now=NOW)
    assert first[:2] == (4, "bursts")
    assert "working set 400.0 MiB" in first.reason
    assert decide([seen], BURSTY, first.state, target=4, now=NOW + BURSTY.upscale_delay_s).target == 40


def test_the_memory_is_exact_to_a_sixtieth_and_stays_small() -> None:
    bursts, memory_s, each = Bursts(), BURST_MEMORY_S, BURST_MEMORY_S / 60
    seen: list[tuple[float, float]] = []
    for step in range(1000):
        now, tokens = step * each / 5, float((step * 7919) % 1009)
        bursts = bursts.noted(tokens, now)
        seen.append((now, tokens))
        largest = bursts.largest(0.0, now)
        assert largest >= max(t for at, t in seen if at > now - memory_s)
        assert largest <= max(t for at, t in seen if at > now - memory_s - each)
    assert len(bursts.marks) <= 61
    for step in range(1000):  # the worst case: each smaller than all before
        bursts = bursts.noted(1000.0 - step, now + step * each / 5)
    assert len(bursts.marks) <= 61


FROM_ZERO = AutoscalingSpec(
    min_replicas=0, max_replicas=3, window_s=60, downscale_delay_s=120, downscale_to_zero_delay_s=300, wait_slo_s=None
)
START_S, TICK_S = 20.0, 1.0


@dataclass
class Request:
    """`taken_at`: when a replica took it."""

    at: float
    seconds: float
    taken_at: float | None = None
    tracked: TrackedRequest | None = None


@dataclass
class Replica:
    ready_at: float
    meter: DemandMeter
    running: list[Request] = field(default_factory=list)


class Deployment:
    """Requests go to the first replica that is ready; until one is, they wait at the gateway. Where one waits and no
    replica runs, one is started, as Ray Serve does before it asks the policy.
    """

    def __init__(self, requests: Sequence[Request], spec: AutoscalingSpec = FROM_ZERO) -> None:
        self._requests, self._spec = list(requests), spec
        self._queue: list[Request] = []
        self._replicas = [_replica(0.0)]
        self._state = ScalingState()
        self.changes: list[tuple[float, int, str]] = []  # (time, target, cause)

    def run(self, until_s: float) -> list[tuple[float, int, str]]:
        now, target = 0.0, 1
        while now < until_s:
            self._serve(now)
            if target == 0 and self._queue:
                target, self._replicas = 1, [_replica(now + START_S)]
                self.changes.append((now, 1, "woken"))
            decision = self._decide(now, target)
            if decision.target != target:
                self.changes.append((now, decision.target, decision.cause))
                assert decision.target > 0 or not any(r.running for r in self._replicas), "a request was under way"
            target = decision.target
            self._replicas = self._replicas[:target] + [
                _replica(now + START_S) for _ in range(target - len(self._replicas))
            ]
            now += TICK_S
        return self.changes

    def _serve(self, now: float) -> None:
        while self._requests and self._requests[0].at <= now:
            self._queue.append(self._requests.pop(0))
        ready = [r for r in self._replicas if r.ready_at <= now]
        for replica in ready:
            for request in [r for r in replica.running if (r.taken_at or 0.0) + r.seconds <= now]:
                replica.running.remove(request)
                assert request.tracked is not None
                replica.meter.finished(request.tracked, now)
            while self._queue:
                request = self._queue.pop(0)
                request.taken_at, request.tracked = now, replica.meter.arrived(10, 10, None, now)
                replica.running.append(request)
            replica.meter.sample(EngineLoad(len(replica.running), 0, 0, 0, 0.0), now)

    def _decide(self, now: float, target: int) -> Decision:
        seen = [r.meter.observe(now) if r.ready_at <= now else None for r in self._replicas]
        queued = len(self._queue)
        decision = decide_from_zero(seen, self._spec, self._state, target=target, num_queued=queued, now=now)
        self._state = decision.state
        return decision


def _replica(ready_at: float) -> Replica:
    meter = DemandMeter(
        window_s=FROM_ZERO.window_s,
        max_num_seqs=32,
        pool_bytes=20.0 * MIB,
        adapter_bytes=lambda ref: AdapterBytes(ref.nbytes),
        now=ready_at,
    )
    return Replica(ready_at, meter)


def test_a_base_that_nobody_asks_goes_to_zero_and_the_next_request_wakes_it() -> None:
    first, late = Request(10.0, 5.0), Request(1000.0, 5.0)
    changes = Deployment([first, late]).run(1700.0)
    assert [(target, cause) for _, target, cause in changes] == [(0, "idle"), (1, "woken"), (0, "idle")]
    slept, woke, slept_again = (at for at, _, _ in changes)
    idle_s = FROM_ZERO.downscale_to_zero_delay_s
    assert first.at + idle_s <= slept <= first.at + first.seconds + idle_s + 2 * TICK_S
    assert woke == late.at
    assert late.taken_at == woke + START_S
    assert late.taken_at + idle_s <= slept_again <= late.taken_at + late.seconds + idle_s + 2 * TICK_S


def test_requests_now_and_then_keep_it() -> None:
    seldom = [Request(at, 1.0) for at in range(0, 3000, 290)]
    assert Deployment(seldom).run(3000.0) == []


def test_a_long_request_is_not_idleness() -> None:
    """It outlives the window, in which nothing has come."""
    long = Request(10.0, 900.0)
    ((slept, target, _),) = Deployment([long]).run(1400.0)
    assert target == 0
    assert slept >= 10.0 + 900.0 + FROM_ZERO.downscale_to_zero_delay_s - TICK_S


def test_a_client_that_leaves_during_the_start_leaves_a_replica_that_goes_again() -> None:
    asked, state = observation(age_s=1.0), ScalingState()
    for now in (5.0, 10.0):  # it starts, and nobody waits any more
        decision = decide_from_zero([None], FROM_ZERO, state, target=1, num_queued=0, now=now)
        assert (decision.target, decision.cause) == (1, "no statistics")
        state = decision.state
    decision = decide_from_zero([asked], FROM_ZERO, state, target=1, num_queued=0, now=20.0)
    assert (decision.target, decision.state.idle_since) == (1, 19.0)
    decision = decide_from_zero([asked], FROM_ZERO, decision.state, target=1, num_queued=0, now=319.0)
    assert (decision.target, decision.cause) == (0, "idle")
    assert decision.reason == "no request for 300 s; the next one starts a replica"


@pytest.mark.parametrize(
    ("seen", "num_queued", "least"),
    [([None], 0, 0), ([observation(), None], 0, 0), ([], 0, 0), ([observation()], 0.2, 0), ([observation()], 0, 1)],
)
def test_nothing_goes_to_zero_where_one_is_silent_or_waited_for_or_the_least(
    seen: list[Observation | None], num_queued: float, least: int
) -> None:
    spec, state = FROM_ZERO.model_copy(update={"min_replicas": least}), ScalingState(idle_since=0.0)
    decision = decide_from_zero(seen, spec, state, target=max(1, len(seen)), num_queued=num_queued, now=10_000.0)
    assert decision.target >= 1
    assert decision.state.idle_since is None or least or num_queued


def test_several_replicas_go_where_nobody_asks_the_last_one_after_the_others() -> None:
    """Ray Serve goes to zero from one replica alone."""
    spec = FROM_ZERO.model_copy(update={"downscale_delay_s": 10_000.0})
    state, target, targets = ScalingState(idle_since=0.0), 3, []
    for now in (400.0, 401.0, 402.0):
        decision = decide_from_zero([observation()] * target, spec, state, target=target, num_queued=0, now=now)
        target, state = decision.target, decision.state
        targets.append(target)
    assert targets == [1, 0, 0]
