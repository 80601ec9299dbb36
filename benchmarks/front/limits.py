"""How soon bodies that are too large are refused, and how long other requests wait meanwhile, over HTTP.

    python -m benchmarks.front.limits                      `loray serve` and `loray up`, one after the other
    python -m benchmarks.front.limits --context 100000     a model with a long context, for which larger bodies are read

Each server has a random base of two small layers with SmolLM2's tokenizer, so that a request is hardly more than its
way through the server. One process sends a request for one token every 10 ms; another one sends the bodies, one every
0.6 s. A request waits as long as it took beyond the median of those that no body was sent beside.
docs/benchmarks/serving.md explains the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks import workers
from benchmarks.front.attack import Refusal
from benchmarks.front.bodies import BODIES
from benchmarks.machine import describe_machine, load_average
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from benchmarks.serving.adapters import open_library
from benchmarks.serving.cases import EngineOptions
from benchmarks.serving.figures.rows import quantile
from benchmarks.serving.models import RANDOM, bench_base, llama_json, random_tensors
from benchmarks.serving.systems.processes import Setting
from benchmarks.serving.systems.server import OpenAiSession, serve_alone, serve_cluster
from loray.bases.registry import BaseModel, add_base

_SERVERS = {"loray-serve": serve_alone, "loray-up": serve_cluster}
_INTERVAL_S = 0.6
_START_S = 5.0  # until both clients have made what they send
_AFTER_S = 0.1  # a body may delay what comes after its refusal
_REFUSED = (400, 413)
_TARGETS = {"refused_ms": 100.0, "delay_ms": 50.0}


class Probe(NamedTuple):
    began: float
    seconds: float


class Limit(NamedTuple):
    """Of one body on one server: milliseconds of each repetition. `before_ms`: the same as `delay_ms` just before."""

    server: str
    body: str
    num_bytes: int
    status: int
    refused_ms: list[float]
    delay_ms: list[float]
    before_ms: list[float]

    @property
    def is_met(self) -> bool:
        is_soon = max(self.refused_ms) <= _TARGETS["refused_ms"] and max(self.delay_ms) <= _TARGETS["delay_ms"]
        return is_soon and self.status in _REFUSED


def main(argv: Sequence[str] | None = None) -> list[Limit]:
    args = _parser().parse_args(argv)
    described = describe_machine()
    click.echo(machine_line(described, load=f"{load_average():.2f}"))
    click.echo(f"medians (worst) of {args.repeat}, in ms; one request for one token every {1e3 / args.rate:g} ms")
    names, rows = args.body or list(BODIES), list[Limit]()
    for server in args.server or _SERVERS:
        with _serving(server, args.folder.absolute() / "limits", args.context) as (session, base, limit):
            refusals, probes = _measure(session.port, base.name, limit, names, args)
        typical = quiet(refusals, probes)
        times = sorted(p.seconds for p in typical)
        shares = ", ".join(f"{1e3 * quantile(times, q):.1f}" for q in (0.5, 0.99, 1.0))
        click.echo(f"\n{server}: other requests take p50, p99, worst {shares} ms where no body is sent")
        click.echo(_line(("body", "MB", "status", "refused", "delay", "before", "")))
        for row in limits(server, refusals, probes, statistics.median(times)):
            rows.append(row)
            click.echo(_line(_cells(row)))
    bad = [f"{row.server}, {row.body}: {row.status}" for row in rows if row.status not in _REFUSED]
    if bad:
        raise SystemExit(f"not refused: {'; '.join(bad)}")
    write_json(args.json, {"machine": dict(described), "rows": [row._asdict() for row in rows]})
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--server", action="append", choices=_SERVERS, help="which (default both)")
    add("--body", action="append", choices=BODIES, help="which (default all)")
    add("--repeat", type=one_or_more, default=5, help="times that each body is sent (default %(default)s)")
    add("--rate", type=float, default=100.0, help="other requests/s (default %(default)s)")
    add("--context", type=int, default=8192, help="tokens of the model's context (default %(default)s)")
    add("--folder", type=Path, default=Path(".cache/bench"), help="keeps homes and logs (default %(default)s)")
    add("--json", type=Path, help="write the figures there too")
    return parser


@contextmanager
def _serving(server: str, folder: Path, context: int) -> Iterator[tuple[OpenAiSession, BaseModel, int]]:
    """The server, its base, and the largest body that it reads."""
    home = folder / "served"
    base = _base(home, context)
    with open_library("file", folder, base) as library:
        setting = Setting(base, library, folder, num_threads=1)
        with _SERVERS[server](setting, EngineOptions(kv_tokens=2 * context), ()) as session:
            yield session, base, max(1 << 20, 64 * context)


def _base(home: Path, context: int) -> BaseModel:
    """A random one with SmolLM2's tokenizer and vocabulary, in `home`."""
    import torch
    from safetensors.torch import save_file

    real = bench_base()
    config = replace(RANDOM["tiny-random"], vocab_size=real.config.vocab_size, max_position_embeddings=context)
    folder = home.parent / f"checkpoint-{context}"
    folder.mkdir(parents=True, exist_ok=True)
    eos, *_ = real.config.eos_token_ids
    (folder / "config.json").write_text(json.dumps(llama_json(config) | {"eos_token_id": eos}), encoding="utf-8")
    save_file(dict(random_tensors(config, torch.device("cpu"), torch.bfloat16)), folder / "model.safetensors")
    for file in real.path.glob("*tokenizer*"):
        shutil.copy(file, folder)
    return add_base(str(folder), home=home, name=f"random-{context}")


