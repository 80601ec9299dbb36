"""The benchmark of training: S2-Attn against the fastest dense attention, on SmolLM2-135M.

    python -m benchmarks.training                      attention at 8k and 16k, a step at 16k, memory at 32k: 15 minutes
    python -m benchmarks.training --preset sequence    activations and traffic over sequence groups: five minutes
    python -m benchmarks.training --preset vera        steps of VeRA against PEFT's: two minutes
    python -m benchmarks.training --preset trainer     steps of three methods against PEFT in transformers' Trainer
    python -m benchmarks.training --preset long        a step at 100k: about an hour
    python -m benchmarks.training --only attention

docs/benchmarks/training.md explains the rows and the columns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.options import check_only
from benchmarks.report import machine_line, write_json
from benchmarks.training.cases import PRESETS, Case, Row, Setting
from benchmarks.world import Disturbance, describe_machine, watch
from loray.bases.registry import add_base
from loray.settings import Settings


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows as they are written to --json."""
    args = _parser().parse_args(argv)
    check_only(args.only, [case.name for case in PRESETS[args.preset]])
    base = add_base(args.base, home=args.home.absolute())
    machine = describe_machine()
    click.echo(machine_line(machine))
    click.echo(f"{base.name}, bf16, {args.threads} threads")
    setting = Setting(base, args.threads, args.repeats, args.steps)
    rows: list[dict[str, Any]] = []
    columns: tuple[str, ...] = ()
    for case in PRESETS[args.preset]:
        if args.only not in case.name:
            continue
        if case.columns != columns:
            columns = case.columns
            click.echo("\n" + _line("", columns, columns, "target", "load", "others"))
        with watch() as disturbance:
            row = case.run(setting)
        click.echo(_row(case, row, disturbance))
        rows.append(_record(case, row, disturbance))
    write_json(args.json, {"machine": machine, "threads": args.threads, "rows": rows})
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="default")
    add("--only", default="", help="of the preset, cases whose name contains this")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="shared by the workers of a case")
    add("--repeats", type=int, default=3, help="of attention, of which medians are taken (S2-Attn: twice as many)")
    add("--steps", type=int, default=1, help="training steps, of which the quickest counts")
    add("--base", default="smollm2", help="or the folder of a checkpoint")
    add("--home", type=Path, default=Settings.from_env().home, help="where the base is, or is made")
    add("--json", type=Path, help="write everything there too")
    return parser


def _row(case: Case, row: Row, disturbance: Disturbance) -> str:
    target = ""
    if case.target is not None:
        target = str(case.target) + ("" if case.target.is_met(row.reached) else " MISSED")
    load, others = f"{disturbance.load:.1f}", f"{disturbance.cores:.2f}"
    return f"{_line(case.name, case.columns, row.cells, target, load, others)}  {row.note}".rstrip()


def _line(name: str, columns: Sequence[str], cells: Sequence[str], target: str, load: str, others: str) -> str:
    numbers = (f"{cell:>{max(8, len(column))}}" for column, cell in zip(columns, cells, strict=True))
    return f"{name:<20} {'  '.join(numbers)}  {target:<14} {load:>5} {others:>6}".rstrip()


def _record(case: Case, row: Row, disturbance: Disturbance) -> dict[str, Any]:
    target = case.target
    return {
        "case": case.name,
        **row.figures,
        "target": None if target is None else str(target),
        "is_met": None if target is None else target.is_met(row.reached),
        "load_before": disturbance.load,
        "others_cores": disturbance.cores,
    }


if __name__ == "__main__":
    main()
