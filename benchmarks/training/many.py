"""Many adapters in one process, against one after the other: seconds of a round, in which each makes one step.

    python -m benchmarks.training.many                   all cases on SmolLM2
    python -m benchmarks.training.many --only "32 LoRA" --rounds 5

One after the other is the loop of a single run whose base stays in memory; PEFT has all adapters of a method in one
model and calls `set_adapter` before each step. Each way of each case is a process of its own. Of the case with a
thousand adapters the others train one of nine, and their seconds are nine times those: PEFT's are more then, since
`set_adapter` looks at all adapters.

Seconds are those of bf16 where the machine has its products. Losses are compared in fp32, in processes of their own: in
bf16 those of one adapter's few tokens differ by their rounding. They are means over the adapters that all ways train,
shown of the last round; a case whose ways differ by more than 0.001 in any round is invalid.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.options import check_only, one_or_more
from benchmarks.report import Report, machine_line
from benchmarks.world import describe_machine, run_modules, watch
from loray.bases.registry import BaseModel, add_base
from loray.settings import Settings

WAYS = ("bank", "alone", "peft")
_APART = 0.001
_COMPARED = 2  # rounds whose losses are


class Case(NamedTuple):
    """Targets are of the seconds of one after the other, and of PEFT, by the bank's. `every`: these train one of so
    many. `adapters`: see `workers.many`.
    """

    name: str
    adapters: str
    rows: int
    tokens: int
    targets: tuple[float, float]
    every: int = 1


CASES = (
    Case("32 LoRA r4 to r64, 1 × 16", "lora:4,8,16,32,64,8,16,8x4", 1, 16, (2.5, 3.0)),
    Case("32 LoRA r8, 1 × 64", "lora:8x32", 1, 64, (1.5, 2.0)),
    Case("8 LoRA r16, 4 × 128", "lora:16x8", 4, 128, (1.05, 1.3)),
    Case("100 VeRA r256, 1 × 64", "vera:256x100", 1, 64, (1.8, 2.5)),
    Case("64 LoRA r8 to r64 and 1,000 VeRA r256, 1 × 16", "lora:8,16,32,64x16+vera:256x1000", 1, 16, (1.0, 1.0), 9),
)
COLUMNS = (
    *("case", "one pass, s\t.2f", "one after the other, s\t.2f", "ratio\t.2f", "target"),
    *("PEFT, s\t.2f", "ratio\t.2f", "target", "losses\t.4f", "apart\t.2g", "others' cores\t.2f"),
)


def main(argv: Sequence[str] | None = None) -> Report:
    args = _parser().parse_args(argv)
    check_only(args.only, [case.name for case in CASES])
    base = add_base(args.base, home=args.home.absolute())
    machine = describe_machine()
    click.echo(machine_line(machine))
    rows: list[list[Any]] = []
    figures: dict[str, Any] = {}
    for case in CASES:
        if args.only in case.name:
            row, figures[case.name] = run(case, base, args.threads, args.rounds)
            rows.append(row)
            click.echo(Report(machine, COLUMNS, [row]).text())
    report = Report(machine, COLUMNS, rows, f"--rounds {args.rounds}", figures)
    click.echo(f"\n{report.text()}\nLarge batches gain nothing: a step that fills the cores alone fills them as well.")
    report.write(args.json)
    return report


def run(case: Case, base: BaseModel, num_threads: int, num_rounds: int) -> tuple[list[Any], dict[str, Any]]:
    """Return the row of a case, and its figures."""
    home = str(base.path.parent.parent)

    def measure(way: str, dtype: str, every: int, rounds: int) -> Any:
        arguments = (home, base.name, way, dtype, case.adapters, every, case.rows, case.tokens, rounds)
        return run_modules([["benchmarks.training.workers.many", *map(str, arguments)]], num_threads)[0]

    with watch() as disturbance:
        found = {way: measure(way, "auto", 1 if way == "bank" else case.every, num_rounds) for way in WAYS}
    seconds = {way: statistics.median(found[way]["seconds"]) for way in WAYS}
    compared = {way: measure(way, "float32", case.every, _COMPARED)["losses"] for way in WAYS}
    means = {way: [statistics.fmean(losses.values()) for losses in compared[way]] for way in WAYS}
    apart = max(abs(loss - ours) for way in WAYS for loss, ours in zip(means[way], means["bank"], strict=True))
    name = case.name if apart <= _APART else f"{case.name} INVALID"
    row = [name, seconds["bank"]]
    for way, target in zip(WAYS[1:], case.targets, strict=True):
        scaled = seconds[way] * len(found["bank"]["losses"][0]) / len(found[way]["losses"][0])
        ratio = scaled / seconds["bank"]
        row += [scaled, ratio, f"≥ {target:g}" + ("" if ratio >= target else " MISSED")]
    return [*row, means["bank"][-1], apart, disturbance.cores], found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default="", help="cases whose name contains this")
    add("--rounds", type=one_or_more, default=5, help="of which medians are taken, after one that warms up")
    add("--threads", type=one_or_more, default=len(os.sched_getaffinity(0)))
    add("--base", default="smollm2", help="or the folder of a checkpoint")
    add("--home", type=Path, default=Settings.from_env().home, help="where the base is, or is made")
    add("--json", type=Path, help="write everything there too")
    return parser


if __name__ == "__main__":
    main()
