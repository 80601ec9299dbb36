"""Bursts that are shorter than the window of demand, as the autoscaler sees them."""

from __future__ import annotations

from itertools import pairwise

from loray.simulation.cluster import Cluster, SimulatedRequest
from loray.simulation.profile import SMOLLM2_TWO_CORES as PROFILE
from loray.simulation.routers import RandomRouter, SimulatedRouter
from loray.simulation.scalers import AdapterDemandScaler, OngoingRequests, OracleScaler, Scaler
from loray.simulation.simulator import Outcome, Policy, Simulator, adapter_sizes
from loray.simulation.workload import RequestTrace
from loray.spec import AutoscalingSpec
from tests.fixtures.simulation import requests


def scaled(wait_slo_s: float | None, every: float = 150.0) -> tuple[AdapterDemandScaler, Outcome]:
    rows = [(0.4 * i, 300, 60, i % 20) for i in range(1500)]
    rows += [(every * k + 60 + 0.05 * i, 300, 60, i % 20) for k in range(int(540 // every) + 1) for i in range(400)]
    scaler = AdapterDemandScaler(
        AutoscalingSpec(max_replicas=8, wait_slo_s=wait_slo_s), 2, PROFILE, adapter_sizes(PROFILE, 20)
    )
    policy = Policy("loray", SimulatedRouter(16, 20, PROFILE), scaler)
    return scaler, Simulator(requests(*sorted(rows)), PROFILE, policy, initial=2, size=8).run()


def test_bursts_are_seen_in_their_queue_and_do_not_make_the_number_flap() -> None:
    """Ten minutes with 20 s of seven times the rate in every 150: the demand's window dilutes them."""
    scaler, _ = scaled(None)
    first = next(reason for reason in scaler.reasons if reason[1] > 2)
    assert 60 < first[0] < 75
    assert first[2].startswith("backlog of")
    downs = [b[0] - a[0] for a, b in pairwise(scaler.reasons) if b[1] < a[1]]
    assert all(seconds >= 180 for seconds in downs)  # the window and the delay
    assert len(downs) <= 2


def test_the_second_burst_finds_the_replicas_that_it_needs() -> None:
    """It comes 400 s after the first, when all that the first one's queue has called for are gone."""
    scaler, remembering = scaled(1.0, every=400.0)
    _, forgetful = scaled(None, every=400.0)
    second = slice(1150 + 400, 1200 + 800)  # requests from the 460th second to the 480th
    assert any(reason.startswith("bursts need") for _, _, reason in scaler.reasons)
    assert remembering.ttft_R[second].max() < 3.0
    assert forgetful.ttft_R[second].max() > 6.0
    assert remembering.replica_hours > forgetful.replica_hours


def test_what_is_computed_is_no_backlog_while_another_request_waits_for_its_load() -> None:
    sizes = adapter_sizes(PROFILE, 2)
    cluster = Cluster(PROFILE, sizes, SimulatedRouter(2, 2, PROFILE), 1)
    member = cluster.start(0.0)
    assert member is not None
    cluster.admit(member)
    scaler, replica = AdapterDemandScaler(AutoscalingSpec(), 1, PROFILE, sizes), member.replica
    replica.adapters.prefetch(0)
    for index in range(2):
        job = SimulatedRequest(index, 300, 60, index)
        replica.num_jobs += 1
        scaler.arrived(member, job, 0.0)
        if replica.adapters.add_waiter(job.adapter)[0]:
            replica.ready(job)
    assert (replica.num_jobs, replica.num_running) == (2, 1)
    seen = scaler.observe(member, 0.1)
    assert (seen.tokens, seen.backlog) == (600, 0)


def idle(made: RequestTrace) -> Simulator:
    return Simulator(made, PROFILE, Policy("x", RandomRouter(8, 0), Scaler(1)), initial=1, size=4)


def test_ray_scales_by_the_mean_of_ongoing_requests() -> None:
    """Its delays are 30 s up and 600 s down; a replica for two requests."""
    simulator = idle(requests((0.0, 1, 1, 0)))
    member = simulator.cluster.members[next(iter(simulator.cluster.members))]
    scaler = OngoingRequests(1, 4, 2.0)
    member.replica.num_jobs = 6
    targets = [scaler.target(simulator.cluster, 5.0 * i) for i in range(8)]
    assert targets == [1] * 6 + [3] * 2
    member.replica.num_jobs = 0
    later = [scaler.target(simulator.cluster, 40.0 + 5.0 * i) for i in range(140)]
    assert later[100] == 3
    assert later[-1] == 1


def test_the_oracle_scales_before_the_load_comes() -> None:
    rows = [(float(i), 100, 1, 0) for i in range(60)] + [(60 + 0.01 * i, 2000, 1, 0) for i in range(500)]
    foreseen = OracleScaler(requests(*rows), PROFILE, 0.8, 50)
    simulator = idle(requests(*rows))
    assert foreseen.target(simulator.cluster, 0.0) == 1
    assert foreseen.target(simulator.cluster, 15.0) > 10
