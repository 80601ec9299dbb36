"""The benchmark of serving.

    python -m benchmarks.serving --peer vllm=PYTHON                  over HTTP: loray serve, loray up, vLLM
    python -m benchmarks.serving --preset mixed                      a long prompt among short ones
    python -m benchmarks.serving --preset acceptance                 the engine's list, in process
    python -m benchmarks.serving --preset quick --peer peft          ... beside its peers
    python -m benchmarks.serving --adapters 500 --alpha 0.3 --rate 4 --cv 2 --requests 200
    python -m benchmarks.serving --preset gpu --device cuda --model llama3-8b-random

docs/benchmarks/serving.md explains the options and the columns.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from benchmarks import machine
from benchmarks.machine import describe_machine
from benchmarks.options import check_only, numbers, one_or_more
from benchmarks.output import machine_line, write_json
from benchmarks.serving import cases as presets
from benchmarks.serving.ablations import ABLATIONS
from benchmarks.serving.adapters import AdapterSet, open_library
from benchmarks.serving.cases import OVER_HTTP, PRESETS, Case, EngineOptions
from benchmarks.serving.figures import report, served
from benchmarks.serving.figures.floors import ModelSize
from benchmarks.serving.figures.picture import draw_density
from benchmarks.serving.figures.results import OUR_SYSTEMS, OURS, Results
from benchmarks.serving.figures.targets import verdicts
from benchmarks.serving.models import bench_base
from benchmarks.serving.run import measure_transfer, publish, run
from benchmarks.serving.systems.processes import Setting
from benchmarks.serving.workload import Workload
from benchmarks.steady import Probe, Steady
from loray.settings import Settings
from loray.spec import ATTENTION_MODULES, LINEAR_MODULES


def main(argv: Sequence[str] | None = None) -> Results:
    args = _parser().parse_args(argv)
    if args.plot and args.preset != "density":
        raise SystemExit("--plot draws the preset density; give --preset density with it")
    todo = _cases(args)
    os.environ["OMP_NUM_THREADS"] = "1"  # of this process, which idles while the systems run
    folder: Path = args.folder or Settings.from_env().home / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    base = bench_base(args.model, folder)
    peers = dict(_peer(peer) for peer in args.peer)
    systems = tuple(args.system) or (OUR_SYSTEMS if args.preset in OVER_HTTP and args.adapters is None else (OURS,))
    described = describe_machine()
    click.echo(machine_line(described))
    with open_library(args.store, folder, base) as library:
        setting = Setting(base, library, folder, args.device, args.threads, args.pool_bytes, peers)
        for _, group in _by_set(todo).items():
            publish(setting, group)
        rates = machine.measure_rates(args.device, args.threads)
        results = Results(described, rates, ModelSize.of(base.config), measure_transfer(setting, todo))
        click.echo(
            f"{base.name}, {args.threads} threads; memory {rates.bandwidth / 1e9:.1f} GB/s, products "
            f"{rates.flops / 1e9:.0f} GFLOP/s; first tokens within {args.slo:g} s"
        )
        steady = Steady(Probe(args.threads), patience_s=args.patience) if args.patience > 0 else None
        click.echo(report.header())
        run(
            todo,
            (*systems, *peers),
            setting,
            results,
            slo_s=args.slo,
            repeat=args.repeat,
            rounds=args.rounds,
            steady=steady,
            on_row=lambda row: click.echo(report.line(row)),
        )
    has_targets = (base.name, args.device, args.adapters, args.ablation) == ("smollm2", "cpu", None, [])
    found = [*verdicts(results), *served.verdicts(results)] if has_targets else []
    if below := report.summary(results, found):
        click.echo(below)
    if steady is not None:
        click.echo(steady.describe())
    if args.plot:
        draw_density(results, args.plot)
    targets = [v._asdict() | {"is_met": v.is_met} for v in found]
    write_json(args.json, results.to_dict() | {"targets": targets})
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="http")
    add("--only", default="", help="of the preset, cases whose name contains this")
    add("--ablation", action="append", choices=ABLATIONS, default=[], help="the engine without one of its features")
    add(
        "--peer",
        action="append",
        default=[],
        metavar="NAME[=PYTHON]",
        help="also peft, peft-bf16 or vllm, in their environments",
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
    add("--plot", type=Path, help="of --preset density: write the picture there, as SVG")
    add("--store", choices=("file", "s3"), default="file", help="where adapters come from (default %(default)s)")
    add("--folder", type=Path, help="keeps adapters between runs (default HOME/bench)")
    add("--model", default="smollm2", help="a base on this machine, or llama3-8b-random")
    add("--device", default="cpu")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--pool-bytes", type=int, help="instead of each case's own")
    custom = parser.add_argument_group("a case given by options, instead of a preset")
    custom.add_argument("--adapters", type=int, help="distinct ones; 0 is the base")
    custom.add_argument("--ranks", type=numbers, default=(8, 16, 32, 64), help="in turn (default 8,16,32,64)")
    custom.add_argument("--modules", choices=("attention", "all"), default="attention")
    custom.add_argument("--alpha", type=float, help="popularity by power law, 1 is uniform; otherwise round robin")
    custom.add_argument("--pool-adapters", type=int, help="how many fit the pool (default all)")
    custom.add_argument("--requests", type=one_or_more, default=96)
    custom.add_argument("--at-once", type=one_or_more, help="closed loop (default 32 where no --rate is given)")
    custom.add_argument("--rate", type=float, help="open loop: requests/s")
    custom.add_argument("--cv", type=float, default=1.0, help="of the inter-arrival times")
    custom.add_argument("--inputs", type=numbers, default=(64, 64), help="tokens, LOW,HIGH")
    custom.add_argument("--outputs", type=numbers, default=(32, 32), help="tokens, LOW,HIGH")
    custom.add_argument("--seed", type=int, default=0)
    custom.add_argument("--max-num-seqs", type=int, default=32)
    return parser


def _cases(args: argparse.Namespace) -> tuple[Case, ...]:
    if args.adapters is not None:
        return (_custom_case(args),)
    found = presets.ablations(tuple(args.ablation)) if args.ablation else PRESETS[args.preset]
    check_only(args.only, [case.name for case in found])
    return tuple(case for case in found if args.only in case.name)


def _custom_case(args: argparse.Namespace) -> Case:
    modules = LINEAR_MODULES if args.modules == "all" else ATTENTION_MODULES
    ablation = args.ablation[0] if args.ablation else None
    padded = ablation == "padded-ranks"
    if len(args.ablation) > 1:
        raise SystemExit("a case given by options takes one --ablation; run it once for each")
    adapters = AdapterSet(args.adapters, args.ranks, modules, padded) if args.adapters else None
    workload = Workload(
        args.requests,
        args.adapters,
        alpha=args.alpha,
        at_once=args.at_once or (None if args.rate else 32),
        rate=args.rate,
        cv=args.cv,
        inputs=args.inputs,
        outputs=args.outputs,
        seed=args.seed,
    )
    kv_tokens = 2 * args.max_num_seqs * workload.max_tokens
    engine = EngineOptions(adapters, args.pool_adapters, kv_tokens, max_num_seqs=args.max_num_seqs, ablation=ablation)
    return Case(f"n={args.adapters}", engine, workload, passes=1)


def _by_set(todo: Sequence[Case]) -> Mapping[AdapterSet | None, list[Case]]:
    found: dict[AdapterSet | None, list[Case]] = {}
    for case in todo:
        found.setdefault(case.engine.adapters, []).append(case)
    return found


def _peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    return name, python or sys.executable


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are ended too
    main()
