"""Scale to zero in virtual time: a deployment of replicas that take a while to start, with real meters of demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from loray.policy.autoscaling import Decision, IdleState, PolicyState, decide_from_zero
from loray.policy.demand import DemandMeter, EngineLoad, TrackedRequest
from loray.spec import AdapterBytes, AutoscalingSpec
from tests.serving.scaling.made import MIB, observation

SPEC = AutoscalingSpec(
    min_replicas=0,
    max_replicas=3,
    window_s=60,
    downscale_delay_s=120,
    downscale_to_zero_delay_s=300,
    wait_slo_s=None,
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

    def __init__(self, requests: Sequence[Request], spec: AutoscalingSpec = SPEC) -> None:
        self._requests, self._spec = list(requests), spec
        self._queue: list[Request] = []
        self._replicas = [_replica(0.0)]
        self._state = PolicyState()
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
        decision, self._state = decide_from_zero(
            seen, self._spec, self._state, target=target, num_queued=queued, now=now
        )
        return decision


def _replica(ready_at: float) -> Replica:
    meter = DemandMeter(
        window_s=SPEC.window_s,
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
    idle_s = SPEC.downscale_to_zero_delay_s
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
    assert slept >= 10.0 + 900.0 + SPEC.downscale_to_zero_delay_s - TICK_S


def test_a_client_that_leaves_during_the_start_leaves_a_replica_that_goes_again() -> None:
    asked, state = observation(age_s=1.0), PolicyState()
    for now in (5.0, 10.0):  # it starts, and nobody waits any more
        decision, state = decide_from_zero([None], SPEC, state, target=1, num_queued=0, now=now)
        assert (decision.target, decision.cause) == (1, "no statistics")
    decision, state = decide_from_zero([asked], SPEC, state, target=1, num_queued=0, now=20.0)
    assert (decision.target, state.idle.since) == (1, 19.0)
    decision, state = decide_from_zero([asked], SPEC, state, target=1, num_queued=0, now=319.0)
    assert (decision.target, decision.cause) == (0, "idle")
    assert decision.reason == "no request for 300 s; the next one starts a replica"


@pytest.mark.parametrize("seen", [[None], [observation(), None], []])
def test_nothing_goes_to_zero_while_a_replica_is_silent(seen: list[object]) -> None:
    state = PolicyState(idle=IdleState(since=0.0))
    decision, after = decide_from_zero(seen, SPEC, state, target=max(1, len(seen)), num_queued=0, now=10_000.0)  # type: ignore[arg-type]
    assert decision.target >= 1
    assert after.idle.since is None


def test_a_request_that_waits_at_a_gateway_keeps_it() -> None:
    state = PolicyState(idle=IdleState(since=0.0))
    assert decide_from_zero([observation()], SPEC, state, target=1, num_queued=0.2, now=10_000.0)[0].target == 1


def test_several_replicas_go_where_nobody_asks_the_last_one_after_the_others() -> None:
    """Ray Serve goes to zero from one replica alone."""
    spec = SPEC.model_copy(update={"downscale_delay_s": 10_000.0})
    state, target, targets = PolicyState(idle=IdleState(since=0.0)), 3, []
    for now in (400.0, 401.0, 402.0):
        decision, state = decide_from_zero([observation()] * target, spec, state, target=target, num_queued=0, now=now)
        target = decision.target
        targets.append(target)
    assert targets == [1, 0, 0]


def test_a_least_number_of_one_is_never_left() -> None:
    spec = SPEC.model_copy(update={"min_replicas": 1})
    state = PolicyState(idle=IdleState(since=0.0))
    assert decide_from_zero([observation()], spec, state, target=1, num_queued=0, now=10_000.0)[0].target == 1
