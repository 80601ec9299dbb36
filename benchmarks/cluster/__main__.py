"""Routers on a real cluster over HTTP, side by side in one run; then the simulator on the same trace.

    python -m benchmarks.cluster
    python -m benchmarks.cluster --adapters 200 --seconds 20 --router loray --router ray

Three replicas of a tiny model, 2,000 tiny adapters, of which a replica holds a part. Each router gets new replicas and
the same requests at the same times: every adapter once, which is not counted; then adapters by a power law, and probes
among them; then one adapter that is suddenly in demand. docs/benchmarks/cluster.md explains the table.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.cluster import rows as table_of_rows
from benchmarks.cluster import simulated
from benchmarks.cluster.client import Seen, send
from benchmarks.cluster.fitting import fit, profile
from benchmarks.cluster.rows import Row, row, verdicts
from benchmarks.cluster.trace import Load, Trace, make_trace, write_trace
from benchmarks.cluster.world import Figures, World, figures, load_seconds, started
from benchmarks.machine import describe_machine, load_average
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from loray.spec import ServeSpec

_REST_S = 3.0  # after the warm-up: what it has left to write, usage and copies of adapters, is not what counts
ROUTERS = ("loray", "ray", "random", "round-robin")


class Run(NamedTuple):
    """`load_s`: mean seconds of a load, by the replicas, in the warm-up."""

    row: Row
    warm: list[Seen]
    counted: list[Seen]
    load_s: float
    after: list[Figures]

    def to_json(self) -> dict[str, Any]:
        parts = {"warm": self.warm, "counted": self.counted}
        return {"router": self.row.router, "load_s": self.load_s} | {
            name: [asdict(seen) for seen in part] for name, part in parts.items()
        }


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the cluster is ended
    load = Load(
        num_adapters=args.adapters,
        rate=args.rate,
        seconds=args.seconds,
        hot_seconds=args.hot_seconds,
        alpha=args.alpha,
        probe_rate=args.probe_rate,
        seed=args.seed,
    )
    trace, folder = make_trace(load), args.folder
    if not trace.counted:
        raise SystemExit("no request comes in that time; raise --rate or --seconds")
    folder.mkdir(parents=True, exist_ok=True)
    write_trace(trace, folder / "trace.jsonl")
    machine, began = describe_machine(), time.monotonic()
    click.echo(machine_line(machine))
    click.echo(f"{args.adapters:,} adapters are published, and a cluster starts")
    with started(args.adapters, args.replicas) as world:
        spec = world.spec(args.replicas, args.held)
        click.echo(
            f"{args.replicas} replicas, each with room for {args.held:.0%} of the adapters; {len(trace.counted):,} "
            f"requests in {load.seconds:.0f} s for {len({a.adapter for a in trace.counted}):,} of them; ready after "
            f"{time.monotonic() - began:.0f} s"
        )
        runs = [_run(world, spec, trace, router) for router in args.router or ROUTERS]
    rows = [run.row for run in runs]
    click.echo("\n".join(table_of_rows.table(rows)))
    found = verdicts(rows)
    click.echo("\n".join(f"{'reached' if reached else 'MISSED':<8} {text}" for text, reached in found))
    write_json(folder / "requests.json", [run.to_json() for run in runs])
    made = {"machine": machine, "load": asdict(load), "rows": [r.to_json() for r in rows], "asked": dict(found)}
    write_json(args.json, made)  # the measurements stay if anything fails from here on
    try:
        compared = _simulated(runs, trace, spec, folder, args.replicas)
        made["simulated"] = [b._asdict() | {"ratio": b.ratio} for b in compared]
    except (ArithmeticError, RuntimeError, ValueError) as e:
        click.echo(f"nothing is simulated: {e}")
        made |= {"simulated": [], "not_simulated": str(e)}
    write_json(args.json, made)
    click.echo(f"{time.monotonic() - began:.0f} s in all")
    return 0 if all(reached for _, reached in found) and not any(r.errors for r in rows) else 1


def _run(world: World, spec: ServeSpec, trace: Trace, router: str) -> Run:
    load = load_average()
    with world.deployed(spec, router) as record:
        warm = send(spec.port, world.names, trace.warm, "warm", record)
        time.sleep(_REST_S)
        before, (seconds, loads) = figures(spec.port), load_seconds(spec.port)
        counted = send(spec.port, world.names, trace.counted, "counted", record)
        after = figures(spec.port)
        hot = send(spec.port, world.names, trace.hot, "hot", record)
    made = row(router, counted, hot, trace.hot_adapter, before, after, load)
    click.echo(f"{router}: {made.cold_loads} cold loads, p99 {1e3 * made.p99_ttft_s:.1f} ms")
    for seen in [s for s in counted if s.error][:3]:
        click.echo(f"  {seen.error}")
    return Run(made, warm, counted, seconds / max(1.0, loads), after)


def _simulated(
    runs: Sequence[Run], trace: Trace, spec: ServeSpec, folder: Path, num_replicas: int
) -> list[simulated.Beside]:
    """What work costs comes from the probes alone: no request is compared with its own times."""
    found = []
    processors = len(os.sched_getaffinity(0))
    fits = [fit(run.counted, run.warm, spec.max_num_batched_tokens, processors) for run in runs]
    loads = [costs.load for costs in fits if not math.isnan(costs.load)]
    for run, costs in zip(runs, fits, strict=True):
        if (router := run.row.router) not in simulated.POLICIES:
            continue
        other_s = sum(loads) / len(loads) if loads else run.load_s
        load_s = other_s if math.isnan(costs.load) else costs.load
        file, source = folder / f"profile-{router}.json", f"benchmarks.cluster, probes with {router}"
        file.write_text(
            profile(costs, load_s, run.after, spec, source, processors).model_dump_json(indent=2), encoding="utf-8"
        )
        outside_ms = 1e3 * float(np.median(costs.outside.sum(axis=1)))
        click.echo(
            f"{source}: {1e3 * costs.step:.2f} ms a step, {1e3 * costs.row:.2f} a request in it, "
            f"{1e6 * costs.prompt:.1f} µs a prompt's token, {1e9 * costs.pair:.1f} ns a pair, {1e3 * load_s:.2f} ms a "
            f"load, {outside_ms:.1f} ms outside, contention {costs.contention:.2f}"
        )
        arguments = simulated.command(folder / "trace.jsonl", file, trace.warm_up_s, num_replicas, router)
        click.echo("loray " + shlex.join(arguments))
        found += simulated.beside([run.row], simulated.simulate(arguments))
    click.echo("\n".join(simulated.table(found)))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Load()
    add("--router", action="append", choices=ROUTERS, help="may be repeated; all by default, in this order")
    add("--replicas", type=one_or_more, default=3, help="(default %(default)d)")
    add("--adapters", type=one_or_more, default=default.num_adapters, help="(default %(default)d)")
    add(
        "--held", type=float, default=0.42, help="share that a replica's pool, and its host, hold (default %(default)g)"
    )
    add("--rate", type=float, default=default.rate, help="requests a second (default %(default)g)")
    add("--seconds", type=float, default=default.seconds, help="that count, for each router (default %(default)g)")
    add("--hot-seconds", type=float, default=default.hot_seconds, help="of the sudden adapter (default %(default)g)")
    add("--probe-rate", type=float, default=6.0, help="probes a second among them (default %(default)g)")
    add("--alpha", type=float, default=default.alpha, help="popularity ∝ rank^-alpha (default %(default)g)")
    add("--seed", type=int, default=0)
    add("--folder", type=Path, default=Path("build/cluster"), help="for trace, profile, requests (default %(default)s)")
    add("--json", type=Path, help="write all figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
