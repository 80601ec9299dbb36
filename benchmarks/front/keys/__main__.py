"""What API keys cost, in the middleware and over HTTP.

    python -m benchmarks.front.keys                  µs of a check; latency of right requests beside 1,000 wrong ones/s
    python -m benchmarks.front.keys --wrong 3000     beside as many

The server is a gateway process with engines that compute nothing. One client process sends right requests for one
token, another one requests with wrong keys, each with a key of its own, and all three share the machine's cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks import workers
from benchmarks.front.keys.check import line, measure
from benchmarks.front.started import serving
from benchmarks.machine import describe_machine, load_average
from benchmarks.output import machine_line, write_json
from benchmarks.serving.figures.rows import quantile
from loray.catalog import Catalog
from loray.settings import Settings

_START_S = 3.0  # until both clients run
_NUM_KEYS = 100
_UNAUTHORIZED = 401


class Latency(NamedTuple):
    """Of whole right requests, beside `refused_per_s` wrong ones."""

    refused_per_s: float
    p50_ms: float
    p99_ms: float
    worst_ms: float


def main(argv: Sequence[str] | None = None) -> list[Latency]:
    args = _parser().parse_args(argv)
    described = describe_machine()
    click.echo(machine_line(described, load=f"{load_average():.2f}"))
    cost = measure(args.checks)
    click.echo(line(cost))
    secret = ""

    def make_keys(url: str) -> None:
        nonlocal secret
        with closing(Catalog(url)) as catalog:
            secret, *_ = (catalog.create_key(f"key {number}").secret for number in range(_NUM_KEYS))

    with serving("gateway", args.base, Settings.from_env().home, 0.0, make_keys) as (port, pid):
        body = {"model": args.base, "prompt": [7, 8, 9], "max_tokens": 1, "temperature": 0, "stream": True}
        setup: dict[str, Any] = {"port": port, "pid": pid, "path": "/v1/completions", "body": body}
        right = {"key": secret, "rate": args.rate, "seconds": args.seconds}
        found = [_latency(setup, right, wrong, args.seconds) for wrong in (0.0, args.wrong)]
    for row in found:
        click.echo(
            f"{args.rate:g} right requests/s beside {row.refused_per_s:,.0f} wrong keys/s: p50 {row.p50_ms:.2f} ms, "
            f"p99 {row.p99_ms:.2f} ms, worst {row.worst_ms:.2f} ms"
        )
    rows = [row._asdict() for row in found]
    write_json(args.json, {"machine": dict(described), "keys": cost._asdict(), "rows": rows})
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="smollm2", help="whose tokenizer the gateway has (default %(default)s)")
    add("--rate", type=float, default=100.0, help="right requests/s (default %(default)s)")
    add("--wrong", type=float, default=1000.0, help="wrong keys/s (default %(default)s)")
    add("--seconds", type=float, default=10.0, help="of each measurement (default %(default)s)")
    add("--checks", type=int, default=20_000, help="of the middleware alone (default %(default)s)")
    add("--json", type=Path, help="write the figures there too")
    return parser


def _latency(setup: Mapping[str, Any], right: Mapping[str, Any], wrong: float, seconds: float) -> Latency:
    begin_at = {"begin_at": time.perf_counter() + _START_S}
    commands = [["benchmarks.front.client", json.dumps({**setup, **right, **begin_at})]]
    if wrong:
        flood = {**setup, "rate": wrong, "seconds": seconds, **begin_at}
        commands.append(["benchmarks.front.keys.strangers", json.dumps(flood)])
    found, *flooded = workers.run(commands)
    refused_per_s = 0.0
    for answers in flooded:
        statuses = {int(status): number for status, number in answers["statuses"].items()}
        if statuses.keys() != {_UNAUTHORIZED}:
            raise SystemExit(f"wrong keys were answered with {statuses}")
        refused_per_s = statuses[_UNAUTHORIZED] / answers["seconds"]
    times = sorted(found["whole_s"])
    return Latency(refused_per_s, *(1e3 * quantile(times, share) for share in (0.50, 0.99, 1.0)))


if __name__ == "__main__":
    main()
