"""`loray simulate`: a deployment under a trace, with several policies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from loray.cli.output import console, emit, json_option, progress_bar, table
from loray.cli.pictures import Chart, draw_charts
from loray.simulation.profile import SMOLLM2_TWO_CORES, load_profile
from loray.simulation.runs import run_all
from loray.simulation.scenario import POLICIES, Scenario
from loray.simulation.simulator import Course, mean
from loray.simulation.workload import WHERE, RequestTrace, find, read

_COLUMNS = {
    "p50 TTFT s": "{p50_ttft_s:.3f}",
    "p99 TTFT s": "{p99_ttft_s:.2f}",
    "mean s": "{mean_ttft_s:.3f}",
    "cold loads": "{cold_loads:,.0f}",
    "cold %": "{cold_percent:.1f}",
    "prefix %": "{prefix_percent:.1f}",
    "evicted": "{evictions:,.0f}",
    "replica-hours": "{replica_hours:,.2f}",
    "most": "{max_replicas:,.0f}",
    "run s": "{seconds:.1f}",
}


@click.command()
@click.option("--replicas", type=click.IntRange(1), default=16, show_default=True, help="That may run at once.")
@click.option("--adapters", type=click.IntRange(1), default=1000, show_default=True)
@click.option(
    "--trace",
    default="synthetic",
    show_default=True,
    help="synthetic; azure or mooncake, from the folder LORAY_TRACES; azure:FILE, mooncake:FILE or FILE.",
)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True)
@click.option(
    "--utilization",
    type=click.FloatRange(0, min_open=True),
    default=0.4,
    show_default=True,
    help="Mean work that comes, as a share of what all replicas can do; the trace is scaled to it.",
)
@click.option("--alpha", type=click.FloatRange(0), default=1.0, show_default=True, help="Popularity ∝ rank^-alpha.")
@click.option(
    "--turns",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Of each conversation, whose prompts repeat what was said; work is counted as if it were computed again.",
)
@click.option(
    "--think",
    "think_s",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="Seconds before the next turn, the mean.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs, whose means are shown.")
@click.option("--policy", "names", multiple=True, type=click.Choice(POLICIES), help="Repeatable. Default: all.")
@click.option("--fixed", is_flag=True, help="All replicas run all the time: compares routing alone.")
@click.option(
    "--target-utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.8,
    show_default=True,
    help="Of loray's autoscaling, and so of the oracle, random and dynamo.",
)
@click.option(
    "--wait-slo",
    "wait_slo_s",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="Of loray's autoscaling, and so of random and dynamo: seconds that first tokens may wait in a burst.",
)
@click.option(
    "--profile",
    "profile_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON of what steps and loads cost. Default: SmolLM2-135M on two cores.",
)
@click.option(
    "--replay",
    is_flag=True,
    help="The trace's own times, and adapters where its lines name them; --adapters, --minutes and --utilization are "
    "not used.",
)
@click.option(
    "--warm-up",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Seconds at the start that are not counted.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="SVG of the first run's course.")
@json_option
def simulate(
    *,
    trace: str,
    seed: int,
    seeds: int,
    names: tuple[str, ...],
    profile_file: Path | None,
    plot: Path | None,
    as_json: bool,
    **deployment: Any,
) -> None:
    """Simulate a deployment under a trace: how long first tokens take, how often adapters are loaded, and how many
    replicas run, with loray's routing and scaling and with others'.

    adapters is loray's routing without regard to prefixes; ray is Ray Serve's default router and autoscaler; random and
    dynamo (placement in proportion to demand) are scaled as loray is; oracle knows all requests in advance.
    """
    names = names or POLICIES
    profile = load_profile(profile_file) if profile_file is not None else SMOLLM2_TWO_CORES
    loaded = _trace(trace)
    if deployment["replay"] and loaded is not None:
        deployment |= {"adapters": loaded.num_adapters, "minutes": max(loaded.seconds, 1.0) / 60}
    scenarios = [Scenario(profile, trace=loaded, seed=i, **deployment) for i in range(seed, seed + seeds)]
    with progress_bar() as progress:
        runs = run_all(scenarios, names, partial(progress, f"{len(names) * seeds} runs"))
    num_requests = sum(run.num_requests for run in runs[:: len(names)])
    first = scenarios[0]
    title = (
        f"{trace}: {num_requests // seeds:,} requests, {first.adapters:,} adapters, at most {first.replicas:,} replicas"
    )
    if plot is not None:
        plot.write_text(_picture(title, [run.course for run in runs[: len(names)]]))
    means = {name: mean([run.summary for run in runs[i :: len(names)]]) for i, name in enumerate(names)}
    if as_json:
        policies = {name: made.to_json() for name, made in means.items()}
        emit({"profile": profile.name, "requests": num_requests, "runs": seeds, "policies": policies})
        return
    rows = []
    for i, (name, made) in enumerate(means.items()):
        seconds = sum(run.seconds for run in runs[i :: len(names)])
        figures = made._asdict() | {"cold_percent": 100 * made.cold_share, "seconds": seconds}
        figures["prefix_percent"] = 100 * made.prefix_hits
        rows.append((name, *(written.format(**figures) for written in _COLUMNS.values())))
    if seeds > 1:
        title += f", {first.minutes:g} minutes, {profile.name}; means of {seeds} runs"
    console().print(title)
    console().print(table(("policy", *_COLUMNS), rows, right=tuple(_COLUMNS)))


def _trace(name: str) -> RequestTrace | None:
    """Reads the trace; None where it is to be synthetic."""
    if name == "synthetic":
        return None
    kind, _, path = name.partition(":")
    if kind in WHERE:
        folder = os.environ.get("LORAY_TRACES")
        return read(_existing(Path(path)) if path else find(kind, Path(folder) if folder else None))
    return read(_existing(Path(name)))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise click.BadParameter(f"{path} is no file; synthetic, azure and mooncake need none", param_hint="--trace")
    return path


def _picture(title: str, courses: Sequence[Course]) -> str:
    """Draws the courses; times have a logarithmic scale."""
    charts = [
        Chart("p50 of the first token, s", [c.p50_B for c in courses], is_log=True),
        Chart("p99 of the first token, s", [c.p99_B for c in courses], is_log=True),
        Chart("cold loads, all so far", [np.cumsum(c.loads_B) for c in courses]),
        Chart("replicas", [c.replicas_B for c in courses]),
    ]
    return draw_charts(title, [c.policy for c in courses], courses[0].at_B / 60, charts)
