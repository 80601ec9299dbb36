"""A trace of a cluster's run, replayed as it is: its times and adapters, a warm-up, time outside replicas."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loray.errors import DataError, SpecError
from loray.simulation.cluster import HOST, NOWHERE, POOL, Cluster, ReplicaAdapters, SimulatedRequest
from loray.simulation.profile import SMOLLM2_TWO_CORES as PROFILE
from loray.simulation.profile import load_profile
from loray.simulation.routers import RandomRouter, Slots
from loray.simulation.scalers import Fixed
from loray.simulation.scenario import Scenario, simulate
from loray.simulation.simulator import Outcome, Policy, Simulator, summary
from loray.simulation.workload import read
from tests.simulation.made import requests, run_one


def test_a_request_takes_its_time_outside_the_replica() -> None:
    rows = requests(*((float(i), 8, 2, 0) for i in range(200)))
    plain, later = run_one(rows), run_one(rows, outside_s=((0.5, 0.0, 0.0), (0.5, 0.5, 0.0)))
    assert np.allclose(np.unique(np.round(later.ttft_R - plain.ttft_R, 9)), [0.5, 1.0])
    assert np.allclose(later.end_R - plain.end_R, later.ttft_R - plain.ttft_R)


def test_what_follows_the_choice_is_spent_on_the_replica() -> None:
    """A replica that has the first request is not chosen for the second; one that has answered it is."""
    rows = requests((0.0, 8, 1, 0), (0.5, 8, 1, 0))
    for outside, num_chosen in (((1.0, 0.0, 0.0), 1), ((0.25, 0.75, 0.0), 2), ((0.25, 0.0, 0.75), 2)):
        costs = PROFILE.model_copy(update={"outside_s": (outside,)})
        outcome = Simulator(rows, costs, Policy("two", _First(), Fixed(2)), initial=2, size=2).run()
        assert len(set(outcome.slot_R)) == num_chosen
        assert (outcome.ttft_R > 1.0).all()


def test_a_replica_that_stands_still_does_so_for_all_its_requests() -> None:
    """Of two that come together the second waits for both stalls, and for its own way alone."""
    rows = requests((0.0, 8, 1, 0), (0.0, 8, 1, 0))
    plain = run_one(rows).ttft_R.max()
    assert run_one(rows, outside_s=((0.0, 1.0, 0.0),)).ttft_R.max() == pytest.approx(plain + 1.0, abs=0.05)
    assert run_one(rows, outside_s=((0.0, 0.0, 1.0),)).ttft_R.max() == pytest.approx(plain + 2.0, abs=0.05)


def test_a_prompt_may_take_longer_than_the_mean() -> None:
    rows = requests(*((100.0 * i, 500, 1, 0) for i in range(1, 60)))
    plain, varied = run_one(rows), run_one(rows, prompt_factors=(0.5, 1.5))
    half = 0.5 * PROFILE.prompt_seconds(500)
    assert np.unique(np.round(varied.ttft_R - plain.ttft_R, 3)) == pytest.approx([-half, half], abs=0.01)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("outside_s", [[0.0, 0.0, -1.0]], "outside_s.0.2: Input should be greater than or equal to 0"),
        ("outside_s", [0.01], "outside_s.0: "),
        ("prompt_factors", [1.0, 0.0], "prompt_factors.1: Input should be greater than 0"),
    ],
)
def test_a_profile_with_impossible_times_is_refused(tmp_path: Path, field: str, value: object, what: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(PROFILE.model_dump(mode="json") | {field: value}))
    with pytest.raises(SpecError, match=re.escape(what)):
        load_profile(file)


def test_a_router_may_hear_late_of_an_end() -> None:
    """The second request comes when the first has ended: a router that does not know yet sends it elsewhere."""
    rows = requests((0.0, 8, 1, 0), (0.5, 8, 1, 0), (9.0, 8, 1, 0))
    for late, slots in ((0.0, [0, 0, 0]), (1.0, [0, 1, 0])):
        policy = Policy("two", _First(), Fixed(2))
        outcome = Simulator(rows, PROFILE.model_copy(update={"end_known_s": late}), policy, initial=2, size=2).run()
        assert (outcome.slot_R - outcome.slot_R[0]).tolist() in (slots, [-slot for slot in slots])


class _First(Slots):
    """The first of the replicas with the fewest requests."""

    def __init__(self) -> None:
        super().__init__(4)

    def choose(self, job: SimulatedRequest, now: float) -> int:
        return min(self.slots, key=lambda slot: self.loads[slot])


def test_the_warm_up_is_not_counted() -> None:
    made = requests((0.0, 8, 2, 0), (1.0, 800, 2, 1), (10.0, 8, 2, 0), (11.0, 8, 2, 2))
    policy = Policy("one", RandomRouter(2, 0), Fixed(1))
    outcome = Simulator(made, PROFILE, policy, initial=1, size=1, warm_up=10.0).run()
    assert (outcome.num_warming, outcome.cold_loads) == (2, 1)
    found = summary(outcome, made)
    assert found.p50_ttft_s == pytest.approx(outcome.ttft_R[2:].mean())
    assert found.cold_share == 0.5
    assert found.replica_hours == pytest.approx(1.0 / 3600)
    assert found.tokens_per_s == pytest.approx(4 / (1.0 + outcome.end_R[3]))


def test_times_of_probes_are_not_reported() -> None:
    made = requests((0.0, 8, 2, 0), (10.0, 800, 4, 0), (20.0, 16, 2, 0))
    outcome = run_one(made)
    found = summary(outcome, replace(made, probe_R=np.array([False, True, False])))
    assert (found.p50_ttft_s, found.mean_latency_s) == pytest.approx(
        (outcome.ttft_R[::2].mean(), outcome.end_R[::2].mean())
    )
    assert found.tokens_per_s == summary(outcome, made).tokens_per_s
    assert found.cold_share == pytest.approx(1 / 3)
    with pytest.raises(SpecError, match="probes"):
        summary(outcome, replace(made, probe_R=np.ones(3, bool)))


def test_replicas_of_the_warm_up_alone_are_not_counted() -> None:
    made = requests((0.0, 8, 2, 0), (10.0, 8, 2, 0), (11.0, 8, 2, 0))

    def outcome(warm_up: float) -> Outcome:
        class Falling(Fixed):
            def target(self, cluster: Cluster, now: float) -> int:
                return 3 if now < 5.0 else 1

        policy = Policy("one", RandomRouter(6, 0), Falling(1))
        return Simulator(made, PROFILE, policy, initial=3, size=3, warm_up=warm_up).run()

    whole, rest = (summary(outcome(warm_up), made) for warm_up in (0.0, 10.0))
    assert (whole.max_replicas, rest.max_replicas) == (3, 1)
    assert whole.replica_hours > 11.0 / 3600
    assert rest.replica_hours == pytest.approx(1.0 / 3600)


def test_a_replay_starts_with_what_its_trace_needs() -> None:
    """Whatever `utilization` says. Here it is the work of two replicas, which are to be busy for 0.8 of the time."""
    work = requests((0.0, 800, 20, 0)).work(PROFILE)
    made = requests(*((i * work / 2, 800, 20, 0) for i in range(100)))
    for utilization in (0.1, 0.9):
        assert Scenario(PROFILE, 10, 1, 1.0, made, utilization, replay=True).initial == 3


def test_a_request_that_finds_its_adapter_in_the_pool_keeps_the_copy_on_the_host() -> None:
    """The host has room for two. The first is asked for again before the third comes, so the second goes."""
    size = 1_840_000
    profile = PROFILE.model_copy(update={"host_bytes": 2.5 * size, "pool_bytes": 10 * size})
    adapters = ReplicaAdapters(0, profile, [size] * 3, RandomRouter(2, 0))
    for adapter in (0, 1):
        assert adapters.add_waiter(adapter) == (False, True)
        adapters.loaded(adapter)
    adapters.take(0, 0.0)
    adapters.give_back(0, 0.0)
    assert adapters.add_waiter(0) == (True, False)
    adapters.add_waiter(2)
    adapters.loaded(2)
    assert [adapters.tier(adapter) for adapter in range(3)] == [POOL, NOWHERE, HOST]


def test_an_adapter_that_only_the_pool_has_is_worth_its_load() -> None:
    """Both have been used once; the one that the host still has is evicted first, although it was used later."""
    size = 1_840_000
    profile = PROFILE.model_copy(update={"host_bytes": 1.5 * size, "pool_bytes": 2.5 * size})
    adapters = ReplicaAdapters(0, profile, [size] * 3, RandomRouter(2, 0))
    for adapter in (0, 1, 2):
        adapters.add_waiter(adapter)
        adapters.loaded(adapter)
        adapters.take(adapter, 0.0)
        adapters.give_back(adapter, 0.0)
    assert [adapters.tier(adapter) for adapter in range(3)] == [POOL, NOWHERE, POOL]


def test_a_trace_is_replayed_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    line = '{{"timestamp": {}, "input_length": 7, "output_length": 3, "adapter": {}}}\n'
    file.write_text("".join(line.format(1000 * i, i % 5) for i in range(20)))
    scenario = Scenario(PROFILE, 2, 5, 1.0, read(file), replay=True, fixed=True, warm_up=4.0)
    made = scenario.requests()
    assert made.at_R.tolist() == list(range(20))
    assert made.adapter_R.tolist() == [i % 5 for i in range(20)]
    assert next(simulate(scenario, made, ("loray",))).num_warming == 4
    with pytest.raises(SpecError, match="5 adapters, not 4"):
        Scenario(PROFILE, 2, 4, 1.0, read(file), replay=True)
    with pytest.raises(SpecError, match="warm-up"):
        Scenario(PROFILE, 2, 5, 1.0, read(file), replay=True, warm_up=60.0).requests()
    with pytest.raises(SpecError, match="name its file"):
        Scenario(PROFILE, 2, 5, 1.0, replay=True)
    file.write_text(line.format(0, -1))
    with pytest.raises(DataError, match="negative"):
        read(file)


def test_the_command_replays_a_trace(call: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    lines = ({"timestamp": 100 * i, "input_length": 9, "output_length": 4, "adapter": i % 7} for i in range(100))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--replicas", "2", "--fixed", "--policy", "loray", "--json")
    code, out = call("--trace", str(file), "--replay", "--warm-up", "5", *options)
    assert code == 0, out
    found = json.loads(out)
    assert found["requests"] == 100
    assert found["policies"]["loray"]["cold_loads"] == 0
    assert found["policies"]["loray"]["tokens_per_s"] == pytest.approx(200 / 5, rel=0.1)
    assert call("--replay", *options)[0] != 0
