"""Memory of many adapters in one process, beside the plan that is printed before they start.

    python -m benchmarks.training.many_memory                     1,000 VeRA adapters on SmolLM2: some minutes
    python -m benchmarks.training.many_memory --adapters 100 --checkpointing

Adapters on q, k, v and o, bf16, micro-batches of one row of 16 tokens. A process of its own trains them with the loop
of `loray train`; after two rounds the held-out rows are measured, so that the best weights are kept, and a snapshot of
all is written. Memory is the largest resident set (VmHWM): in these rounds, and until the end with the snapshot and
each adapter's checkpoint. The plan counts the latter, above what interpreter and libraries hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.report import machine_line, write_json
from benchmarks.world import describe_machine, load_average, peak_bytes, resident_bytes, run_modules
from loray.bases.registry import add_base, get_base
from loray.machine import hardware
from loray.planning.devices import device_on
from loray.planning.many import plan_many
from loray.recommend import recipe_of
from loray.spec import ATTENTION_MODULES, CheckpointSpec, EvaluationSpec, TrainSpec, VeraSpec
from loray.train.checkpoint import Metrics
from loray.train.data.batches import pack_rows
from loray.train.data.corpus import TemporaryCache
from loray.train.data.rows import Cut, DataReport, Dataset
from loray.train.many.cohort import cohorts, load_of

_TOKENS, _ROWS, _HELD_OUT = 16, 8, 1


def recipes(base: str, num_adapters: int, rank: int, num_rounds: int, checkpointing: bool) -> list[TrainSpec]:
    adapter = VeraSpec(rank=rank, target_modules=ATTENTION_MODULES)
    one = recipe_of(adapter, _TOKENS, checkpointing=checkpointing)
    changes: dict[str, Any] = {
        "base": base,
        "dtype": "bfloat16",
        "max_steps": num_rounds,
        "evaluation": EvaluationSpec(interval_steps=2),
        "checkpoint": CheckpointSpec(interval_steps=2),
    }
    return [one.model_copy(update={**changes, "name": f"adapter-{i}", "seed": i}) for i in range(num_adapters)]


def rows_of(seed: int, vocabulary: int) -> Dataset:
    """Rows of tokens as frequent as those of texts."""
    rng = np.random.default_rng(seed)
    ids = rng.zipf(1.3, (_ROWS + _HELD_OUT, _TOKENS)) % vocabulary
    rows = [(row.astype(np.int32), np.ones(_TOKENS, np.bool_)) for row in ids]
    num_tokens = _ROWS * _TOKENS
    counts = (_ROWS + _HELD_OUT, _ROWS, _HELD_OUT, num_tokens, num_tokens - _ROWS, 0, 0)
    report = DataReport("text", "made up", _TOKENS, *counts, Cut(0.0, 0.0, _TOKENS))
    train, held_out = pack_rows(rows[:_ROWS]), pack_rows(rows[_ROWS:])
    return Dataset(train, held_out, _TOKENS, f"{seed:064x}", report, TemporaryCache())


class _Peaks:
    """Takes what is reported, and the largest resident set until the first snapshot begins."""

    def __init__(self) -> None:
        self.in_rounds = 0
        self.seconds = list[float]()
        self._began = time.perf_counter()

    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        if metrics["event"] == "round":
            if metrics["round"] <= 2:  # a snapshot is taken after it
                self.in_rounds = peak_bytes()
            self.seconds.append(time.perf_counter() - self._began)
            self._began = time.perf_counter()


def measure(home: str, name: str, num_adapters: int, rank: int, num_rounds: int, checkpointing: int) -> dict[str, Any]:
    """Train, and compare with the plan."""
    from loray.train.many.loop import train_many

    base, specs = get_base(Path(home), name), recipes(name, num_adapters, rank, num_rounds, bool(checkpointing))
    assert len(cohorts(specs, base.config)) == 1
    datas = {spec.name: rows_of(spec.seed, base.config.vocab_size) for spec in specs}
    loads = {spec.name: load_of(spec, datas[spec.name], base.config) for spec in specs}
    device = device_on(hardware(), 1, use_gpu=False)
    assert device is not None
    plan = plan_many(loads, device)
    before, peaks = resident_bytes(), _Peaks()
    with tempfile.TemporaryDirectory(prefix="many-memory-") as folder:
        ended = train_many(
            specs,
            base,
            datas,
            reporters={spec.name: peaks for spec in specs},
            reporter=peaks,
            workdir=Path(folder),
            tokens_per_pass=plan.tokens_per_pass,
        )
    return {
        "num_succeeded": sum(last.status == "succeeded" for last in ended.values()),
        "plan": plan.memory_line(),
        "plan_bytes": plan.memory.peak_bytes,
        "items": {item.name: item.nbytes for item in plan.memory.items},
        "before_bytes": before,
        "rounds_bytes": peaks.in_rounds,
        "peak_bytes": peak_bytes(),
        "seconds": peaks.seconds,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the figures as they are written to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again, in less memory")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--home", type=Path, default=Path(".cache/loray-home"), help="of the base model")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    home = args.home.absolute()
    add_base(args.base, home=home)
    click.echo(machine_line(describe_machine(), load=f"{load_average():.1f}"))
    command = ["benchmarks.training.many_memory", "--measure", str(home), args.base]
    numbers = (args.adapters, args.rank, args.rounds, int(args.checkpointing))
    (found,) = run_modules([[*command, *map(str, numbers)]])
    click.echo(f"plan: {found['plan']}")
    click.echo(
        f"{found['num_succeeded']:,} of {args.adapters:,} VeRA adapters of rank {args.rank}: "
        f"{found['rounds_bytes'] / 1e9:.2f} GB in rounds, {found['peak_bytes'] / 1e9:.2f} GB with a snapshot of all, "
        f"{found['before_bytes'] / 1e9:.2f} GB of it interpreter, libraries and rows; the rest is "
        f"{(found['peak_bytes'] - found['before_bytes']) / found['plan_bytes']:.0%} of the plan"
    )
    write_json(args.json, {"machine": describe_machine(), **found})
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        home, name, *numbers = sys.argv[2:]
        sys.stdout.write(json.dumps(measure(home, name, *map(int, numbers))) + "\n")
    else:
        main()
