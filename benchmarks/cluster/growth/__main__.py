"""Replicas that follow the working set, and two bases that scale apart, on a real cluster over HTTP.

    python -m benchmarks.cluster.growth
    python -m benchmarks.cluster.growth --minutes 6 --plot growth.svg --json growth.json

Two bases of a tiny model in one deployment, each with its own autoscaler. docs/benchmarks/cluster.md explains it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.chaos.world import until
from benchmarks.cluster.client import Seen, answered
from benchmarks.cluster.growth.course import Course, rows, table, verdicts
from benchmarks.cluster.growth.picture import draw
from benchmarks.cluster.growth.plan import MOST_B, Names, Plan
from benchmarks.cluster.growth.watch import Watch
from benchmarks.cluster.world import BASE, CONTEXT, World, adapter_config, figures, started
from benchmarks.copies import publish_copies
from benchmarks.machine import describe_machine, load_average
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from loray.bases.registry import add_base
from loray.local.processes import LOOPBACK, free_ports
from loray.spec import FleetSpec
from serve_apps.deployment import APPLICATION, serve_config

NAMES = Names(BASE, "second")
_READY_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the cluster is ended
    plan = Plan(args.minutes, args.rate, most=args.replicas, seed=args.seed)
    machine, load, began = describe_machine(), load_average(), time.monotonic()
    click.echo(f"{machine_line(machine)}  load {load:.2f}")
    fleet = plan.fleet(NAMES, free_ports(1)[0])
    with started(plan.many, plan.most + MOST_B) as world:
        names = [*world.names, *_second_base(world, plan)]
        a, b, num_lost = _run(world, fleet, plan, names)
    of_a, of_b = rows(a, plan.seconds), rows(b, plan.seconds)
    click.echo("\n".join(table(of_a, of_b)))
    for course in (a, b):
        for change in course.changes:
            click.echo(f"{course.base} {change.at:5.0f} s: {change.before} → {change.after}: {change.reason}")
    for seen in [s for s in (*a.seen, *b.seen) if s.error][:5]:
        click.echo(f"  at {seen.at:.1f} s: {seen.error}")
    found = verdicts(a, b, of_a, args.slo, plan.wakes_s)
    click.echo("\n".join(f"{'reached' if v.is_reached else 'MISSED':<8} {v.text}" for v in found))
    made = {
        "machine": machine,
        "load": load,
        "plan": asdict(plan),
        "slo_s": args.slo,
        "fleet": fleet.to_args(),
        "rows": {a.base: [r.to_json() for r in of_a], b.base: [r.to_json() for r in of_b]},
        "changes": {c.base: [change._asdict() for change in c.changes] for c in (a, b)},
        "looks_lost": num_lost,
        "asked": {v.text: v.is_reached for v in found},
    }
    write_json(args.json, made)
    if args.plot is not None:
        title = f"{plan.rate:g} requests a second for {plan.few} to {plan.many} adapters, and a base that sleeps"
        args.plot.write_text(draw(title, [a, b], [of_a, of_b], plan.seconds, args.slo), encoding="utf-8")
    click.echo(f"{time.monotonic() - began:.0f} s in all")
    return 0 if all(v.is_reached for v in found) else 1


def _second_base(world: World, plan: Plan) -> list[str]:
    """Adds it; returns the names of its adapters."""
    from tests.fixtures.tiny import write_checkpoint

    checkpoint = write_checkpoint(world.folder / "second", seed=1, max_position_embeddings=CONTEXT)
    base = add_base(str(checkpoint), home=world.settings.home, name=NAMES.b)
    return publish_copies(world.folder / "of-second", base, world.settings, [adapter_config()], plan.many_b, "b")


def _run(world: World, fleet: FleetSpec, plan: Plan, names: Sequence[str]) -> tuple[Course, Course, int]:
    """The courses of A and of B, and how many looks had no answer."""
    config = serve_config(fleet, world.settings)
    config["applications"] = [a for a in config["applications"] if a["name"] == APPLICATION]
    watch = Watch(f"http://{LOOPBACK}:{fleet.port}")
    with world.running(config):
        until(lambda: bool(figures(fleet.port)), "a replica answers", _READY_S)
        with watch.running():
            answered(fleet.port, names, plan.warm(), "warm")
            click.echo(f"{plan.minutes:g} minutes begin")
            began, seen = answered(fleet.port, names, plan.requests(), "counted")
            time.sleep(max(0.0, began + plan.seconds - time.perf_counter()))
    of_a = _course(NAMES.a, [s for s in seen if s.adapter < plan.many], watch, began)
    of_b = _course(NAMES.b, [s for s in seen if s.adapter >= plan.many], watch, began)
    return of_a, of_b, watch.num_lost


def _course(base: str, seen: Sequence[Seen], watch: Watch, began: float) -> Course:
    looks = [look._replace(at=look.at - began) for look in watch.looks.get(base, ())]
    changes = [change._replace(at=change.at - began) for change in watch.changes(base)]
    return Course(base, seen, looks, changes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Plan()
    add("--minutes", type=float, default=default.minutes, help="at least 2 (default %(default)g)")
    add("--rate", type=float, default=default.rate, help="of A, requests a second (default %(default)g)")
    add(
        "--replicas",
        type=one_or_more,
        default=default.most,
        help="A's at most; 1: what happens without (default %(default)d)",
    )
    add("--slo", type=float, default=0.5, help="seconds to the first token, p99 of 15 s (default %(default)g)")
    add("--seed", type=int, default=default.seed)
    add("--plot", type=Path, help="write a picture there, as SVG")
    add("--json", type=Path, help="write all figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
