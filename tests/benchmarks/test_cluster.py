"""The benchmark of routers on a cluster: its trace, its rows, and figures beside the simulator's."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cluster import simulated
from benchmarks.cluster.client import Placement, Seen, place, read_placements
from benchmarks.cluster.routers import Random, RoundRobin
from benchmarks.cluster.rows import client_loads, num_above, replicas_needed, row, spread_after, table, verdicts
from benchmarks.cluster.trace import Load, make_trace, write_trace
from benchmarks.cluster.world import Figures
from benchmarks.output import write_json
from loray.simulation.profile import SMOLLM2_TWO_CORES
from loray.simulation.scenario import Scenario
from loray.simulation.workload import read
from tests.fixtures.routed import Replica, pending

LOAD = Load(num_adapters=50, rate=20.0, seconds=30.0, hot_seconds=5.0, probe_rate=10.0)


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


def figures(replica: str = "a", **fields: Any) -> Figures:
    return Figures(replica=replica, **fields)


# -- the trace --------------------------------------------------------------------------------------------------------


def test_equal_loads_give_equal_traces_and_each_adapter_comes_once_before() -> None:
    trace = make_trace(LOAD)
    assert trace == make_trace(LOAD)
    assert trace.counted != make_trace(replace(LOAD, seed=1)).counted
    assert sorted(asked.adapter for asked in trace.warm) == list(range(50))
    assert len(trace.counted) == pytest.approx(900, rel=0.2)
    assert all(0 < a.num_prompt <= 3000 and 0 < a.num_output <= 64 for a in trace.counted)
    assert make_trace(replace(LOAD, seconds=10.0)).counted == [a for a in trace.counted if a.at < 10]


def test_probes_have_prompts_of_all_lengths_and_change_no_other_request() -> None:
    counted = make_trace(LOAD).counted
    probes = [one for one in counted if one.probe]
    assert [one for one in counted if not one.probe] == make_trace(replace(LOAD, probe_rate=0.0)).counted
    assert len(probes) == pytest.approx(300, rel=0.2)
    assert all(16 <= one.num_prompt <= 3000 for one in probes)
    shares = np.histogram([one.num_prompt for one in probes], [16, 60, 220, 815, 3001])[0] / len(probes)
    assert shares == pytest.approx([0.25] * 4, abs=0.08)


def test_the_sudden_adapter_has_nine_requests_in_ten_and_was_not_asked_for() -> None:
    trace = make_trace(Load(num_adapters=500, rate=20.0, seconds=20.0, hot_seconds=20.0))
    assert trace.hot_adapter not in {asked.adapter for asked in trace.counted}
    share = sum(asked.adapter == trace.hot_adapter for asked in trace.hot) / len(trace.hot)
    assert share == pytest.approx(0.9, abs=0.05)


def test_the_simulator_replays_the_file_as_it_is(tmp_path: Path) -> None:
    trace, file = make_trace(LOAD), tmp_path / "trace.jsonl"
    write_trace(trace, file)
    made = Scenario(
        SMOLLM2_TWO_CORES, 3, 50, 1.0, read(file), fixed=True, replay=True, warm_up=trace.warm_up_s
    ).requests()
    assert len(made) == len(trace.warm) + len(trace.counted)
    counted = made.at_R >= trace.warm_up_s
    assert counted.sum() == len(trace.counted)
    assert np.allclose(made.at_R[counted] - trace.warm_up_s, [a.at for a in trace.counted], atol=1e-3)
    assert made.adapter_R[counted].tolist() == [a.adapter for a in trace.counted]
    assert made.prompt_R[counted].tolist() == [a.num_prompt for a in trace.counted]
    assert made.output_R[counted].tolist() == [a.num_output for a in trace.counted]
    assert made.probe_R is not None
    assert made.probe_R[counted].tolist() == [a.probe for a in trace.counted]


# -- rows -------------------------------------------------------------------------------------------------------------


def test_what_a_router_has_decided_is_read_by_part(tmp_path: Path) -> None:
    file = tmp_path / "record"
    lines = [["warm.0", 1.0, "a", {"a": 1}], ["hot.3", 2.0, "a", {"a": 1}], ["hot.3", 3.0, "b", {"a": 1, "b": 2}]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_placements(file, "hot") == {3: (3.0, "b", {"a": 1, "b": 2})}


def test_an_adapter_needs_replicas_by_its_share() -> None:
    """Each replica may have 1.25 times the mean."""
    assert [replicas_needed(share, 3) for share in (0.3, 0.5, 0.9, 1.0)] == [1, 2, 3, 3]
    assert replicas_needed(0.9, 10) == 8


def test_it_is_spread_when_the_last_replica_it_needs_has_answered() -> None:
    hot = [seen(float(i), adapter=7, replica=r) for i, r in enumerate("aababc")] + [seen(0.0, replica="c")]
    assert spread_after(hot, 7, 1) == pytest.approx(0.02)
    assert spread_after(hot, 7, 2) == pytest.approx(2.02)
    assert spread_after(hot, 7, 3) == pytest.approx(5.02)
    assert math.isnan(spread_after(hot, 7, 4))


def test_requests_above_the_bound_are_counted() -> None:
    """Of three replicas with two requests in all, a third may go to one that has one, not to one that has two."""
    assert num_above([(2, 3)], 3) == 0
    assert num_above([(3, 3)], 3) == 1
    assert num_above([(9, 25), (12, 25)], 3) == 1


def test_loads_are_what_the_client_saw() -> None:
    on_a = [seen(0.0, last=9.0), seen(1.0, last=2.0), seen(3.0, last=4.0)]
    assert client_loads([*on_a, seen(1.5, last=9.0, replica="b")]) == [(1, 1), (2, 2), (2, 3), (1, 3)]
    assert client_loads([seen(0.0, routed=0.2, last=0.1)]) == [(1, 1)]


def test_an_answer_without_a_replica_is_an_error() -> None:
    found = [seen(0.0, replica=""), seen(0.0, replica="")]
    for one, where in zip(found, [None, Placement(3.0, "b", {"a": 4, "b": 2})], strict=True):
        place(one, where, 2.0)
    assert [(s.replica, s.load, bool(s.error)) for s in found] == [("", 1, True), ("b", 2, False)]
    assert found[1].routed == 1.0


@pytest.mark.parametrize("kind", [Random, RoundRobin])
def test_a_router_that_offers_one_replica_pauses_where_it_is_full(kind: type[Any]) -> None:
    router, replicas = kind.__new__(kind), [Replica("one"), Replica("two")]
    router._turn = 0

    async def chosen() -> bool:
        request = pending(None)
        ((offered,),) = await router.choose_replicas(replicas, request)
        return offered in replicas and request.routing_context.should_backoff

    assert asyncio.run(chosen())


def test_a_row_and_what_is_asked_of_it() -> None:
    counted = [seen(float(i), replica="aab"[i % 3]) for i in range(9)] + [seen(9.0, error="refused")]
    hot = [seen(float(i), adapter=4, replica="ab"[i % 2]) for i in range(4)]
    before = [figures("a", num_loads=5, num_pool_hits=2), figures("b")]
    after = [figures("a", num_loads=7, num_pool_hits=8), figures("b", num_loads=1, num_host_hits=3)]
    made = row("loray", counted, hot, 4, before, after, 0.1)
    assert (made.pool, made.host, made.cold_loads, made.errors) == (0.6, 0.3, 3, 1)
    assert made.busiest == pytest.approx(6 / 4.5)
    assert made.p50_ttft_s == pytest.approx(0.02)
    assert made.tokens_per_s == pytest.approx(45 / 8.1)
    assert (made.hot_replicas, made.hot_s) == (2, pytest.approx(1.02))
    assert (made.most, made.above, made.above_known) == (1, 0, 0)
    ray = replace(made, router="ray", cold_loads=10, above=3)
    assert [reached for _, reached in verdicts([made, ray])] == [True, True, True]
    assert not any(r for _, r in verdicts([replace(made, above_known=1, hot_s=math.nan), replace(ray, cold_loads=8)]))
    assert len({len(line) for line in table([made, ray])}) == 1


# -- the simulator ----------------------------------------------------------------------------------------------------


def test_figures_stand_side_by_side() -> None:
    counted = [seen(float(i)) for i in range(10)]
    made = row("loray", counted, counted, 0, [figures()], [figures(num_loads=10)], 0.0)
    policies = {"loray": {"tokens_per_s": made.tokens_per_s, "cold_loads": 9, "p50_ttft_s": 0.025, "p99_ttft_s": 0.021}}
    found = simulated.beside([made, replace(made, router="round-robin")], policies)
    assert [b.figure for b in found if not b.is_within] == ["p50_ttft_s"]
    assert [round(b.ratio, 2) for b in found] == [1.0, 0.9, 1.25, 1.05]
    assert sum("more than 10% off" in line for line in simulated.table(found)) == 1


def test_figures_that_are_not_known_are_null(tmp_path: Path) -> None:
    write_json(tmp_path / "figures.json", {"rows": [{"hot_s": math.nan, "p50": 1.0}], "loads": (math.nan,)})
    assert json.loads((tmp_path / "figures.json").read_text()) == {
        "rows": [{"hot_s": None, "p50": 1.0}],
        "loads": [None],
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_run(tmp_path: Path) -> None:
    """In a process of its own: Ray reads its token once. What it asks of figures is not asked of so few requests."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cluster", "--adapters", "60", "--seconds", "10"]
    options = ["--hot-seconds", "4", "--rate", "12", "--router", "loray", "--router", "ray"]
    places = ["--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run([*command, *options, *places], capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode in (0, 1), said
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [r["router"] for r in found["rows"]] == ["loray", "ray"], said
    assert not sum(r["errors"] for r in found["rows"]), said
    assert found["rows"][0]["cold_loads"] < found["rows"][1]["cold_loads"], said
    assert found["rows"][0]["above_known"] == 0, said
    assert len(found["simulated"]) == 8 or found["not_simulated"], said
