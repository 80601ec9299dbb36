"""Faults under load, one after the other, and what clients see of them.

    python -m tests.faults                      ten minutes, a fault every 20 s
    python -m tests.faults --only S3 --minutes 1
    python -m tests.faults --list

A cluster of two nodes with three replicas of a tiny model, one of two ranks, two gateways behind HAProxy, 200 adapters
in S3, the catalog in PostgreSQL, the cluster's tables in Redis. Every answer has one right text, which is learned
before the first fault. Where a fault takes answers, long streams have begun right before it.
docs/benchmarks/faults.md explains the table. The exit code is 1 where a client saw what it may not see.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from loray.errors import ClusterError
from loray.local.processes import log_tail
from loray.local.serving import serve_details
from loray.spec import Limits, ServeSpec
from tests.faults.faults import (
    FAULTS,
    FULL_DISK,
    LOAD_TIMEOUT_S,
    NUM_GATEWAYS,
    NUM_REPLICAS,
    Fault,
    missing,
    struck,
)
from tests.faults.load import Load, Resumes
from tests.faults.requests import COMPLETIONS, Kind, make_kinds
from tests.faults.verdicts import Window, continued, divide, failures, left_behind, table
from tests.faults.world import BASE, PARALLEL, World, started, until

_WHOLE_S = 180.0
_LONG = ((13, 600), (6, 300))  # of each application: kinds of long answers, and their tokens; two ranks are slower
_BEGIN_S = 20.0
_SPEC = ServeSpec(
    base=BASE,
    dtype="float32",
    num_threads=1,
    pool_bytes=6 << 20,
    host_bytes=1 << 20,  # of 200 adapters a part, so that loads go on
    max_num_seqs=8,
    load_timeout_s=LOAD_TIMEOUT_S,
    drain_grace_s=1.0,
    num_replicas=NUM_REPLICAS,
    num_gateways=NUM_GATEWAYS,
)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    faults = [f for f in (*FAULTS, FULL_DISK) if not args.only or any(part in f.name for part in args.only)]
    if args.list or not faults:
        click.echo("\n".join(fault.name for fault in (*FAULTS, FULL_DISK)), err=not args.list)
        return 0 if args.list else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all servers are ended
    with started(_SPEC, args.adapters, click.echo, seed=args.seed, has_parallel=True) as world:
        if not world.has_own_disk:
            click.echo("left out: a full disk (this user may not mount a file system)")
            faults = [fault for fault in faults if fault is not FULL_DISK]
        if not faults:
            return 2
        windows, left = _run(world, faults, args)
    share, failed = continued(windows), [*failures(windows), *left]
    click.echo("\n".join(table(windows)))
    said = "none lost its replica" if share is None else f"{share:.1%} of those that lost their replica went on"
    num_seen = sum(len(w.seen) for w in windows)
    verdict = "FAILED" if failed else "passed"
    click.echo(f"{num_seen} requests, {len(windows)} faults; begun answers: {said}; {verdict}")
    click.echo("\n".join(failed[:40]))
    if args.json is not None:
        found = {"date": time.strftime("%Y-%m-%d"), "rows": [w.row for w in windows], "continued": share}
        args.json.write_text(json.dumps(found | {"failures": failed}, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="of faults (default %(default)g)")
    add("--every", type=float, default=20.0, help="seconds from one fault to the next, at least (default %(default)g)")
    add("--rate", type=float, default=4.0, help="requests a second (default %(default)g)")
    add("--adapters", type=int, default=200, help="at least one (default %(default)d)")
    add("--only", action="append", help="faults whose name has this in it; may be repeated")
    add("--list", action="store_true", help="the names of all faults")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write the table there too")
    return parser


def _run(world: World, faults: Sequence[Fault], args: argparse.Namespace) -> tuple[list[Window], list[str]]:
    """The windows, and what was left behind."""
    catalog = world.catalog
    key = catalog.keys.create("faults", limits=Limits(tpm_limit=10_000_000)).secret
    observer_key = catalog.keys.create("observer", scopes=["admin"]).secret
    chance = random.Random(args.seed)
    models = [BASE, *world.names]
    kinds = make_kinds(models, len(models) + 40, chance)
    chance.shuffle(kinds)
    applications = (world.url, f"{world.url}/{PARALLEL}")
    urls = {kind: applications[of_two] for kind, of_two in divided(kinds).items()}
    long = [[_long(chance.choice(models), i, num_tokens) for i in range(num)] for num, num_tokens in _LONG]
    urls |= {kind: url for url, some in zip(applications, long, strict=True) for kind in some}
    load = Load(key, urls, kinds)
    click.echo(f"{len(urls)} answers are learned")
    asyncio.run(load.learn())
    resumes = Resumes(applications, observer_key)
    asyncio.run(resumes.ask())  # with the first look at its metrics a gateway makes its handle of all gateways
    before = world.in_cluster("held")
    windows = asyncio.run(_under_load(world, load, resumes, long, faults, args))
    divide(load.seen, windows)
    until(lambda: not missing(world), "all processes run", _WHOLE_S)
    asyncio.run(load.learn())  # all gateways and replicas have met again
    return windows, left_behind(before, world.in_cluster("held", "emptied"))


def divided(kinds: Sequence[Kind]) -> dict[Kind, bool]:
    """One in six is for the application with two ranks. None of those is fat, with 720 tokens in its answer: drawn
    often, two fat kinds ask for as many tokens as two ranks compute on two cores, and a queue that has formed there in
    a fault does not end before the next one.
    """
    of_two = set([kind for kind in kinds if not kind.is_fat][5::6])
    return {kind: kind in of_two for kind in kinds}


def _long(model: str, number: int, num_tokens: int) -> Kind:
    """Some seconds. Greedy and drawn in turn."""
    body = {"model": model, "prompt": f"Once upon a time {number}", "max_tokens": num_tokens, "ignore_eos": True}
    return Kind(COMPLETIONS, body | ({"temperature": 0} if number % 2 else {"temperature": 1, "seed": number}))


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
    clients = asyncio.create_task(load.run(args.rate, args.seed, lambda: is_over))
    try:
        await asyncio.sleep(5)
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            fault = order[len(windows) % len(order)]
            counts.append(await resumes.ask())
            kinds = [kind for some, num in zip(long, fault.streams, strict=True) for kind in some[:num]]
            num_begun = await load.begin(kinds, _BEGIN_S)
            now = time.monotonic()
            if windows:
                windows[-1].next_begun = now
            windows.append(window := Window(fault, now))
            await asyncio.to_thread(_strike, world, window)
            of_long = f"{num_begun} of {len(kinds)} long streams had begun; " if kinds else ""
            last = f" (last missing: {window.last_missing})" if window.last_missing else ""
            whole = f"whole after {window.whole - now:.1f} s{last}"
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

    def is_whole() -> bool:
        found = missing(world)
        window.last_missing = found or window.last_missing
        return not found

    try:
        with struck(window.fault, world) as repair:
            time.sleep(window.fault.hold_s)
            repair()
        until(is_whole, f"all processes run after: {window.fault.name}", _WHOLE_S, lambda: _state(world))
    except (AssertionError, ClusterError, subprocess.SubprocessError) as e:
        window.missing = f"{window.fault.name}: {e}"
    window.whole = time.monotonic()


def _state(world: World) -> str:
    details = serve_details(world.local)
    deployments = (d for a in details["applications"].values() for d in a["deployments"].values())
    told = [f"{d['name']}: {d['status']} {d['message']} {[r['state'] for r in d['replicas']]}" for d in deployments]
    return "\n".join([missing(world), *told, log_tail(str(world.folder / "node.log"))])


if __name__ == "__main__":
    sys.exit(main())
