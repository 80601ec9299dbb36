"""Routers on a real cluster over HTTP, side by side in one run.

    python -m benchmarks.cluster
    python -m benchmarks.cluster --adapters 200 --seconds 20 --router loray --router ray

Three replicas of a tiny model, 2,000 tiny adapters, of which a replica holds a part. Each router gets new replicas and
the same requests at the same times: every adapter once, which is not counted; then adapters by a power law, and probes
among them; then one adapter that is suddenly in demand. The probes say what work costs: the folder has the trace and a
profile of each router's replicas for `loray simulate`. docs/benchmarks/cluster.md explains the table.
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
from typing import NamedTuple

import click

from benchmarks.cluster.fitting import fit, profile
from benchmarks.cluster.measured import Figures, Seen, adapter_config, figures, mean_load_s, send_recorded
from benchmarks.cluster.rows import COLUMNS, Row, row, verdicts
from benchmarks.cluster.trace import Load, Trace, make_trace
from benchmarks.options import one_or_more
from benchmarks.report import Report, machine_line, write_json
from benchmarks.world import World, describe_machine, load_average, started_cluster, until
from loray.local.processes import free_ports
from loray.spec import FleetSpec, ServeSpec

ROUTERS = ("loray", "ray", "random", "round-robin")
_SIMULATED = ("loray", "ray", "random")
_KV_BYTES = 8 << 20
_REST_S = 3.0  # after the warm-up: what it has left to write, usage and copies of adapters, is not what counts


class Run(NamedTuple):
    """`load_s`: mean seconds of a load, by the replicas, in the warm-up."""

    row: Row
    warm: list[Seen]
    counted: list[Seen]
    load_s: float
    after: list[Figures]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the cluster is ended
    shape = {"alpha": args.alpha, "probe_rate": args.probe_rate, "seed": args.seed}
    load = Load(args.adapters, args.rate, args.seconds, args.hot_seconds, **shape)
    trace, folder = make_trace(load), args.folder
    if not trace.counted:
        raise SystemExit("no request comes in that time; raise --rate or --seconds")
    folder.mkdir(parents=True, exist_ok=True)
    trace.write(folder / "trace.jsonl")
    machine = describe_machine()
    click.echo(machine_line(machine))
    with started_cluster(args.adapters, args.replicas + 1, adapter_config()) as world:
        spec = _spec(world, args.replicas, args.held)
        click.echo(f"{args.replicas} replicas, each with room for {args.held:.0%} of {args.adapters:,} adapters")
        runs = [_run(world, spec, trace, router) for router in args.router or ROUTERS]
    rows = [run.row for run in runs]
    found = verdicts(rows)
    more = {"load": asdict(load), "rows": [asdict(r) for r in rows], "verdicts": [v.to_json() for v in found]}
    report = Report(machine, COLUMNS, [r.cells for r in rows], shlex.join(sys.argv[1:]), more)
    click.echo(report.text())
    click.echo("\n".join(verdict.line() for verdict in found))
    report.write(args.json)  # the measurements stay if anything fails from here on
    parts = [
        {"router": r.row.router, "warm": [asdict(s) for s in r.warm], "counted": [asdict(s) for s in r.counted]}
        for r in runs
    ]
    write_json(folder / "requests.json", parts)
    try:
        _write_profiles(runs, trace, spec, folder)
    except (ArithmeticError, ValueError) as e:
        click.echo(f"no profile is written: {e}")
    return 0 if all(v.is_met for v in found) and not any(r.errors for r in rows) else 1


def _spec(world: World, num_replicas: int, held: float) -> ServeSpec:
    """A replica's pool, and its host memory, each hold the share `held` of all adapters."""
    host_bytes = int(held * world.total_bytes)
    return ServeSpec(
        base=world.base.name,
        dtype="float32",
        num_threads=1,
        num_replicas=num_replicas,
        pool_bytes=host_bytes + _KV_BYTES,
        host_bytes=host_bytes,
        enable_prefix_caching=False,  # all prompts differ
        warm_start_s=0,  # else new replicas would begin with what the last router's requests were for
        port=free_ports(1)[0],
    )


def _run(world: World, spec: ServeSpec, trace: Trace, router: str) -> Run:
    load, fleet, record = load_average(), FleetSpec.of(spec), world.folder / f"{router}.jsonl"
    record.touch()
    args = {"fleet": fleet.to_args(), "router": router, "record": str(record)}
    with world.deployed(fleet, import_path="benchmarks.cluster.application:build", args=args) as port:
        until(lambda: len(figures(port)) == spec.num_replicas, "all replicas answer")
        warm = send_recorded(port, world.names, trace.warm, "warm", record)
        time.sleep(_REST_S)
        before, load_s = figures(port), mean_load_s(port)
        counted = send_recorded(port, world.names, trace.counted, "counted", record)
        after = figures(port)
        hot = send_recorded(port, world.names, trace.hot, "hot", record)
    made = row(router, counted, hot, trace.hot_adapter, before, after, load)
    click.echo(f"{router}: {made.cold_loads} cold loads, p99 {1e3 * made.p99_ttft_s:.1f} ms")
    for seen in [s for s in counted if s.error][:3]:
        click.echo(f"  {seen.error}")
    return Run(made, warm, counted, load_s, after)


def _write_profiles(runs: Sequence[Run], trace: Trace, spec: ServeSpec, folder: Path) -> None:
    """What work costs comes from the probes alone. Prints the commands that replay the trace by it."""
    processors = len(os.sched_getaffinity(0))
    fits = [fit(run.counted, run.warm, spec.max_num_batched_tokens, processors) for run in runs]
    loads = [costs.load for costs in fits if not math.isnan(costs.load)]
    for run, costs in zip(runs, fits, strict=True):
        if (router := run.row.router) not in _SIMULATED:
            continue
        other_s = sum(loads) / len(loads) if loads else run.load_s
        load_s = other_s if math.isnan(costs.load) else costs.load
        file, source = folder / f"profile-{router}.json", f"benchmarks.cluster, probes with {router}"
        made = profile(costs, load_s, run.after, spec, source, processors)
        file.write_text(made.model_dump_json(indent=2), encoding="utf-8")
        options = ["--trace", str(folder / "trace.jsonl"), "--replay", "--warm-up", f"{trace.warm_up_s:.3f}"]
        options += ["--profile", str(file), "--replicas", str(spec.num_replicas), "--fixed", "--seeds", "5"]
        click.echo("loray simulate " + shlex.join([*options, "--policy", router]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Load()
    add("--router", action="append", choices=ROUTERS, help="may be repeated; all by default, in this order")
    add("--replicas", type=one_or_more, default=3, help="(default %(default)d)")
    add("--adapters", type=one_or_more, default=default.num_adapters, help="(default %(default)d)")
    add("--held", type=float, default=0.42, help="share that a pool, and a host, hold (default %(default)g)")
    add("--rate", type=float, default=default.rate, help="requests a second (default %(default)g)")
    add("--seconds", type=float, default=default.seconds, help="that count, for each router (default %(default)g)")
    add("--hot-seconds", type=float, default=default.hot_seconds, help="of the sudden adapter (default %(default)g)")
    add("--probe-rate", type=float, default=6.0, help="probes a second among them (default %(default)g)")
    add("--alpha", type=float, default=default.alpha, help="popularity ∝ rank^-alpha (default %(default)g)")
    add("--seed", type=int, default=0)
    add(
        "--folder", type=Path, default=Path("build/cluster"), help="for trace, profiles, requests (default %(default)s)"
    )
    add("--json", type=Path, help="write all figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
