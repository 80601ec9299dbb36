"""What streams of people notice of a batch beside them: time to the first token and between tokens, with and without.

    python -m benchmarks.serving.batches [--lines 5000] [--adapters 50] [--streams 20] [--seconds 60] [--rounds 2]

SmolLM2-135M with LoRA adapters of rank 16 on q, k, v, o, behind `loray serve` in a process of its own. Streams ask one
adapter after another, each as soon as its last answer has ended, without and with a batch in progress, in turn. The
batch's lines are completions over all adapters. At the end it is answered alone, and each custom_id must be in its
output once.

The claims: with the batch the p95 of first tokens grows by ≤ 10 %, the p95 between tokens by ≤ 5 %.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import httpx

from benchmarks.client import Answer, Endpoint, Request
from benchmarks.options import one_or_more
from benchmarks.report import Cell, Report, Verdict, machine_line, quantile
from benchmarks.serving.adapters import AdapterSet, open_library
from benchmarks.serving.models import bench_base
from benchmarks.world import describe_machine, is_healthy, running, until
from loray.local.processes import free_ports
from loray.settings import Settings
from loray.spec import ServeSpec

_RANK, _FIRST_TOKEN = 16, 100
_PROMPT, _ANSWER = 64, 32  # tokens of a stream's request
_LINE_PROMPT, _LINE_ANSWER = 32, 16
_TTFT_GROWTH, _ITL_GROWTH = 1.10, 1.05
_COLUMNS = (
    "batch",
    "streams' requests",
    "first token p50, ms\t.0f",
    "p95, ms\t.0f",
    "between tokens p50, ms\t.1f",
    "p95, ms\t.1f",
    "lines answered",
)


class Figures(NamedTuple):
    """Of the streams, in seconds."""

    ttft: list[float]
    between: list[float]
    num_lines: int


class Bench:
    """A server of this machine, its streams and its batches."""

    def __init__(self, port: int, models: Sequence[str], vocab: int, num_streams: int) -> None:
        self._endpoint = Endpoint(port)
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}/v1", headers={"Authorization": "Bearer none"}, timeout=60
        )
        self._models, self._num_streams = models, num_streams
        self._words, self._rng = range(_FIRST_TOKEN, vocab), random.Random(0)

    def close(self) -> None:
        self._http.close()

    def stream(self, seconds: float, batch_id: str | None) -> Figures:
        """Ask for so long, beside a batch."""
        before = 0 if batch_id is None else self.batch(batch_id)["request_counts"]["completed"]
        answers: list[Answer] = []
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            requests = [self._request(i) for i in range(4 * self._num_streams)]
            _, found = self._endpoint.run(requests, self._num_streams)
            answers += found
        if wrong := [answer.error for answer in answers if answer.error]:
            raise SystemExit(f"{len(wrong)} requests failed: {wrong[0]}")
        after = 0 if batch_id is None else self.batch(batch_id)["request_counts"]["completed"]
        between = [later - earlier for answer in answers for earlier, later in pairwise(answer.times)]
        return Figures([answer.ttft for answer in answers], between, after - before)

    def _request(self, number: int) -> Request:
        prompt = self._rng.choices(self._words, k=_PROMPT)
        return Request(0.0, self._models[number % len(self._models)], prompt, _ANSWER)

    def begin_batch(self, num_lines: int) -> str:
        """Upload lines and begin a batch of them, which is in progress on return."""
        lines = []
        for i in range(num_lines):
            body = {
                "model": self._models[i % len(self._models)],
                "prompt": self._rng.choices(self._words, k=_LINE_PROMPT),
                "max_tokens": _LINE_ANSWER,
                "temperature": 0,
                "ignore_eos": True,
            }
            lines.append(json.dumps({"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": body}))
        form: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("lines.jsonl", "\n".join(lines))}}
        file = self._http.post("/files", **form).raise_for_status().json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch_id = str(self._http.post("/batches", json=asked).raise_for_status().json()["id"])
        until(lambda: self.batch(batch_id)["status"] == "in_progress", "the batch is in progress")
        return batch_id

    def batch(self, batch_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get(f"/batches/{batch_id}").raise_for_status().json()
        return found

    def cancel(self, batch_id: str) -> None:
        """SystemExit where it has ended, so that the streams were alone for a while."""
        answer = self._http.post(f"/batches/{batch_id}/cancel")
        if answer.status_code == 409:
            raise SystemExit("the batch ended before the measurement did: ask for more --lines or fewer --seconds")
        answer.raise_for_status()
        until(lambda: self.batch(batch_id)["status"] == "cancelled", "the batch is cancelled")

    def finish(self, batch_id: str, num_lines: int, timeout_s: float) -> float:
        """Wait for the end; the seconds that it took. SystemExit where a custom_id is not in the output once."""
        seconds = until(lambda: self.batch(batch_id)["status"] == "completed", "the batch is completed", timeout_s)
        output = self._http.get(f"/files/{self.batch(batch_id)['output_file_id']}/content").raise_for_status()
        found = sorted(int(json.loads(line)["custom_id"]) for line in output.text.splitlines())
        if found != list(range(num_lines)):
            raise SystemExit(f"of {num_lines} lines, the output has {len(found)}, {len(set(found))} of them different")
        return seconds


def main(argv: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a base on this machine (default %(default)s)")
    parser.add_argument("--lines", type=one_or_more, default=5000, help="of a batch (default %(default)s)")
    parser.add_argument("--adapters", type=one_or_more, default=50)
    parser.add_argument("--streams", type=one_or_more, default=20, help="at once (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement (default %(default)s)")
    parser.add_argument("--rounds", type=one_or_more, default=2, help="measurements of each kind, in turn")
    parser.add_argument("--timeout", type=float, default=6 * 3600.0, help="for the batch to end, in seconds")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    machine = describe_machine()
    click.echo(machine_line(machine))
    base, (port,) = bench_base(args.model), free_ports(1)
    with tempfile.TemporaryDirectory(prefix="batches-") as name:
        folder = Path(name)
        adapters = AdapterSet(args.adapters, ranks=(_RANK,))
        with open_library("file", folder, base) as library:
            models = [ref.name for ref in library.publish(adapters)]
            home = folder / "home"
            home.mkdir()
            (home / "bases").symlink_to(base.path.parent)
            settings = Settings(home, library.url, library.catalog_url, address=None, log_level="WARNING")
            spec = ServeSpec(base=base.name, port=port, max_num_seqs=32)
            (home / "spec.json").write_text(spec.model_dump_json(exclude_none=True), encoding="utf-8")
            command = [sys.executable, "-m", "loray.cli.main", "serve", "--spec", str(home / "spec.json")]
            with running(command, folder / "serve.log", {**os.environ, **settings.to_env()}):
                until(lambda: is_healthy(port), f"the server answers: {folder / 'serve.log'}")
                with closing(Bench(port, models, base.config.vocab_size, args.streams)) as bench:
                    report = _measure(bench, args, machine)
    report.write(args.json)
    return report


def _measure(bench: Bench, args: argparse.Namespace, machine: dict[str, str]) -> Report:
    bench.stream(1.0, None)  # loads adapters
    found: dict[bool, Figures] = {is_with: Figures([], [], 0) for is_with in (False, True)}
    for _ in range(args.rounds):
        for is_with in (False, True):
            batch_id = bench.begin_batch(args.lines) if is_with else None
            figures = bench.stream(args.seconds, batch_id)
            before = found[is_with]
            found[is_with] = Figures(
                before.ttft + figures.ttft, before.between + figures.between, before.num_lines + figures.num_lines
            )
            if batch_id is not None:
                bench.cancel(batch_id)
    rows: list[list[Cell]] = []
    p95: dict[bool, tuple[float, float]] = {}
    for is_with, figures in found.items():
        ttft, between = ([1e3 * quantile(values, q) for q in (0.5, 0.95)] for values in figures[:2])
        p95[is_with] = ttft[1], between[1]
        name = "in progress" if is_with else "none"
        rows.append([name, len(figures.ttft), *ttft, *between, figures.num_lines])
    seconds = bench.finish(bench.begin_batch(args.lines), args.lines, args.timeout)
    verdicts = [
        Verdict("first tokens p95, with ÷ without", "≤", _TTFT_GROWTH, p95[True][0] / p95[False][0]),
        Verdict("between tokens p95, with ÷ without", "≤", _ITL_GROWTH, p95[True][1] / p95[False][1]),
    ]
    more = {"alone_lines_per_s": args.lines / seconds, "targets": [verdict.to_json() for verdict in verdicts]}
    report = Report(machine, _COLUMNS, rows, " ".join(sys.argv[1:]), more)
    lines = [report.text(), f"alone: {args.lines / seconds:.1f} lines a second, each once"]
    click.echo("\n".join([*lines, *(verdict.line() for verdict in verdicts)]))
    return report


if __name__ == "__main__":
    main()
