"""The benchmark of growth: its plan, its rows, its verdicts and its picture."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.cluster.client import Seen
from benchmarks.cluster.growth.course import Course, Verdict, rows, table, verdicts
from benchmarks.cluster.growth.picture import draw
from benchmarks.cluster.growth.plan import Names, Plan
from benchmarks.cluster.growth.watch import Change, Look, Watch
from loray.schemas.status import AutoscalingStatus, BaseStatus, CatalogStatus, EngineStatus, ReplicaStatus, Status
from loray.schemas.status import ScalingDecision as Told
from loray.spec import FleetSpec, ServeSpec

# -- the plan ---------------------------------------------------------------------------------------------------------


def test_demand_grows_stays_and_shrinks_at_one_rate() -> None:
    plan = Plan()
    asked = plan.requests()
    assert asked == plan.requests()
    assert asked == sorted(asked)
    assert [plan.in_demand(at) for at in (0, 90, 192, 276, 330, 600)] == [12, 12, 80, 80, 12, 12]
    of_a = [one for one in asked if one.adapter < plan.many]
    for begins in range(0, 600, 100):
        assert sum(begins <= one.at < begins + 100 for one in of_a) == pytest.approx(600, rel=0.15)
    assert len({one.adapter for one in of_a if 200 < one.at < 270}) > 75
    assert {one.adapter for one in of_a if one.at > 330} == set(range(12))


def test_the_second_base_is_asked_once_and_has_a_load_at_the_end() -> None:
    plan = Plan()
    first, *rest = [one for one in plan.requests() if one.adapter >= plan.many]
    begins, ends = plan.b_load_s
    assert first.at == plan.wakes_s
    assert all(begins < one.at < ends for one in rest)
    assert len({one.adapter for one in rest}) == plan.many_b


def test_windows_and_delays_fit_into_the_run() -> None:
    long, short = (Plan(minutes=minutes).fleet(Names("a", "b"), 8123) for minutes in (10, 3))
    assert FleetSpec.parse(long.to_args(), source="the test") == long
    assert [s.autoscaling.window_s for s in long.bases if s.autoscaling] == [30.0, 30.0]
    assert [s.autoscaling.window_s for s in short.bases if s.autoscaling] == [9.0, 9.0]
    assert [(s.min_replicas, s.max_replicas) for s in long.bases] == [(1, 4), (0, 3)]


# -- the watch --------------------------------------------------------------------------------------------------------


def status(replicas: dict[str, tuple[int, int]], reason: str, *changes: tuple[float, int, int]) -> Status:
    """`replicas`: pool hits and misses."""
    told = tuple(Told(time=at, from_replicas=f, to_replicas=t, reason="") for at, f, t in changes)
    scaling = AutoscalingStatus(target=len(replicas), reason=reason, time=0.0, decisions=told)
    return Status(
        status="ok",
        bases=(
            BaseStatus(
                base="a",
                status="ok" if replicas else "asleep",
                num_replicas=len(replicas),
                target=len(replicas),
                num_adapters=0,
                spec=ServeSpec(base="a", pool_bytes=1 << 20),
                autoscaling=scaling,
            ),
        ),
        catalog=CatalogStatus(num_adapters=0),
        replicas=tuple(
            ReplicaStatus(replica=name, base="a", node="n", pid=1, uptime_s=1.0, num_pool_hits=hits, num_misses=misses)
            for name, (hits, misses) in replicas.items()
        ),
        totals=EngineStatus(),
    )


def test_counts_stay_when_a_replica_goes_and_changes_are_kept() -> None:
    watch = Watch("http://nowhere")
    said = "working set 1.5 MiB of 57 adapters needs 2 replicas at 0.8 MiB of pool each"
    watch.take(status({"x": (5, 2), "y": (3, 1)}, said, (1001.0, 1, 2)), 2.0, 1000.0)
    watch.take(status({"x": (9, 2)}, "", (1004.0, 2, 1)), 5.0, 1000.0)
    watch.take(status({}, "no request"), 6.0, 1000.0)
    first, second, third = watch.looks["a"]
    assert (first.num_adapters, first.pools, first.asked, first.outside) == (57.0, 1.5, 11, 3)
    assert (second.replicas, second.asked, second.outside, math.isnan(second.pools)) == ({"x"}, 15, 3, True)
    assert (third.target, third.pools) == (0, 0.0)
    assert [(c.at, c.before, c.after) for c in watch.changes("a")] == [(1.0, 1, 2), (4.0, 2, 1)]


# -- the course -------------------------------------------------------------------------------------------------------


def seen(at: float, ttft: float = 0.02, error: str = "") -> Seen:
    return Seen(at, 0, 64, 8, first=at + ttft, last=at + 1, error=error)


def course(base: str, requests: list[Seen], *steps: tuple[float, set[str]]) -> Course:
    """`steps`: from when on which replicas are wanted and run."""
    looks = [Look(at, len(names), frozenset(names), 12.0, 0.4, int(at), int(at) // 10) for at, names in steps]
    changes = [
        Change(later.at, before.target, later.target, "")
        for before, later in pairwise(looks)
        if before.target != later.target
    ]
    return Course(base, requests, looks, changes)


A = course("a", [seen(t) for t in range(120)], (-1, {"x"}), (30, {"x", "y"}), (80, {"x"}), (119, {"x"}))
B = course(
    "b", [seen(10, 8.0), *(seen(t) for t in range(90, 110))],
    (-5, {"p"}), (-1, set()), (10.2, {"q"}), (20, set()), (90.2, {"r"}), (115, set()),
)  # fmt: skip


def asked(a: Course, b: Course) -> list[Verdict]:
    return verdicts(a, b, rows(a, 120.0), 0.5, 10.0)


def test_a_run_as_it_should_be() -> None:
    found = asked(A, B)
    assert all(v.is_reached for v in found), found
    assert "after 30 s" in found[0].text
    assert "after 8.0 s" in found[3].text
    of_a, of_b = rows(A, 120.0), rows(B, 120.0)
    assert [(r.target, r.requests, r.errors) for r in of_a][:3] == [(1, 15, 0), (2, 15, 0), (2, 15, 0)]
    assert of_b[0].p99_s == pytest.approx(8.0)
    assert math.isnan(of_b[2].p99_s)
    assert len({len(line) for line in table(of_a, of_b)}) == 1


def late() -> list[Seen]:
    return [seen(t, 0.7 if t == 20 else 0.02) for t in range(120)]


@pytest.mark.parametrize(
    ("a", "b", "missed"),
    [
        (course("a", late(), (-1, {"x"}), (30, {"x", "y"}), (80, {"x"})), B, {0}),
        (course("a", [seen(5)], (-1, {"x"}), (119, {"x"})), B, {0, 1, 2, 5}),
        (course("a", [seen(5)], (-1, {"x"}), (30, {"x", "y"}), (119, {"x", "y"})), B, {1}),
        (course("a", [seen(5)], (-1, {"x"}), (30, set("xy")), (40, {"x"}), (50, set("xy")), (80, {"x"})), B, {2}),
        (A, course("b", [seen(10)], (-1, {"q"}), (119, {"q"})), {3, 4}),
        (A, course("b", [seen(10, error="503")], (-1, set()), (10.2, {"q"}), (20, set())), {3, 6}),
        (A, course("b", [seen(10)], (-1, set()), (10.2, {"q"}), (20, set()), (50, {"r"}), (60, set())), {5}),
        (course("a", [seen(5)], (-1, {"x"}), (30, set("xy")), (80, {"x"}), (95, {"z"})), B, {4}),
    ],
)
def test_what_is_missed(a: Course, b: Course, missed: set[int]) -> None:
    found = asked(a, b)
    assert {i for i, v in enumerate(found) if not v.is_reached} == missed, found


def test_a_failed_request_never_has_its_first_token() -> None:
    (row,) = rows(Course("a", [seen(1), seen(2, error="503")], [], []), 15.0)
    assert (row.errors, row.p50_s, row.p99_s) == (1, pytest.approx(0.02), math.inf)
    assert row.to_json()["p99_s"] is None


def test_the_picture_has_a_line_for_each_base_and_the_slo() -> None:
    drawn = draw("t", [A, B], [rows(A, 120.0), rows(B, 120.0)], 120.0, 0.5)
    lines = ElementTree.fromstring(drawn).findall("{*}polyline")
    assert {line.get("stroke") for line in lines} == {"#c44870", "#3567a8", "#999999"}
    assert len(lines) == 4 + 2 + 4  # B has times twice: its first request, and its load
    assert "SLO 0.5 s" in drawn


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_short_run(tmp_path: Path) -> None:
    """In a process of its own: Ray reads its token once. What it asks of times is not asked of so short a run."""
    files = ["--json", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "figures.svg")]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cluster.growth", "--minutes", "2", *files]
    done = subprocess.run(command, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode in (0, 1), said
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    assert not any(row["errors"] for of in found["rows"].values() for row in of), said
    assert max(change["after"] for change in found["changes"]["tiny"]) > 1, said
    assert ElementTree.parse(tmp_path / "figures.svg").findall("{*}polyline"), said
