"""Estimates of `loray recommend` beside measurements: memory and time of a training step, bytes of an adapter.

    python -m benchmarks.training.recommend [--context-length 2048] [--steps 2] [--json FILE]

Each method trains SmolLM2 with its default settings for some steps in a separate process. Memory is measured as in
`benchmarks.training.plan`. Bytes are those of the published weights' file.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.machine import measure_machine, on_this_machine
from benchmarks.output import write_json
from benchmarks.training.steps import Measured, measure_recipe
from loray.bases.registry import BaseModel, add_base
from loray.planning.devices import host
from loray.recommend import Answers, Estimate, candidates, estimate_methods
from loray.settings import Settings
from loray.spec import TrainSpec

_COLUMNS = (
    f"{'method':<10} {'settings':<38} {'peak MB':>8} {'estimate':>9} {'off':>5}  "
    f"{'file MB':>8} {'estimate':>9} {'off':>5}  {'step s':>7} {'estimate':>9} {'off':>5}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2, help="of each method")
    parser.add_argument("--home", type=Path, default=Settings.from_env().home, help="of the base model")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    base = add_base("smollm2", home=args.home.absolute())
    device = host(measure_machine(), 1)
    answers = Answers(args.context_length, 1)
    click.echo(_COLUMNS)
    rows = []
    recipes = {name: on_this_machine(recipe) for name, recipe in candidates(args.context_length, base.config)}
    for estimate in estimate_methods(answers, base.config, device):
        recipe = recipes[estimate.method].model_copy(update={"gradient_checkpointing": estimate.checkpointing})
        found, nbytes = measure_recipe(recipe, base, args.steps), file_bytes(recipe, base)
        rows.append(asdict(estimate) | {"measured": asdict(found) | {"file_bytes": nbytes}})
        click.echo(_line(estimate, found, nbytes))
    write_json(args.json, rows)


def file_bytes(recipe: TrainSpec, base: BaseModel) -> int:
    """Bytes of the weights' file of the recipe's adapter, as it is published: in the base's dtype."""
    from loray.adapters.peft_format import WEIGHTS_FILE
    from loray.bases.checkpoint import stored_dtype
    from loray.train.checkpoint import save_adapter
    from loray.train.model import build_model

    model = build_model(base, recipe.model_copy(update={"dtype": stored_dtype(base.path)}))
    with TemporaryDirectory() as folder:
        save_adapter(model, recipe.adapter, Path(folder) / "adapter")
        return (Path(folder) / "adapter" / WEIGHTS_FILE).stat().st_size


def _line(estimate: Estimate, found: Measured, nbytes: int) -> str:
    pairs = (
        (found.peak_bytes / 1e6, (estimate.training_bytes or 0) / 1e6, "8.0f", "9.0f"),
        (nbytes / 1e6, estimate.adapter_bytes / 1e6, "8.2f", "9.2f"),
        (found.step_s, estimate.step_s or 0.0, "7.1f", "9.1f"),
    )
    cells = (f"{is_:{a}} {planned:{b}} {planned / is_ - 1:>+5.0%}" for is_, planned, a, b in pairs)
    return f"{estimate.method:<10} {estimate.settings:<38} " + "  ".join(cells)


if __name__ == "__main__":
    main()
