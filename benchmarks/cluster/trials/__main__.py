"""Trials of a real cluster, three replicas of a tiny model on this machine, over HTTP.

    python -m benchmarks.cluster.trials store     the store is killed for a minute, beside warm and cold requests
    python -m benchmarks.cluster.trials flood     one tenant floods beside another's steady requests

docs/benchmarks/cluster.md explains them. The exit code is 1 where something was missed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.cluster.trials import flood, store
from benchmarks.cluster.trials.world import World, started
from benchmarks.machine import describe_machine, load_average
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from serve_apps.python_gc import freeze_garbage

_FLOOD_ADAPTERS = 20


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all servers are ended
    machine, load, began = describe_machine(), load_average(), time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - began:5.0f} s  {text}")

    click.echo(machine_line(machine, load=f"{load:.1f}"))
    num_adapters = args.adapters if args.trial == "store" else _FLOOD_ADAPTERS
    with started(num_adapters, args.replicas, say) as world:
        freeze_garbage()  # a collection would hold up the clients
        found = _run(world, args, say)
    verdicts = found.verdicts()
    click.echo("\n".join(found.table()))
    click.echo("\n".join(f"{'reached' if reached else 'MISSED':<8} {text}" for text, reached in verdicts))
    say("the end")
    write_json(args.json, {"machine": machine, "load": load, "asked": dict(verdicts)} | found.to_json())
    return 0 if all(reached for _, reached in verdicts) else 1


def _run(world: World, args: argparse.Namespace, say: store.Say) -> store.Found | flood.Found:
    if args.trial == "store":
        num_warm, seconds = max(1, args.adapters // 2), args.seconds
        return store.run(world, store.Plan(num_warm, args.rate, seconds=seconds, seed=args.seed), say)
    return flood.run(
        world, flood.Plan(args.rounds, args.requests, args.rate, at_once=args.at_once, seed=args.seed), say
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trials = parser.add_subparsers(dest="trial", required=True)
    away, flooding = store.Plan(), flood.Plan()
    one = trials.add_parser("store", help="the store is away", description=store.__doc__)
    one.add_argument("--adapters", type=one_or_more, default=200, help="half of them warm (default %(default)d)")
    one.add_argument("--seconds", type=float, default=away.seconds, help="with and without it (default %(default)g)")
    other = trials.add_parser("flood", help="one tenant floods", description=flood.__doc__)
    for option, default, of in (
        ("--rounds", flooding.rounds, "of all three parts"),
        ("--requests", flooding.num, "of the other tenant in each"),
        ("--at-once", flooding.at_once, "the flood's"),
    ):
        other.add_argument(option, type=one_or_more, default=default, help=f"{of} (default %(default)d)")
    for trial, rate in ((one, away.rate), (other, flooding.rate)):
        trial.add_argument("--rate", type=float, default=rate, help="warm requests a second (default %(default)g)")
        trial.add_argument("--replicas", type=one_or_more, default=3, help="(default %(default)d)")
        trial.add_argument("--seed", type=int, default=0)
        trial.add_argument("--json", type=Path, help="write all figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
