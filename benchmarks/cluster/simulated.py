"""The same trace through `loray simulate`, and its figures beside the cluster's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cluster.rows import Row

_SEEDS = 5
_WITHIN = 0.1  # that is asked, of each ratio to 1
POLICIES = ("loray", "ray", "random")  # which the simulator has too
_FIGURES = ("tokens_per_s", "cold_loads", "p50_ttft_s", "p99_ttft_s")
_TITLES = ("tokens/s", "cold loads", "p50 TTFT, s", "p99 TTFT, s")


class Beside(NamedTuple):
    """One figure of one router, on the cluster and simulated."""

    router: str
    figure: str
    cluster: float
    simulated: float

    @property
    def ratio(self) -> float:
        return self.simulated / self.cluster if self.cluster else float("nan")

    @property
    def is_within(self) -> bool:
        return abs(self.ratio - 1) <= _WITHIN


def command(trace: Path, profile: Path, warm_up_s: float, num_replicas: int, router: str) -> list[str]:
    """Arguments of `loray`."""
    options = ["simulate", "--trace", str(trace), "--replay", "--warm-up", f"{warm_up_s:.3f}"]
    options += ["--profile", str(profile), "--replicas", str(num_replicas), "--fixed", "--seeds", str(_SEEDS)]
    return [*options, "--policy", router]


def simulate(arguments: Sequence[str]) -> dict[str, Any]:
    """By policy, the figures that the command prints. RuntimeError with its error."""
    done = subprocess.run(
        [sys.executable, "-m", "loray.cli.main", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"loray simulate failed:\n{done.stdout}{done.stderr}")
    policies: dict[str, Any] = json.loads(done.stdout)["policies"]
    return policies


def beside(rows: Sequence[Row], simulated: Mapping[str, Any]) -> list[Beside]:
    return [
        Beside(row.router, figure, float(getattr(row, figure)), float(simulated[row.router][figure]))
        for row in rows
        if row.router in simulated
        for figure in _FIGURES
    ]


def table(found: Sequence[Beside]) -> list[str]:
    lines = [f"{'router':<12} {'figure':<12} {'cluster':>10} {'simulated':>10} {'ratio':>6}"]
    titles = dict(zip(_FIGURES, _TITLES, strict=True))
    for b in found:
        numbers = (
            f"{value:.4f}" if b.figure.endswith("_s") and "ttft" in b.figure else f"{value:.1f}" for value in b[2:]
        )
        cluster, simulated = numbers
        mark = "" if b.is_within else f"  more than {_WITHIN:.0%} off"
        lines.append(f"{b.router:<12} {titles[b.figure]:<12} {cluster:>10} {simulated:>10} {b.ratio:>6.2f}{mark}")
    return lines
