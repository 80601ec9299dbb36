"""The benchmark of the gateway alone.

    python -m benchmarks.front                       tokens/s of a gateway process, µs of core a token, added latency
    python -m benchmarks.front --interval 0.01       each request gets a token every 10 ms, at most

Engines that compute nothing yield one token of every request a step, in the gateway's process or over the channel from
another one; the gateway, with uvicorn as in `loray serve`, checks requests, makes text and events of the tokens and
sends them; a client in another process counts them. docs/benchmarks/serving.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks import workers
from benchmarks.front.keys.check import line as key_line
from benchmarks.front.keys.check import measure as measure_keys
from benchmarks.front.started import serving
from benchmarks.machine import describe_machine, load_average
from benchmarks.output import machine_line, write_json
from benchmarks.serving.figures.rows import quantile
from loray.settings import Settings

_PROMPT = list(range(100, 164))
_BODIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": _PROMPT, "ignore_eos": True}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Say much."}], "ignore_eos": True}),
}
_TARGETS = {"tokens_per_s": 50_000.0, "us_per_token": 20.0, "p50_ms": 5.0}


class Front(NamedTuple):
    """Of one server and one kind of request. `p50_ms` and `p99_ms`: of whole requests of one token."""

    server: str
    request: str
    tokens_per_s: float
    us_per_token: float
    server_cores: float
    client_cores: float
    p50_ms: float
    p99_ms: float

    @property
    def is_met(self) -> bool:
        return (
            self.tokens_per_s >= _TARGETS["tokens_per_s"]
            and self.us_per_token <= _TARGETS["us_per_token"]
            and self.p50_ms < _TARGETS["p50_ms"]
        )


def main(argv: Sequence[str] | None = None) -> list[Front]:
    args = _parser().parse_args(argv)
    home = Settings.from_env().home
    described = describe_machine()
    click.echo(machine_line(described, load=f"{load_average():.2f}"))
    click.echo(
        f"{args.connections} requests at once of {args.tokens} tokens, streamed; latency at {args.rate:g} requests/s"
    )
    click.echo(_line(_HEADER))
    found = []
    for kind in ("floor", "gateway", "channel"):
        with serving(kind, args.base, home, args.interval) as (port, pid):
            for request in ("completions",) if kind == "floor" else (args.request or _BODIES):
                found.append(_measure(kind, request, args, port, pid))
                click.echo(_line(_cells(found[-1])))
    floor = found[0]
    for front in found[1:]:
        click.echo(
            f"{front.server}, {front.request}: "
            f"{front.us_per_token / floor.us_per_token:.1f} × the floor's time a token; "
            f"≥ {_TARGETS['tokens_per_s']:,.0f} tokens/s, ≤ {_TARGETS['us_per_token']:g} µs, p50 < "
            f"{_TARGETS['p50_ms']:g} ms: {'met' if front.is_met else 'MISSED'}"
        )
    cost = measure_keys()
    click.echo(key_line(cost))
    rows = [front._asdict() for front in found]
    write_json(args.json, {"machine": dict(described), "rows": rows, "keys": cost._asdict()})
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="smollm2", help="whose tokenizer makes the texts (default %(default)s)")
    add("--request", action="append", choices=_BODIES, help="of which kinds (default completions and chat)")
    add("--connections", type=int, default=64, help="requests at once (default %(default)s)")
    add("--tokens", type=int, default=500, help="of each request (default %(default)s)")
    add("--interval", type=float, default=0.0, help="seconds of a step, at least (default 0: as fast as it goes)")
    add("--seconds", type=float, default=5.0, help="of each measurement (default %(default)s)")
    add("--rate", type=float, default=50.0, help="requests/s whose latency is measured (default %(default)s)")
    add("--json", type=Path, help="write the figures there too")
    return parser


def _measure(kind: str, request: str, args: argparse.Namespace, port: int, pid: int) -> Front:
    path, body = _BODIES[request]
    whole = dict(body) | {"model": args.base, "temperature": 0, "stream": True, "max_tokens": args.tokens}
    setup = {"port": port, "pid": pid, "path": path, "seconds": args.seconds}
    many = _client(setup | {"body": whole, "connections": args.connections})
    one = _client(setup | {"body": whole | {"max_tokens": 1}, "rate": args.rate})
    num_tokens = many["events"] * args.tokens / many["events_per_response"]
    latencies = sorted(one["whole_s"])
    return Front(
        kind,
        request,
        num_tokens / many["seconds"],
        1e6 * many["server_cpu_s"] / num_tokens,
        many["server_cpu_s"] / many["seconds"],
        many["client_cpu_s"] / many["seconds"],
        1e3 * quantile(latencies, 0.50),
        1e3 * quantile(latencies, 0.99),
    )


def _client(setup: Mapping[str, Any]) -> dict[str, Any]:
    (found,) = workers.run([["benchmarks.front.client", json.dumps(setup)]], 1)
    return found


_HEADER = ("server", "request", "tokens/s", "µs/token", "cores", "client", "p50 ms", "p99 ms")


def _cells(front: Front) -> tuple[str, ...]:
    numbers = (f"{front.tokens_per_s:,.0f}", f"{front.us_per_token:.1f}", f"{front.server_cores:.2f}")
    times = (f"{front.client_cores:.2f}", f"{front.p50_ms:.2f}", f"{front.p99_ms:.2f}")
    return (front.server, front.request, *numbers, *times)


def _line(cells: Sequence[str]) -> str:
    return "  ".join((f"{cells[0]:<8}", f"{cells[1]:<12}", *(f"{cell:>9}" for cell in cells[2:])))


if __name__ == "__main__":
    main()
