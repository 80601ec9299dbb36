"""Whole jobs: many adapters by one `loray train`, beside as many commands one after the other.

    python -m benchmarks.training.many_jobs                   16 adapters, 40 steps of 2 rows of at most 64 tokens
    python -m benchmarks.training.many_jobs --adapters 16 --alone 4

From the command to the published adapters, in a home of its own. Each adapter has rows of its own, and all have the
same recipe. `--alone` trains so many by commands of their own, and their seconds are multiplied.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.options import one_or_more
from benchmarks.report import Report, machine_line
from benchmarks.world import describe_machine, run_loray

BASE = "smollm2"
_TARGET = 5.0
COLUMNS = (
    *("adapters", "one job, s\t.0f", "published", "commands", "one after the other, s\t.0f", "ratio\t.2f", "target"),
)


def write(folder: Path, num_adapters: int, steps: int) -> Path:
    """Write the rows of each adapter and the recipe of all, and return the latter."""
    rows = folder / "customers"
    rows.mkdir(parents=True)
    for number in range(num_adapters):
        draw = random.Random(number)
        lines = [_row(number, draw) for _ in range(2 * steps)]
        (rows / f"c{number}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    recipe = {
        "name": "customer",
        "base": BASE,
        "adapter": {"method": "lora", "rank": 8},
        "data": {"train": str(rows / "c0.jsonl"), "format": "raw", "max_length": 64},
        "batch": {"rows": 2},
        "max_steps": steps,
        "tracking": [],
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def _row(number: int, draw: random.Random) -> dict[str, str]:
    """Make a row of some 60 tokens."""
    orders = [(draw.randrange(100, 1000), draw.randrange(100, 1000)) for _ in range(4)]
    prompt = " ".join(f"{count} of part {part} were ordered." for count, part in orders)
    return {"prompt": prompt, "completion": f" C{number}: {sum(count for count, _ in orders)}"}


def timed(home: Path, *arguments: str) -> float:
    """Run a command of loray, and return its seconds."""
    began = time.perf_counter()
    run_loray(home, *arguments)
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> Report:
    args = _parser().parse_args(argv)
    machine = describe_machine()
    click.echo(machine_line(machine))
    home = Path(tempfile.mkdtemp(prefix="loray-many-"))
    recipe = write(home / "data", args.adapters, args.steps)
    rows = home / "data" / "customers"
    run_loray(home, "base", "add", BASE)
    try:
        together = timed(home, "train", str(recipe), "--each", str(rows / "*.jsonl"), "--no-plan")
        num_published = len(list((home / "runs").glob("customer-c*/*/published.json")))
        click.echo(f"{args.adapters} adapters in one job: {together:.0f} s")
        alone = 0.0
        for number in range(args.alone):
            file = rows / f"c{number}.jsonl"
            alone += timed(
                home,
                "train",
                str(recipe),
                "--set",
                f"name=alone-{number}",
                "--set",
                f"data.train={file}",
                "--no-plan",
            )
            click.echo(f"{number + 1} of {args.alone} commands: {alone:.0f} s")
    finally:
        run_loray(home, "down")  # the cluster that the first command has started
    scaled = alone * args.adapters / args.alone
    ratio = scaled / together
    target = f"≥ {_TARGET:g}" + ("" if ratio >= _TARGET else " MISSED")
    line = [args.adapters, together, num_published, args.alone, scaled, ratio, target]
    report = Report(machine, COLUMNS, [line], " ".join(argv or sys.argv[1:]))
    click.echo(report.text())
    report.write(args.json)
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapters", type=one_or_more, default=16)
    add("--steps", type=one_or_more, default=40)
    add("--alone", type=one_or_more, default=16, help="of them also by commands of their own")
    add("--json", type=Path, help="write everything there too")
    return parser


if __name__ == "__main__":
    main()
