"""Faults under load, one after the other, and what clients see of them.

    python -m benchmarks.chaos                      ten minutes, a fault every 20 s
    python -m benchmarks.chaos --only S3 --minutes 1
    python -m benchmarks.chaos --list

A cluster of two nodes with three replicas of a tiny model, one of two ranks, two gateways behind HAProxy, 200 adapters
in S3, the catalog in PostgreSQL, the cluster's tables in Redis. Every answer has one right text, which is learned
before the first fault. Where a fault takes answers, long streams have begun right before it.
docs/benchmarks/faults.md explains the table. The exit code is 1 where a client saw what it may not see.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.chaos.clients import Load
from benchmarks.chaos.faults import Fault, is_whole, matrix, missing, struck
from benchmarks.chaos.resumes import Resumes
from benchmarks.chaos.verdicts import CONTINUED, Window, continued, divide, table
from benchmarks.chaos.verdicts import failures as failures_of
from benchmarks.chaos.world import PARALLEL, World, started, until
from benchmarks.machine import describe_machine
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from loray.errors import ClusterError
from loray.local.processes import log_tail
from loray.local.serving import serve_details
from tests.serve_apps.chaos.kinds import Kind, make_kinds

_PREFIXES = ("", f"/{PARALLEL}")  # of the two applications
_WHOLE_S = 180.0
_LONG = ((13, 600), (6, 300))  # of each application: kinds of long answers, and their tokens; two ranks are slower
_BEGIN_S = 20.0
_SPARE_FILES = 8  # of a process that has been replaced: its database connections come when they are needed


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    names = [fault.name for fault in matrix(has_own_disk=True)]
    if args.list or not _wanted(names, args.only):
        click.echo("\n".join(names), err=not args.list)
        return 0 if args.list else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all servers are ended
    machine = describe_machine()
    click.echo(machine_line(machine))
    with started(args.adapters, args.seed, click.echo) as world:
        faults = [f for f in matrix(has_own_disk=world.has_own_disk) if _wanted([f.name], args.only)]
        if not world.has_own_disk:
            click.echo("left out: a full disk (this user may not mount a file system)")
        if not faults:
            return 2
        windows, left = _run(world, faults, args)
    share = continued(windows)
    failures = [window.missing for window in windows if window.missing] + failures_of(windows)
    failures += [f"left behind: {line}" for line in left]
    if share is not None and share < CONTINUED:
        failures.append(f"{share:.1%} of the streams that lost their replica went on, of {CONTINUED:.0%}")
    if share is None and any(window.fault.loses for window in windows):
        failures.append("replicas were lost, and no answer went on: it is not shown that any does")
    click.echo("\n".join(table(windows)))
    said = "none lost its replica" if share is None else f"{share:.1%} of those that lost their replica went on"
    num_seen = sum(len(w.seen) for w in windows)
    click.echo(
        f"{num_seen} requests, {len(windows)} faults; begun answers: {said}; " + ("FAILED" if failures else "passed")
    )
    click.echo("\n".join(failures[:40]))
    rows = [window.row for window in windows]
    write_json(args.json, {"machine": machine, "rows": rows, "continued": share, "failures": failures})
    return 1 if failures else 0


def _wanted(names: Sequence[str], parts: Sequence[str] | None) -> list[str]:
    return [name for name in names if not parts or any(part in name for part in parts)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="of faults (default %(default)g)")
    add("--every", type=float, default=20.0, help="seconds from one fault to the next, at least (default %(default)g)")
    add("--rate", type=float, default=4.0, help="requests a second (default %(default)g)")
    add("--adapters", type=one_or_more, default=200, help="(default %(default)d)")
    add("--only", action="append", help="faults whose name has this in it; may be repeated")
    add("--list", action="store_true", help="the names of all faults")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write the table there too")
    return parser


def _run(world: World, faults: Sequence[Fault], args: argparse.Namespace) -> tuple[list[Window], list[str]]:
    """The windows, and what was left behind."""
    chance = random.Random(args.seed)
    kinds = make_kinds(world.names, len(world.names) + 40, chance)
    chance.shuffle(kinds)
    prefixes = _divided(kinds)
    long = [[_long(chance.choice(world.names), i, num_tokens) for i in range(num)] for num, num_tokens in _LONG]
    prefixes |= {kind: prefix for prefix, some in zip(_PREFIXES, long, strict=True) for kind in some}
    load = Load(world.url, world.key, prefixes, kinds)
    click.echo(f"{len(prefixes)} answers are learned")
    asyncio.run(load.learn())
    resumes = Resumes([f"{load.url}{prefix}" for prefix in _PREFIXES], world.observer_key)
    asyncio.run(resumes.ask())  # with the first look at its metrics a gateway makes its handle of all gateways
    before = world.in_cluster("held")
    windows = asyncio.run(_under_load(world, load, resumes, long, faults, args))
    divide(load.seen, windows)
    until(lambda: is_whole(world), "all processes run", _WHOLE_S)
    asyncio.run(load.learn())  # all gateways and replicas have met again
    return windows, _left(before, world)


def _divided(kinds: Sequence[Kind]) -> dict[Kind, str]:
    """One in six for the application with two ranks. None of those is fat, with 720 tokens in its answer: drawn often,
    two fat kinds ask for as many tokens as two ranks compute on two cores, and a queue that has formed there in a fault
    does not end before the next one.
    """
    thin = [kind for kind in kinds if not kind.is_fat]
    of_two = set(thin[5::6])
    return {kind: _PREFIXES[kind in of_two] for kind in kinds}


def _long(model: str, number: int, num_tokens: int) -> Kind:
    """Some seconds. Greedy and drawn in turn."""
    body = {"model": model, "prompt": f"Once upon a time {number}", "max_tokens": num_tokens, "ignore_eos": True}
    return Kind("/v1/completions", body | ({"temperature": 0} if number % 2 else {"temperature": 1, "seed": number}))


async def _under_load(
    world: World,
    load: Load,
    resumes: Resumes,
    long: Sequence[Sequence[Kind]],
    faults: Sequence[Fault],
    args: argparse.Namespace,
) -> list[Window]:
    windows: list[Window] = []
    counts: list[int] = []  # of answers that had gone on before each fault, and in the end
    order = list(faults)
    random.Random(args.seed).shuffle(order)
    is_over = False
    async with load.client() as client:
        clients = asyncio.create_task(load.run(client, args.rate, args.seed, lambda: is_over))
        try:
            await asyncio.sleep(5)
            end = time.monotonic() + 60 * args.minutes
            while time.monotonic() < end:
                fault = order[len(windows) % len(order)]
                counts.append(await resumes.ask())
                kinds = [kind for some, num in zip(long, fault.streams, strict=True) for kind in some[:num]]
                num_begun = await load.begin(client, kinds, _BEGIN_S)
                now = time.monotonic()
                if windows:
                    windows[-1].next_begun = now
                windows.append(Window(fault, now))
                await asyncio.to_thread(_strike, world, windows[-1])
                of_long = f"{num_begun} of {len(kinds)} long streams had begun; " if kinds else ""
                last = f" (last missing: {windows[-1].last_missing})" if windows[-1].last_missing else ""
                whole = f"whole after {windows[-1].whole - now:.1f} s{last}"
                click.echo(f"{fault.name}: {of_long}{whole}; {load.num_running} requests are under way")
                await asyncio.sleep(max(0.0, now + args.every - time.monotonic()))
        finally:
            is_over = True
            await clients
        counts.append(await resumes.ask())
    for window, before, after in zip(windows, counts[:-1], counts[1:], strict=True):
        window.resumed = after - before
    return windows


def _strike(world: World, window: Window) -> None:
    """Blocks, in a thread beside the clients."""
    name = f"all processes run after: {window.fault.name}"

    def whole() -> bool:
        found = missing(world)
        window.last_missing = found or window.last_missing
        return not found

    try:
        with struck(window.fault, world) as repair:
            time.sleep(window.fault.hold_s)
            repair()
        until(whole, name, _WHOLE_S, lambda: _state(world))
    except (AssertionError, ClusterError, subprocess.SubprocessError) as e:
        window.missing = f"{window.fault.name}: {e}"
    window.whole = time.monotonic()


def _state(world: World) -> str:
    details = serve_details(world.local)
    deployments = (d for a in details["applications"].values() for d in a["deployments"].values())
    told = [f"{d['name']}: {d['status']} {d['message']} {[r['state'] for r in d['replicas']]}" for d in deployments]
    return "\n".join([missing(world), *told, log_tail(str(world.folder / "node.log"))])


def _left(before: dict[str, Any], world: World) -> list[str]:
    """What processes hold of requests, and what the cluster has more than before the first fault."""
    found = []
    cluster_before = before.pop("cluster")
    held = world.in_cluster("held", "emptied")
    cluster = held.pop("cluster")
    found += [
        f"{n - cluster_before.get(name, 0)} × {name}" for name, n in cluster.items() if n > cluster_before.get(name, 0)
    ]
    usual: dict[str, dict[str, int]] = {}
    for process, figures in before.items():
        most = usual.setdefault(_role(process), {})
        most |= {name: max(n, most.get(name, 0)) for name, n in figures.items()}
    for process, figures in held.items():
        for name, n in figures.items():
            allowed = 0 if name in ("requests", "blocks") else usual.get(_role(process), {}).get(name, 0)
            allowed += _SPARE_FILES if name == "files" else 0
            if n > allowed:
                found.append(f"{process}: {n} {name} of {allowed}")
    return found


def _role(process: str) -> str:
    """Gateway or engine, of either application."""
    return process.split(" ")[1]


if __name__ == "__main__":
    sys.exit(main())
