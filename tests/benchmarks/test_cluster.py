"""The benchmarks of a cluster: a short run of each, what clients and routers say of requests, and what work costs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cluster import growth, trials
from benchmarks.cluster.fitting import fit
from benchmarks.cluster.growth import A, B, Change, Check, Course, Look, Plan, checks
from benchmarks.cluster.measured import Figures, Placement, Seen, place, read_placements
from benchmarks.cluster.rows import COLUMNS, row, verdicts
from benchmarks.cluster.trace import Asked, Load, make_trace
from loray.simulation.cluster import SimulatedRequest
from loray.simulation.profile import SMOLLM2_TWO_CORES, Profile
from loray.simulation.routers import RandomRouter
from loray.simulation.scalers import Scaler
from loray.simulation.scenario import Scenario
from loray.simulation.simulator import Policy, Simulator
from loray.simulation.workload import read
from tests.fixtures.simulation import requests

LOAD = Load(num_adapters=50, rate=20.0, seconds=30.0, hot_seconds=5.0, probe_rate=10.0)


def run(module: str, file: Path, *options: str) -> dict[str, Any]:
    """The report of a benchmark in a process of its own: Ray reads its token once. Its targets may be missed."""
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.cluster{module}", *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    print(done.stdout)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_run_of_routers(tmp_path: Path) -> None:
    options = ["--adapters", "60", "--seconds", "10", "--hot-seconds", "4", "--folder", str(tmp_path)]
    found = run("", tmp_path / "figures.json", *options, "--router", "loray", "--router", "ray")
    assert found["columns"] == list(COLUMNS)
    loray, ray = found["more"]["rows"]
    assert (loray["router"], ray["router"], loray["errors"] + ray["errors"]) == ("loray", "ray", 0)
    assert loray["cold_loads"] < ray["cold_loads"]
    assert loray["above_known"] == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_short_growth(tmp_path: Path) -> None:
    found = run(".growth", tmp_path / "figures.json", "--minutes", "2", "--plot", str(tmp_path / "figures.svg"))
    assert found["columns"] == list(growth.COLUMNS)
    assert not found["more"]["errors"]
    assert max(change["after"] for change in found["more"]["changes"][A]) > 1
    assert "polyline" in (tmp_path / "figures.svg").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "options",
    [
        ["store", "--adapters", "12", "--seconds", "5"],
        ["flood", "--rounds", "1", "--requests", "20", "--at-once", "60"],
    ],
)
def test_a_short_trial(options: list[str], tmp_path: Path) -> None:
    """All but times, which a busy machine decides."""
    found = run(".trials", tmp_path / "figures.json", *options)
    assert len(found["rows"][0]) == len(found["columns"])
    missed = [verdict["name"] for verdict in found["more"]["verdicts"] if not verdict["is_met"]]
    assert all("p99" in name for name in missed)


def test_a_trial_of_nothing_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trials.main(["flood", "--rounds", "0"])
    assert "argument --rounds: 0 is below 1" in capsys.readouterr().err


def test_the_simulator_replays_the_trace_as_it_is(tmp_path: Path) -> None:
    trace, file = make_trace(LOAD), tmp_path / "trace.jsonl"
    assert trace == make_trace(LOAD)
    trace.write(file)
    scenario = Scenario(SMOLLM2_TWO_CORES, 3, 50, 1.0, read(file), fixed=True, replay=True, warm_up=trace.warm_up_s)
    made = scenario.requests()
    assert len(made) == len(trace.warm) + len(trace.counted)
    counted = made.at_R >= trace.warm_up_s
    assert np.allclose(made.at_R[counted] - trace.warm_up_s, [a.at for a in trace.counted], atol=1e-3)
    assert made.probe_R is not None
    columns = (made.adapter_R, made.prompt_R, made.output_R, made.probe_R)
    assert list(zip(*(column[counted].tolist() for column in columns), strict=True)) == [a[1:] for a in trace.counted]


def seen(at: float, **fields: Any) -> Seen:
    defaults = {
        "first": at + 0.02,
        "last": at + 0.1,
        "routed": at + 0.01,
        "replica": "a",
        "loads": (1, 0, 0),
        "load": 1,
    }
    return Seen(**({"at": at, "adapter": 0, "num_prompt": 10, "num_output": 5} | defaults | fields))


def test_an_answer_has_the_replica_that_its_router_wrote_down(tmp_path: Path) -> None:
    file = tmp_path / "record"
    lines = [["warm.0", 1.0, "a", {"a": 1}], ["hot.3", 2.0, "a", {"a": 1}], ["hot.3", 3.0, "b", {"a": 4, "b": 2}]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    placements = read_placements(file, "hot")
    assert placements == {3: Placement(3.0, "b", {"a": 4, "b": 2})}
    found = [seen(0.0, replica=""), seen(0.0, replica="")]
    for one, where in zip(found, [None, placements[3]], strict=True):
        place(one, where, 2.0)
    assert [(s.replica, s.load, s.routed, bool(s.error)) for s in found] == [("", 1, 0.01, True), ("b", 2, 1.0, False)]


def test_a_row_and_what_is_asked_of_it() -> None:
    counted = [seen(float(i), replica="aab"[i % 3]) for i in range(9)] + [seen(9.0, error="refused")]
    hot = [seen(float(i), adapter=4, replica="ab"[i % 2]) for i in range(4)]
    before = [Figures(replica="a", num_loads=5, num_pool_hits=2), Figures(replica="b")]
    after = [Figures(replica="a", num_loads=7, num_pool_hits=8), Figures(replica="b", num_loads=1, num_host_hits=3)]
    made = row("loray", counted, hot, 4, before, after, 0.1)
    assert (made.pool, made.host, made.cold_loads, made.errors) == (0.6, 0.3, 3, 1)
    assert made.busiest == pytest.approx(6 / 4.5)
    assert (made.p50_ttft_s, made.tokens_per_s) == pytest.approx((0.02, 45 / 8.1))
    assert (made.hot_replicas, made.hot_s) == (2, pytest.approx(1.02))
    assert (made.most, made.above, made.above_known) == (1, 0, 0)
    ray = replace(made, router="ray", cold_loads=10, above=3)
    assert all(verdict.is_met for verdict in verdicts([made, ray]))
    worse = replace(made, above_known=1, hot_s=math.nan)
    assert not any(verdict.is_met for verdict in verdicts([worse, replace(ray, cold_loads=8)]))


def _simulated_answers(costs: Profile, asked: Sequence[Asked]) -> list[Seen]:
    """What a client would see of three replicas with these costs."""
    routed = {}

    class Noting(RandomRouter):
        def choose(self, job: SimulatedRequest, now: float) -> int:
            routed[job.index] = now
            return super().choose(job, now)

    made = requests(*((one.at, one.num_prompt, one.num_output, one.adapter) for one in asked))
    outcome = Simulator(made, costs, Policy("x", Noting(6, 0), Scaler(3)), initial=3, size=3).run()
    columns = zip(asked, outcome.ttft_R.tolist(), outcome.end_R.tolist(), outcome.slot_R.tolist(), strict=True)
    return [
        Seen(*one, first=one.at + ttft, last=one.at + end, routed=routed[i], replica=f"r{slot}")
        for i, (one, ttft, end, slot) in enumerate(columns)
    ]


@pytest.mark.parametrize("processors", [2, 8])
def test_what_a_simulation_was_given_is_found_in_its_requests(processors: int) -> None:
    """Loads, contention and steps of long prompts included. The requests are the benchmark's."""
    given = SMOLLM2_TWO_CORES.model_copy(
        update={"step_s": 6e-4, "decode_s": 1e-4, "adapter_s": 0.0, "prompt_s": 7e-6, "pair_s": 1e-8, "load_s": 0.003,
                "load_byte_s": 0.0, "place_s": 2e-4, "place_byte_s": 0.0, "contention": 0.4, "processors": processors,
                "outside_s": ((0.005, 0.001, 0.0), (0.006, 0.002, 0.0), (0.006, 0.002, 0.002)),
                "prompt_factors": (0.8, 0.9, 1.0, 1.3)}
    )  # fmt: skip
    asked = make_trace(Load(num_adapters=200, probe_rate=8.0)).counted
    costs = fit(_simulated_answers(given, asked), [], given.max_num_batched_tokens, processors)
    assert costs.contention == pytest.approx(given.contention, abs=0.08)
    assert costs.step + costs.row == pytest.approx(7e-4, rel=0.05)
    assert costs.load == pytest.approx(0.0032, rel=0.15)
    assert np.quantile(costs.outside.sum(axis=1), (0.1, 0.5, 0.9)) == pytest.approx([0.006, 0.008, 0.01], rel=0.1)
    assert costs.outside.mean(axis=0)[:2] == pytest.approx([0.0057, 0.0017], abs=0.0005)
    assert np.quantile(costs.factors, (0.1, 0.9)) == pytest.approx([0.8, 1.3], abs=0.1)
    for tokens in (500, 3000):
        found = tokens * costs.prompt + tokens**2 / 2 * costs.pair
        assert found == pytest.approx(tokens * given.prompt_s + tokens**2 / 2 * given.pair_s, rel=0.1)


