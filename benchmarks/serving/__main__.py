"""The benchmark of serving.

    python -m benchmarks.serving --peer vllm=PYTHON                  over HTTP: loray serve, loray up, vLLM
    python -m benchmarks.serving --preset bases --system loray-serve --model NAME --peer llama=SERVER:GGUF
    python -m benchmarks.serving --preset mixed                      a long prompt among short ones
    python -m benchmarks.serving --preset acceptance                 the engine's list, in process
    python -m benchmarks.serving --preset quick --peer peft          ... beside its peers
    python -m benchmarks.serving --preset gpu --device cuda --model llama3-8b-random

docs/benchmarks/serving.md explains the options and the columns.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.options import check_only, one_or_more
from benchmarks.report import machine_line
from benchmarks.serving.adapters import open_library
from benchmarks.serving.cases import OUR_SYSTEMS, OURS, OVER_HTTP, PRESETS
from benchmarks.serving.floors import ModelSize
from benchmarks.serving.models import bench_base
from benchmarks.serving.rows import Results, summary
from benchmarks.serving.run import publish, run
from benchmarks.serving.sessions import Setting
from benchmarks.serving.targets import verdicts
from benchmarks.world import Steady, describe_machine, measure_rates
from loray.settings import Settings


def main(argv: Sequence[str] | None = None) -> Results:
    args = _parser().parse_args(argv)
    check_only(args.only, [case.name for case in PRESETS[args.preset]])
    todo = [case for case in PRESETS[args.preset] if args.only in case.name]
    os.environ["OMP_NUM_THREADS"] = "1"  # of this process, which idles while the systems run
    folder: Path = args.folder or Settings.from_env().home / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    base = bench_base(args.model, folder)
    peers = dict(_peer(peer) for peer in args.peer)
    systems = tuple(args.system) or (OUR_SYSTEMS if args.preset in OVER_HTTP else (OURS,))
    machine = describe_machine()
    click.echo(machine_line(machine))
    with open_library(args.store, folder, base) as library:
        setting = Setting(base, library, folder, args.device, args.dtype, args.threads, args.pool_bytes, peers)
        for case in todo:
            publish(setting, [case])
        rates = measure_rates(args.device, args.threads)
        results = Results(rates, ModelSize.of(base.config, 4 if args.dtype == "float32" else 2))
        click.echo(
            f"{base.name}, {args.threads} threads; memory {rates.bandwidth / 1e9:.1f} GB/s, products "
            f"{rates.flops / 1e9:.0f} GFLOP/s; first tokens within {args.slo:g} s"
        )
        steady = Steady(args.threads, patience_s=args.patience) if args.patience > 0 else None
        run(
            todo,
            (*systems, *peers),
            setting,
            results,
            slo_s=args.slo,
            repeat=args.repeat,
            rounds=args.rounds,
            steady=steady,
            on_row=lambda row: click.echo(f"{row.case}, {row.system}: {row.latencies.throughput:.1f} tok/s"),
        )
    has_targets = (base.name, args.device, args.dtype) == ("smollm2", "cpu", "auto")
    found = verdicts(results) if has_targets else []
    arguments = " ".join(sys.argv[1:] if argv is None else argv)
    report = results.report(machine, arguments, targets=[verdict.to_json() for verdict in found])
    click.echo("\n".join([report.text(), *summary(results), *(verdict.line() for verdict in found)]))
    if steady is not None:
        click.echo(steady.describe())
    report.write(args.json)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="http")
    add("--only", default="", help="of the preset, cases whose name contains this")
    add(
        "--peer",
        action="append",
        default=[],
        metavar="NAME[=PYTHON]",
        help="also peft, peft-bf16 or vllm, in their environments, or llama=SERVER:GGUF",
    )
    add(
        "--system",
        action="append",
        default=[],
        choices=OUR_SYSTEMS,
        help="of loray: the engine in process, alone or beside an idle `loray up`; `loray serve`; `loray up`",
    )
    add("--repeat", type=one_or_more, help="passes of each case (peers: one)")
    add("--rounds", type=one_or_more, default=1, help="times that every system starts and runs its passes (default 1)")
    add(
        "--patience",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how long, in all, to wait and to repeat passes because the machine is faster or slower than at the start",
    )
    add("--slo", type=float, default=6.0, help="seconds to the first token (default %(default)s, the paper's)")
    add("--json", type=Path, help="write everything there too")
    add("--store", choices=("file", "s3"), default="file", help="where adapters come from (default %(default)s)")
    add("--folder", type=Path, help="keeps adapters between runs (default HOME/bench)")
    add("--model", default="smollm2", help="a base on this machine, or llama3-8b-random")
    add("--device", default="cpu")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of loray's weights and KV cache")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--pool-bytes", type=int, help="instead of each case's own")
    return parser


def _peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    return name, python or sys.executable


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are ended too
    main()
