"""Trials of a real cluster, three replicas of a tiny model on this machine, over HTTP.

    python -m benchmarks.cluster.trials store     the store is killed for a minute, beside warm and cold requests
    python -m benchmarks.cluster.trials flood     one tenant floods beside another's steady requests

docs/benchmarks/cluster.md explains them. The exit code is 1 where something was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import click

from benchmarks.client import HUNG_S, Answer, Endpoint, Request, holding, real_time
from benchmarks.cluster.measured import adapter_config
from benchmarks.cluster.trace import Asked, Load, as_requests, make_trace
from benchmarks.options import one_or_more
from benchmarks.report import Cell, Report, Verdict, machine_line, quantile
from benchmarks.world import World, busy_seconds, describe_machine, load_average, started_cluster, started_s3
from loray.catalog import Catalog
from loray.local.processes import free_ports, is_free, kill, session_members
from loray.local.s3 import LocalS3, start_local_s3
from loray.spec import FleetSpec, Limits, ServeSpec
from loray.store.s3 import create_bucket
from serve_apps.python_gc import freeze_garbage

LOAD_TIMEOUT_S = 10.0
MAX_STORE_RATIO = 1.3  # of the warm requests' p99 while the store is away to that before
REFUSED_S = LOAD_TIMEOUT_S + 2.0  # for a cold request while it is away
BACK_S = 60.0  # for all cold adapters after its return: a client waits as Retry-After says
MAX_FLOOD_RATIO = 1.5  # of the other tenant's p99 with a flood to that without
STEADY, USUAL, LOUD, LIMITED = "steady", "usual", "loud", "limited"  # tenants
FLOODS = {"none": None, "without limits": LOUD, "within limits": LIMITED}  # parts, and who floods in them
LIMITS = Limits(max_parallel_requests=2, rpm_limit=60, tpm_limit=30_000)  # of the last one
_POOL_BYTES, _HOST_BYTES = 48 << 20, 16 << 20  # 200 adapters have 5.4 MB: a replica has room for all
_SETTLE_S, _COLD_RATE = 10.0, 1.5
_FLOOD_ADAPTERS, _USUAL_RATE = 20, 2.0
_FLOOD_PROMPT, _FLOOD_OUTPUT, _FLOOD_REQUESTS = 200, 64, 256
_WARMING_RATE = 20.0
_LOOK_S = 0.01  # between two looks how late the clients are
_PAUSE_S = 3.0  # in which a flood begins, or what is left of it ends
Say = Callable[[str], None]


class Tail(NamedTuple):
    """Times to the first token of the requests that were answered, and how many were not."""

    num: int
    num_failed: int
    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Tail:
        ttft = [a.ttft for a in answers if not a.error]
        return cls(len(answers), len(answers) - len(ttft), quantile(ttft, 0.5), quantile(ttft, 0.99))

    @property
    def cells(self) -> list[Cell]:
        return [self.num, self.num_failed, 1e3 * self.p50_s, 1e3 * self.p99_s]


_TAIL = ("requests", "failed", "p50 TTFT, ms\t.1f", "p99 TTFT, ms\t.1f")


@dataclass(frozen=True, slots=True)
class Store:
    """`refused`: requests for cold adapters while the store was away. `back_s`: from its return until each of these
    adapters has been answered for; infinite: some never were.
    """

    before: Tail
    during: Tail
    refused: Sequence[Answer]
    back_s: float

    columns = ("store", *_TAIL)

    @property
    def rows(self) -> list[list[Cell]]:
        return [["there", *self.before.cells], ["away", *self.during.cells]]

    def verdicts(self) -> list[Verdict]:
        slowest = max((a.seconds for a in self.refused), default=math.nan)
        num_good = sum(a.status == 503 and a.retry_after_s > 0 for a in self.refused)
        share = num_good / len(self.refused) if self.refused else math.nan
        num_failed = self.before.num_failed + self.during.num_failed
        ratio = self.during.p99_s / self.before.p99_s
        return [
            Verdict("warm p99 TTFT while the store is away by that before", "≤", MAX_STORE_RATIO, ratio),
            Verdict("warm requests that failed", "≤", 0, num_failed),
            Verdict("share of cold requests refused with 503 and Retry-After", "≥", 1, share),
            Verdict("the slowest refusal, s", "≤", REFUSED_S, slowest),
            Verdict("all cold adapters answered after the store's return, s", "≤", BACK_S, self.back_s),
        ]


@dataclass(frozen=True, slots=True)
class Round:
    """One part once. `cores`: processors of the machine that were busy; `late_s`: how late the clients' event loop was
    at most, which is in the times that they measure. `flood`: what `hold` tells.
    """

    answers: Sequence[Answer]
    cores: float
    late_s: float
    flood: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Flood:
    """The rounds of each part: without a flood, with one, and with one within limits. The tail of a part is that of all
    its answers together.
    """

    parts: dict[str, Sequence[Round]]

    columns = (
        "flood", *_TAIL, "ratio\t.2f", "flooder answered", "refused", "busy cores\t.2f", "of it flooder\t.2f",
        "client late, ms\t.1f",
    )  # fmt: skip

    def tail(self, part: str) -> Tail:
        return Tail.of([answer for one in self.parts[part] for answer in one.answers])

    def ratio(self, part: str) -> float:
        return self.tail(part).p99_s / self.tail(next(iter(self.parts))).p99_s

    @property
    def rows(self) -> list[list[Cell]]:
        found = []
        for part, rounds in self.parts.items():
            statuses = sum((Counter(one.flood.get("statuses", {})) for one in rounds), Counter[str]())
            seconds = sum(one.flood.get("seconds", 0.0) for one in rounds)
            cores = sum(one.flood.get("cpu_s", 0.0) for one in rounds) / seconds if seconds else 0.0
            ends = [fmean(one.cores for one in rounds), cores, 1e3 * max(one.late_s for one in rounds)]
            flood = [self.ratio(part), statuses["200"], statuses["429"], *ends]
            found.append([part, *self.tail(part).cells, *flood])
        return found

    def verdicts(self) -> list[Verdict]:
        _, *floods = self.parts
        ratios = [Verdict(f"{p}: the other's p99 TTFT", "≤", MAX_FLOOD_RATIO, self.ratio(p)) for p in floods]
        failed = [
            Verdict(f"{p}: the other's requests that failed", "≤", 0, self.tail(p).num_failed) for p in self.parts
        ]
        return ratios + failed


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all servers are ended
    machine, load, began = describe_machine(), load_average(), time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - began:5.0f} s  {text}")

    click.echo(machine_line(machine, load=f"{load:.1f}"))
    num_adapters = args.adapters if args.trial == "store" else _FLOOD_ADAPTERS
    with tempfile.TemporaryDirectory(prefix="loray-s3-") as folder, started_s3(Path(folder)) as s3:
        location = s3.location("adapters")
        create_bucket(location)
        environment = {"LORAY_STORE": location.url}
        with started_cluster(num_adapters, args.replicas + 1, adapter_config(), environment=environment) as world:
            freeze_garbage()  # a collection would hold up the clients
            found = run_store(world, s3, args, say) if args.trial == "store" else run_flood(world, args, say)
    verdicts = found.verdicts()
    more = {"load": load, "verdicts": [v.to_json() for v in verdicts]}
    report = Report(machine, found.columns, found.rows, shlex.join(sys.argv[1:]), more)
    click.echo(report.text())
    click.echo("\n".join(verdict.line() for verdict in verdicts))
    report.write(args.json)
    return 0 if all(verdict.is_met for verdict in verdicts) else 1


@contextmanager
def _deployed(world: World, num_replicas: int) -> Iterator[int]:
    spec = ServeSpec(
        base=world.base.name,
        dtype="float32",
        num_threads=1,
        num_replicas=num_replicas,
        pool_bytes=_POOL_BYTES,
        host_bytes=_HOST_BYTES,
        enable_prefix_caching=False,  # all prompts differ
        load_timeout_s=LOAD_TIMEOUT_S,
        port=free_ports(1)[0],
    )
    with world.deployed(FleetSpec.of(spec)) as port:
        yield port


async def _open_loop(endpoint: Endpoint, requests: Sequence[Request]) -> Sequence[Answer]:
    return (await endpoint.send(requests))[1]


async def _warm(endpoint: Endpoint, names: Sequence[str]) -> None:
    """Asks each for one token. SystemExit where one does not answer."""
    asked = [Asked(i / _WARMING_RATE, i, 8, 1) for i in range(len(names))]
    answers = await _open_loop(endpoint, as_requests(asked, names, "each"))
    if failed := [answer.error for answer in answers if answer.error]:
        raise SystemExit(f"{len(failed)} adapters could not be loaded: {failed[0]}")


def run_store(world: World, s3: LocalS3, args: argparse.Namespace, say: Say) -> Store:
    """The store is away: requests for adapters that replicas hold do not notice, others are refused at once, and are
    answered when it is back.
    """
    with _deployed(world, args.replicas) as port:
        return asyncio.run(_run_store(world, s3, Endpoint(port, timeout_s=HUNG_S), args, say))


async def _run_store(world: World, s3: LocalS3, endpoint: Endpoint, args: argparse.Namespace, say: Say) -> Store:
    num_warm = max(1, args.adapters // 2)
    warm, cold = world.names[:num_warm], world.names[num_warm:]

    def load(part: str, seconds: float) -> list[Request]:
        return as_requests(make_trace(Load(num_warm, args.rate, seconds, seed=args.seed)).counted, warm, part)

    await _warm(endpoint, warm)
    await _open_loop(endpoint, load("settling", _SETTLE_S))
    say(f"{num_warm} adapters are warm; {args.seconds:.0f} s with the store")
    before = await _open_loop(endpoint, load("before", args.seconds))
    say(f"the store is killed, for {args.seconds:.0f} s")
    await asyncio.to_thread(_kill, s3)
    asked = [Asked(i / _COLD_RATE, i, 8, 4) for i in range(min(len(cold), int(_COLD_RATE * args.seconds)))]
    requests = load("before", args.seconds), as_requests(asked, cold, "cold")
    during, refused = await asyncio.gather(*(_open_loop(endpoint, some) for some in requests))
    await asyncio.to_thread(_start, s3)
    say("the store is back")
    back_s = await _answered(endpoint, cold[: len(asked)])
    return Store(Tail.of(before), Tail.of(during), refused, back_s)


def _kill(s3: LocalS3) -> None:
    while members := session_members(s3.pid):
        for pid in members:
            kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _start(s3: LocalS3) -> None:
    while not all(is_free(port) for port in s3.ports.values()):
        time.sleep(0.05)  # another process has one for a moment, maybe for a connection
    start_local_s3(Path(s3.folder))


async def _answered(endpoint: Endpoint, models: Sequence[str]) -> float:
    """Seconds until a request for each has been answered. Clients wait as long as they are told."""
    began = time.perf_counter()

    async def one(model: str) -> float:
        while True:
            answer = await endpoint.ask(Request(0.0, model, [1, 2, 3], 1), began)
            if not answer.error:
                return answer.last
            if answer.last > BACK_S:
                return math.inf
            await asyncio.sleep(max(1.0, answer.retry_after_s if math.isfinite(answer.retry_after_s) else 1.0))

    return max(await asyncio.gather(*map(one, models)), default=0.0)


def run_flood(world: World, args: argparse.Namespace, say: Say) -> Flood:
    """One tenant floods beside another's steady requests, first as it likes and then within limits. Each round has all
    parts, one after another, so that a slow minute of the machine is in all of them.
    """
    catalog, keys = Catalog(world.settings.catalog), {}
    for tenant in (STEADY, USUAL, LOUD, LIMITED):
        catalog.tenants.create(tenant, LIMITS if tenant == LIMITED else None)
        keys[tenant] = catalog.keys.create(tenant, tenant=tenant).secret
    for name in world.names:
        catalog.adapters.share(name, "public")
    chance, models = random.Random(0), itertools.cycle(world.names)
    requests = [
        Request(0.0, model, [chance.randrange(256) for _ in range(_FLOOD_PROMPT)], _FLOOD_OUTPUT)
        for model in itertools.islice(models, _FLOOD_REQUESTS)
    ]
    parts: dict[str, list[Round]] = {part: [] for part in FLOODS}
    with _deployed(world, args.replicas) as port:
        asyncio.run(_warm(Endpoint(port, keys[STEADY], timeout_s=HUNG_S), world.names))
        asyncio.run(_ordinary(world, port, keys, args, max(1, args.requests // 6)))  # settles
        for number in range(args.rounds):
            for part, flooder in FLOODS.items():
                say(f"flood: {part}, round {number + 1} of {args.rounds}")
                flood: dict[str, Any] = {}
                with ExitStack() as stack:
                    stack.enter_context(real_time())
                    if flooder is not None:
                        flood = stack.enter_context(holding(port, keys[flooder], requests, args.at_once))
                    time.sleep(_PAUSE_S)
                    busy, began = busy_seconds(), time.perf_counter()
                    answers, late_s = asyncio.run(_ordinary(world, port, keys, args, args.requests))
                    cores = (busy_seconds() - busy) / (time.perf_counter() - began)
                parts[part].append(Round(answers, cores, late_s, flood))
                time.sleep(_PAUSE_S)
    return Flood(dict(parts))


async def _ordinary(
    world: World, port: int, keys: dict[str, str], args: argparse.Namespace, num: int
) -> tuple[Sequence[Answer], float]:
    """The requests of `steady`, with those of `usual` beside them. Equal in all parts. And how late the loop was."""

    def first(rate: float, seed: int) -> Sequence[Asked]:
        return make_trace(Load(len(world.names), rate, (2 * num + 30) / rate, seed=seed)).counted[:num]

    steady = first(args.rate, args.seed)
    usual = [asked for asked in first(_USUAL_RATE, args.seed + 1) if asked.at < steady[-1].at]
    sets = [(tenant, as_requests(asked, world.names, tenant)) for tenant, asked in ((STEADY, steady), (USUAL, usual))]
    looking = asyncio.create_task(_lateness())
    answers, _ = await asyncio.gather(
        *(_open_loop(Endpoint(port, keys[tenant], timeout_s=HUNG_S), requests) for tenant, requests in sets)
    )
    looking.cancel()
    return answers, await looking


async def _lateness() -> float:
    """How late the event loop is at most, in seconds, until this is cancelled."""
    loop, longest_s = asyncio.get_running_loop(), 0.0
    while True:
        due = loop.time() + _LOOK_S
        try:
            await asyncio.sleep(_LOOK_S)
        except asyncio.CancelledError:
            return longest_s
        longest_s = max(longest_s, loop.time() - due)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trials = parser.add_subparsers(dest="trial", required=True)
    one = trials.add_parser("store", help="the store is away", description=run_store.__doc__)
    one.add_argument("--adapters", type=one_or_more, default=200, help="half of them warm (default %(default)d)")
    one.add_argument("--seconds", type=float, default=60.0, help="with and without it (default %(default)g)")
    other = trials.add_parser("flood", help="one tenant floods", description=run_flood.__doc__)
    for option, default, of in (
        ("--rounds", 3, "of all three parts"),
        ("--requests", 210, "of the other tenant in each"),
        ("--at-once", 200, "the flood's: twice what three replicas run"),
    ):
        other.add_argument(option, type=one_or_more, default=default, help=f"{of} (default %(default)d)")
    for trial, rate in ((one, 8.0), (other, 5.0)):
        trial.add_argument("--rate", type=float, default=rate, help="warm requests a second (default %(default)g)")
        trial.add_argument("--replicas", type=one_or_more, default=3, help="(default %(default)d)")
        trial.add_argument("--seed", type=int, default=0)
        trial.add_argument("--json", type=Path, help="write all figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