def course(base: str, asked: list[Seen], *steps: tuple[float, str]) -> Course:
    """`steps`: from when on which replicas, a letter each, are wanted and run."""
    looks = [Look(at, len(names), frozenset(names), 12.0, 0.4, int(at), int(at) // 10) for at, names in steps]
    changes = [Change(b.at, a.target, b.target, "") for a, b in pairwise(looks) if a[1] != b[1]]
    return Course(base, asked, looks, changes)


OF_A = course(A, [seen(t) for t in range(120)], (-1, "x"), (30, "xy"), (80, "x"), (119, "x"))
OF_B = course(B, [seen(10)], (-5, "p"), (-1, ""), (10.2, "q"), (20, ""), (90.2, "r"), (115, ""))


@pytest.mark.parametrize(
    ("a", "b", "missed"),
    [
        (OF_A, OF_B, set()),
        (course(A, [seen(20, first=20.7)], (-1, "x"), (30, "xy"), (80, "x")), OF_B, {0}),
        (course(A, [seen(5)], (-1, "x"), (119, "x")), OF_B, {0, 1, 2, 5}),
        (course(A, [seen(5)], (-1, "x"), (30, "xy"), (119, "xy")), OF_B, {1}),
        (course(A, [seen(5)], (-1, "x"), (30, "xy"), (40, "x"), (50, "xy"), (80, "x")), OF_B, {2}),
        (OF_A, course(B, [seen(10)], (-1, "q"), (119, "q")), {3, 4}),
        (OF_A, course(B, [seen(10, error="503")], (-1, ""), (10.2, "q"), (20, "")), {3, 6}),
        (OF_A, course(B, [seen(10)], (-1, ""), (10.2, "q"), (20, ""), (50, "r"), (60, "")), {5}),
        (course(A, [seen(5)], (-1, "x"), (30, "xy"), (80, "x"), (95, "z")), OF_B, {4}),
    ],
)
def test_what_a_growth_misses(a: Course, b: Course, missed: set[int]) -> None:
    found: list[Check] = checks(a, b, growth.rows(a, 120.0), 0.5, 10.0)
    assert {i for i, check in enumerate(found) if not check.is_met} == missed, found


def test_demand_grows_stays_and_shrinks_beside_a_base_that_sleeps() -> None:
    plan = Plan()
    asked = plan.requests()
    assert asked == plan.requests() == sorted(asked)
    assert [plan.in_demand(at) for at in (0, 90, 192, 276, 330, 600)] == [12, 12, 80, 80, 12, 12]
    first, *others = [one.at for one in asked if one.adapter >= plan.many]
    assert (first, len(asked)) == (plan.wakes_s, pytest.approx(3600 + 384, rel=0.1))
    assert 432 < min(others) < max(others) < 528
