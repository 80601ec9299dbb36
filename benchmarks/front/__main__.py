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
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.report import Report, machine_line, quantile
from benchmarks.world import describe_machine, load_average, run_modules
from loray.settings import Settings

_BODIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": list(range(100, 164)), "ignore_eos": True}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Say much."}], "ignore_eos": True}),
}
_TOKENS_PER_S, _US_PER_TOKEN, _P50_MS = 50_000.0, 20.0, 5.0  # targets
_COLUMNS = (
    "server",
    "request",
    "tokens/s\t,.0f",
    "µs/token\t.1f",
    "server cores\t.2f",
    "client cores\t.2f",
    "p50 ms\t.2f",
    "p99 ms\t.2f",
)


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
        is_fast = self.tokens_per_s >= _TOKENS_PER_S and self.us_per_token <= _US_PER_TOKEN
        return is_fast and self.p50_ms < _P50_MS


def main(argv: Sequence[str] | None = None) -> list[Front]:
    args = _parser().parse_args(argv)
    machine = describe_machine()
    click.echo(machine_line(machine, load=f"{load_average():.2f}"))
    click.echo(
        f"{args.connections} requests at once of {args.tokens} tokens, streamed; latency at {args.rate:g} requests/s"
    )
    found = []
    for kind in ("floor", "gateway", "channel"):
        with _serving(kind, args.base, args.interval) as (port, pid):
            for request in ("completions",) if kind == "floor" else (args.request or _BODIES):
                found.append(_measure(kind, request, args, port, pid))
    report = Report(machine, _COLUMNS, found, " ".join(sys.argv[1:] if argv is None else argv))
    click.echo(report.text())
    for front in found[1:]:
        click.echo(
            f"{front.server}, {front.request}: {front.us_per_token / found[0].us_per_token:.1f} × the floor's time a "
            f"token; ≥ {_TOKENS_PER_S:,.0f} tokens/s, ≤ {_US_PER_TOKEN:g} µs, p50 < {_P50_MS:g} ms: "
            f"{'met' if front.is_met else 'MISSED'}"
        )
    report.write(args.json)
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


@contextmanager
def _serving(kind: str, base: str, interval_s: float) -> Iterator[tuple[int, int]]:
    """A server of engines that compute nothing; its port and process."""
    with tempfile.TemporaryDirectory(prefix="front-") as folder:
        home = str(Settings.from_env().home)
        setup = {"kind": kind, "base": base, "home": home, "folder": folder, "interval_s": interval_s}
        command, pipe = [sys.executable, "-m", "benchmarks.front.server", json.dumps(setup)], subprocess.PIPE
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if not (port := process.stdout.readline()):
                    raise SystemExit("the server did not start; its error is above")
                yield int(port), process.pid
            finally:
                process.stdin.close()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def _measure(kind: str, request: str, args: argparse.Namespace, port: int, pid: int) -> Front:
    path, body = _BODIES[request]
    whole = dict(body) | {"model": args.base, "temperature": 0, "stream": True, "max_tokens": args.tokens}
    setup = {"port": port, "path": path, "seconds": args.seconds}
    counted = {"mode": "count", "body": whole, "pid": pid, "connections": args.connections}
    (many,) = run_modules([["benchmarks.client", json.dumps(setup | counted)]], 1)
    paced = {"mode": "paced", "body": whole | {"max_tokens": 1}, "rate": args.rate}
    (one,) = run_modules([["benchmarks.client", json.dumps(setup | paced)]], 1)
    num_tokens, seconds = many["events"] * args.tokens / many["events_per_response"], many["seconds"]
    return Front(
        kind,
        request,
        num_tokens / seconds,
        1e6 * many["server_cpu_s"] / num_tokens,
        many["server_cpu_s"] / seconds,
        many["client_cpu_s"] / seconds,
        1e3 * quantile(one["whole_s"], 0.50),
        1e3 * quantile(one["whole_s"], 0.99),
    )


if __name__ == "__main__":
    main()