def _measure(
    port: int, model: str, limit: int, names: Sequence[str], args: argparse.Namespace
) -> tuple[list[Refusal], list[Probe]]:
    begin_at = time.perf_counter() + _START_S
    seconds = _INTERVAL_S * (args.repeat * len(names) + 2)
    attack: dict[str, Any] = {"port": port, "model": model, "limit": limit, "names": list(names)}
    attack |= {"repeat": args.repeat, "begin_at": begin_at + _INTERVAL_S, "interval_s": _INTERVAL_S}
    body = {"model": model, "prompt": [7, 8, 9], "max_tokens": 1, "temperature": 0, "stream": True}
    probe = {"port": port, "pid": os.getpid(), "path": "/v1/completions", "body": body, "rate": args.rate}
    probe |= {"seconds": seconds, "begin_at": begin_at}
    sent, found = workers.run(
        [["benchmarks.front.attack", json.dumps(attack)], ["benchmarks.front.client", json.dumps(probe)]]
    )
    probes = [Probe(began, s) for began, s in zip(found["began_s"], found["whole_s"], strict=True)]
    return [Refusal(*refusal) for refusal in sent["refusals"]], sorted(probes)


def quiet(refusals: Sequence[Refusal], probes: Sequence[Probe]) -> list[Probe]:
    """The probes beside which no body was sent."""
    return [p for p in probes if not any(r.began - p.seconds <= p.began <= r.ended + _AFTER_S for r in refusals)]


def limits(server: str, refusals: Sequence[Refusal], probes: Sequence[Probe], typical_s: float) -> list[Limit]:
    """One row for each body, from what was sent and when."""

    def delay_ms(began: float, ended: float) -> float:
        """Of the slowest probe that was under way in that time."""
        beside = [p.seconds for p in probes if p.began <= ended and p.began + p.seconds >= began]
        return 1e3 * (max(beside, default=typical_s) - typical_s)

    rows = []
    for name in dict.fromkeys(r.name for r in refusals):
        own = [r for r in refusals if r.name == name]
        windows = [(r.began, r.ended + _AFTER_S) for r in own]
        rows.append(
            Limit(
                server,
                name,
                own[0].num_bytes,
                next((r.status for r in own if r.status not in _REFUSED), own[0].status),
                [1e3 * (r.ended - r.began) for r in own],
                [delay_ms(*window) for window in windows],
                [delay_ms(began - (ended - began), began) for began, ended in windows],
            )
        )
    return rows


def _cells(row: Limit) -> tuple[str, ...]:
    times = (f"{statistics.median(ms):.1f} ({max(ms):.1f})" for ms in (row.refused_ms, row.delay_ms, row.before_ms))
    return (row.body, f"{row.num_bytes / 1e6:.2f}", str(row.status), *times, "met" if row.is_met else "MISSED")


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:<28}{cells[1]:>7}{cells[2]:>8}" + "".join(f"{cell:>17}" for cell in cells[3:6]) + f"  {cells[6]}"


if __name__ == "__main__":
    main()
