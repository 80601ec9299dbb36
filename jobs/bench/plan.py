"""Plans beside what is measured: memory and time of SmolLM2's training steps on this machine.

    python -m jobs.bench.plan [--tokens 2048 4096 8192] [--adapters lora longlora] [--checkpointing no yes] [--json FILE]

Each case is trained for some steps in a process of its own, as `loray train` would. Memory is the peak of its resident
set in these steps (VmHWM), less what the interpreter and its libraries hold before a model is there (VmRSS); a plan's
share for the framework is in both. Time is the quickest step's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from loray.bases.registry import BaseModel, add_base
from loray.planning.devices import HostRates, host
from loray.planning.plan import Plan, make_plan
from loray.planning.run import run_of
from loray.spec import TrainSpec

_COLUMNS = f"{'case':<28} {'peak MB':>8} {'planned':>8} {'off':>6}  {'step s':>7} {'planned':>8} {'off':>6}  load"


@dataclass(frozen=True, slots=True)
class Case:
    tokens: int
    adapter: str
    checkpointing: bool

    @property
    def label(self) -> str:
        return f"{self.adapter} {self.tokens}{' checkpointing' if self.checkpointing else ''}"

    @property
    def recipe(self) -> TrainSpec:
        """One row of `tokens`; LongLoRA stretches half as much."""
        adapter: dict[str, Any] = {"method": self.adapter, "rank": 8, "alpha": 16}
        if self.adapter == "longlora":
            adapter["long_context"] = {"original_context": self.tokens // 2, "rope_scaling": {"factor": 2}}
        return TrainSpec.model_validate(
            {
                "name": "bench",
                "adapter": adapter,
                "data": {"train": "unused", "max_length": self.tokens},
                "batch": {"rows": 1},
                "optimizer": {"learning_rate": 1e-4},
                "max_steps": 1,
                "gradient_checkpointing": self.checkpointing,
            }
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes above the interpreter's, seconds of the quickest step."""

    peak_bytes: int
    step_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--adapters", choices=["lora", "longlora"], nargs="+", default=["lora", "longlora"])
    parser.add_argument("--checkpointing", choices=["no", "yes"], nargs="+", default=["no", "yes"])
    parser.add_argument("--steps", type=int, default=2, help="of each case")
    parser.add_argument("--home", type=Path, default=Path(".cache/loray-home"), help="where the base model is, or comes")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    base, rates = add_base("smollm2", home=args.home.absolute()), measured_rates()
    click.echo(
        f"{os.cpu_count()} cores: bf16 products {rates.flops / 1e9:.0f} GFLOP/s, S2-Attn {rates.attention_flops / 1e9:.0f}, "
        f"dense attention {rates.dense_attention_flops / 1e9:.0f}; memory {rates.bandwidth / 1e9:.0f} GB/s"
    )
    click.echo(_COLUMNS)
    rows = []
    for tokens, adapter, checkpointing in itertools.product(args.tokens, args.adapters, args.checkpointing):
        case = Case(tokens, adapter, checkpointing == "yes")
        load = os.getloadavg()[0]
        measured = measure(case, base, args.steps)
        plan = make_plan(run_of(case.recipe, base.config), host(rates, 1))
        rows.append(asdict(case) | asdict(measured) | {"load": load} | _planned(plan))
        click.echo(_line(case, measured, plan, load))
    if args.json:
        args.json.write_text(json.dumps({"rates": asdict(rates), "rows": rows}, indent=2) + "\n", encoding="utf-8")


def measured_rates() -> HostRates:
    """In a process of its own, as `loray plan` has them."""
    return HostRates(**_run(["loray.train.rates"]))


def measure(case: Case, base: BaseModel, num_steps: int) -> Measured:
    recipe = case.recipe.model_dump_json()
    return Measured(**_run(["jobs.bench.plan_worker", str(base.path.parent.parent), recipe, str(num_steps)]))


def _run(module_and_args: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", *module_and_args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module_and_args[0]} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _planned(plan: Plan) -> dict[str, Any]:
    return {
        "planned_peak_bytes": plan.memory.peak_bytes,
        "planned_step_s": plan.time.step_s,
        "dominant": plan.memory.dominant.name,
    }


def _line(case: Case, measured: Measured, plan: Plan, load: float) -> str:
    memory, time = plan.memory.peak_bytes, plan.time.step_s
    return (
        f"{case.label:<28} {measured.peak_bytes / 1e6:>8.0f} {memory / 1e6:>8.0f} {memory / measured.peak_bytes - 1:>+6.0%}"
        f"  {measured.step_s:>7.1f} {time:>8.1f} {time / measured.step_s - 1:>+6.0%}  {load:.1f}"
    )


if __name__ == "__main__":
    main()
