"""Whole runs: equal for equal seeds, every request served once, and more of a resource is not worse."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from loray.errors import DataError, SpecError
from loray.policy.routing import RoutingPolicy
from loray.simulation import simulator, workload
from loray.simulation.cluster import SimulatedRequest
from loray.simulation.profile import SMOLLM2_TWO_CORES as PROFILE
from loray.simulation.profile import load_profile
from loray.simulation.routers import LeastWork, RandomRouter, SimulatedRouter, TwoChoices
from loray.simulation.scalers import Fixed, OngoingRequests, OracleScaler
from loray.simulation.scenario import POLICIES, Scenario, simulate
from loray.simulation.simulator import Policy, Simulator, course, summary
from loray.simulation.workload import at_rate, read, with_adapters
from tests.simulation.made import requests, run_one

SMALL = Scenario(PROFILE, replicas=4, adapters=40, minutes=2.0, utilization=0.5, seed=3)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_is_served_once_and_again_in_the_same_way(name: str) -> None:
    made = SMALL.requests()
    first, second = (next(simulate(SMALL, made, (name,))) for _ in range(2))
    assert np.isfinite(first.ttft_R).all()
    assert (first.ttft_R > 0).all()
    assert (first.end_R >= first.ttft_R - 1e-9).all()
    assert np.array_equal(first.end_R, second.end_R)
    assert summary(first, made) == summary(second, made)
    assert 0 < first.replica_hours <= SMALL.replicas * (made.seconds + 60) / 3600


def test_progress_is_told_while_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "_AT_ONCE", 100)
    scenario, shares = Scenario(PROFILE, 2, 10, 2.0), list[float]()
    made = scenario.requests()
    (outcome,) = simulate(scenario, made, ("ray",), shares.append)
    assert shares == [start / len(made) for start in range(0, len(made), 100)]
    assert len(shares) > 2
    monkeypatch.undo()
    (whole,) = simulate(scenario, made, ("ray",))
    assert np.array_equal(outcome.end_R, whole.end_R)


def test_another_seed_gives_other_requests() -> None:
    again = Scenario(PROFILE, replicas=4, adapters=40, minutes=2.0, utilization=0.5, seed=3).requests()
    assert np.array_equal(SMALL.requests().at_R, again.at_R)
    other = Scenario(PROFILE, replicas=4, adapters=40, minutes=2.0, utilization=0.5, seed=4).requests()
    assert len(other) != len(again) or not np.array_equal(other.at_R, again.at_R)


def test_more_replicas_are_not_slower_and_more_load_is_not_faster() -> None:
    made = SMALL.requests()
    means = []
    for replicas in (3, 4, 8):
        policy = Policy("loray", SimulatedRouter(2 * replicas, 40, PROFILE), Fixed(replicas))
        means.append(Simulator(made, PROFILE, policy, initial=replicas, size=replicas).run().ttft_R.mean())
    assert means == sorted(means, reverse=True)
    busier = [
        next(simulate(s, s.requests(), ("loray",))).ttft_R.mean()
        for s in (Scenario(PROFILE, 4, 40, 2.0, utilization=u, fixed=True) for u in (0.2, 0.5, 1.2))
    ]
    assert busier == sorted(busier)


def test_affinity_loads_less_than_chance() -> None:
    scenario = Scenario(PROFILE, 8, 200, 3.0, fixed=True)
    made = scenario.requests()
    loads = {o.policy: o.cold_loads for o in simulate(scenario, made)}
    assert loads["loray"] < 0.7 * min(loads["ray"], loads["random"])
    assert loads["oracle"] == 0


def test_scaling_starts_replicas_and_counts_their_hours() -> None:
    """Many requests after a quiet minute: replicas are added after the delay and the start, and paid from then."""
    rows = [(0.1 * i, 200, 20, i % 20) for i in range(100)] + [(60 + 0.02 * i, 200, 20, i % 20) for i in range(3000)]
    made = requests(*rows)
    scenario = Scenario(PROFILE, 6, 20, 2.0, utilization=0.1)
    outcome = next(simulate(scenario, made, ("loray",)))
    numbers = dict(outcome.replicas)
    assert numbers[54.0] <= 2
    assert max(numbers.values()) == 6
    before, after = made.at_R < 65, made.at_R > 110
    assert outcome.ttft_R[before].mean() > 0
    assert len(set(outcome.slot_R[after])) > len(set(outcome.slot_R[before]))
    steps = outcome.replicas
    by_hand = sum((b - a) * n for (a, n), (b, _) in pairwise(steps)) / 3600
    assert outcome.replica_hours == pytest.approx(by_hand, rel=0.1)


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_a_cold_adapter_costs_its_load_and_its_copy() -> None:
    """The same request twice: the first loads 1.84 MB from the store and copies them, the second finds them."""
    outcome = run_one(requests((0.0, 64, 1, 0), (10.0, 64, 1, 0)))
    load, place = PROFILE.load_seconds(1_840_000), PROFILE.place_seconds(1_840_000)
    assert outcome.ttft_R[0] - outcome.ttft_R[1] == pytest.approx(load + place)
    assert outcome.cold_loads == 1


def test_one_load_serves_all_that_wait_for_it() -> None:
    assert run_one(requests((0.0, 8, 1, 5), (0.001, 8, 1, 5), (0.002, 8, 1, 6))).cold_loads == 2


def test_a_pool_for_one_adapter_evicts() -> None:
    made = requests(*((float(i), 8, 2, 3 + 4 * (i % 2)) for i in range(6)))  # two of 14.7 MB in turn
    assert run_one(made, pool_bytes=20e6).evictions == 5
    assert run_one(made, pool_bytes=40e6).evictions == 0
    assert run_one(made, pool_bytes=20e6, host_bytes=15e6).cold_loads == 6


def test_a_pool_for_one_request_runs_one_after_the_other() -> None:
    kv = PROFILE.kv_token_bytes * 1000
    rows = requests((0.0, 960, 80, 0), (0.001, 960, 80, 0))
    alone, after = run_one(rows, pool_bytes=1.2 * kv + 2e6).end_R
    assert after > 1.8 * alone
    together = run_one(rows, pool_bytes=4 * kv).end_R
    assert together[1] < 1.7 * alone


def test_routers_by_hand() -> None:
    two, work = TwoChoices(4, 0), LeastWork(4, PROFILE)
    for router in (two, work):
        for slot in (0, 1):
            router.added(slot, f"r{slot}")
    two.load_changed(0, 3)
    assert {two.choose(SimulatedRequest(i, 1, 1, 0), 0.0) for i in range(10)} == {1}
    first = work.choose(SimulatedRequest(0, 2000, 10, 0), 0.0)
    assert [work.choose(SimulatedRequest(i, 100, 10, 0), 0.0) for i in range(1, 5)] == [1 - first] * 4


def test_ray_scales_by_the_mean_of_ongoing_requests() -> None:
    """Its delays are 30 s up and 600 s down; a replica for two requests."""
    simulator = Simulator(
        requests((0.0, 1, 1, 0)), PROFILE, Policy("x", RandomRouter(8, 0), Fixed(1)), initial=1, size=4
    )
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
    simulator = Simulator(requests(*rows), PROFILE, Policy("x", RandomRouter(8, 0), Fixed(1)), initial=1, size=4)
    assert foreseen.target(simulator.cluster, 0.0) == 1
    assert foreseen.target(simulator.cluster, 15.0) > 10


def test_the_policy_of_the_router_is_that_of_production() -> None:
    """A load of one above the mean sends the next request for a held adapter elsewhere."""
    router = SimulatedRouter(8, 4, PROFILE, RoutingPolicy())
    for slot in range(4):
        router.added(slot, f"r{slot}")
        router.load_changed(slot, 20)
    router.placed(2, 1, 0)
    assert router.choose(SimulatedRequest(0, 1, 1, 1), 0.0) == 2
    router.load_changed(2, 22)
    assert router.choose(SimulatedRequest(0, 1, 1, 1), 0.0) != 2
    router.load_changed(2, 20)
    long = SimulatedRequest(0, 2000, 1, 1)
    assert router.choose(long, 0.0) == 2
    assert router.choose(SimulatedRequest(0, 1, 1, 1), 0.0) != 2
    router.answered(2, long)
    assert router.choose(SimulatedRequest(0, 1, 1, 1), 0.0) == 2


# -- requests ---------------------------------------------------------------------------------------------------------


def test_a_trace_is_scaled_to_a_rate_and_keeps_its_lengths() -> None:
    trace = requests(*((float(i), 10 + i, 5, 0) for i in range(100)))
    rng = np.random.default_rng(0)
    for rate in (0.2, 1.0, 20.0):
        made = at_rate(trace, rate=rate, seconds=250.0, rng=rng)
        assert len(made) == pytest.approx(250 * rate, rel=0.2)
        assert (np.diff(made.at_R) >= 0).all()
        assert made.at_R[-1] < 250
        assert set(made.prompt_R) <= set(trace.prompt_R)


def test_adapters_follow_a_power_law() -> None:
    trace = requests(*((float(i), 1, 1, 0) for i in range(20_000)))
    counts = np.bincount(with_adapters(trace, 100, 1.0, np.random.default_rng(0)).adapter_R, minlength=100)
    shares = counts / counts.sum()
    assert shares[0] == pytest.approx(1 / sum(1 / k for k in range(1, 101)), rel=0.05)
    assert shares[0] / shares[9] == pytest.approx(10, rel=0.2)


def test_synthetic_requests_have_bursts_and_adapters_that_come_and_go() -> None:
    made = workload.generate(rate=50.0, seconds=1200.0, num_adapters=200, alpha=0.8, seed=1)
    assert made.rate == pytest.approx(50, rel=0.2)
    per_segment = np.bincount((made.at_R / 20).astype(int))
    assert per_segment.max() > 2 * np.median(per_segment)
    early, late = (set(made.adapter_R[part]) for part in (made.at_R < 300, made.at_R > 900))
    assert early - late
    assert late - early


def test_traces_are_read_as_their_owners_publish_them(tmp_path: Path) -> None:
    azure, mooncake, wrong = tmp_path / "azure.csv", tmp_path / "mooncake.jsonl", tmp_path / "wrong.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.4799600,3180,8\n"
    )
    mooncake.write_text('{"timestamp": 1500, "input_length": 7, "output_length": 3, "hash_ids": [1]}\n')
    wrong.write_text("a,b\n1,2\n")
    made = read(azure)
    assert made.at_R.tolist() == [0.0, pytest.approx(0.5)]
    assert made.prompt_R.tolist() == [4808, 3180]
    assert read(mooncake).output_R.tolist() == [3]
    with pytest.raises(DataError, match="ContextTokens"):
        read(wrong)


def test_requests_longer_than_the_context_are_cut() -> None:
    made = requests((0.0, 100_000, 50, 0), (1.0, 10, 100_000, 0)).cut(8192)
    assert (made.prompt_R + made.output_R <= 8192).all()
    assert made.output_R.tolist() == [50, 4096]


def test_profiles_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(PROFILE.model_dump_json())
    assert load_profile(file) == PROFILE
    file.write_text(PROFILE.model_dump_json().replace('"step_s":0.0113', '"step_s":-1'))
    with pytest.raises(SpecError, match="step_s"):
        load_profile(file)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_json_and_draws(call: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    options = ("--replicas", "2", "--adapters", "20", "--minutes", "1", "--policy", "loray", "--policy", "oracle")
    code, out = call(*options, "--json", "--plot", str(tmp_path / "p.svg"))
    assert code == 0, out
    policies = json.loads(out)["policies"]
    assert list(policies) == ["loray", "oracle"]
    assert {"p50_ttft_s", "p99_ttft_s", "cold_loads", "replica_hours"} <= policies["loray"].keys()
    assert (tmp_path / "p.svg").read_text().count("<polyline") == 8
    code, out = call(*options)
    assert code == 0
    assert "replica-hours" in out


def test_a_trace_that_is_not_there_says_where_to_get_it(call: Callable[..., tuple[int, str]]) -> None:
    code, out = call("--trace", "azure", "--minutes", "1")
    assert code != 0
    assert "github.com/Azure/AzurePublicDataset" in out
    assert call("--trace", "/nowhere.csv")[0] != 0


def test_the_course_adds_up() -> None:
    made = SMALL.requests()
    outcome = next(simulate(SMALL, made, ("loray",)))
    by_part = course(outcome, made, 10)
    assert by_part.loads_B.sum() == pytest.approx(outcome.loads[-1][1])
    assert by_part.replicas_B[-1] <= SMALL.replicas
