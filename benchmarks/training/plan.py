"""Plans beside measurements: memory, halo bytes and time of SmolLM2's training steps on this machine.

    python -m benchmarks.training.plan [--tokens 2048 4096 8192] [--adapters lora longlora] [--checkpointing no yes]
                              [--sequence 1 2] [--strategy ddp] [--json FILE]

Each worker of a case trains for some steps in a separate process, as the workers of `loray train` do. Memory is the
peak of a worker's resident set in these steps (VmHWM), less what interpreter and libraries hold before the model is
loaded (VmRSS); the largest of all workers counts. Halo bytes are counted at the collective; the worker that sends most
in a step counts. Time is that of the fastest step.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.report import write_json
from benchmarks.training.steps import Measured, RowStep, measure
from benchmarks.world import load_average, measure_machine
from loray.bases.registry import add_base
from loray.planning.devices import host
from loray.planning.memory import CHECKPOINT
from loray.planning.plan import Plan, make_plan
from loray.planning.run import shape_of

_COLUMNS = (
    f"{'case':<32} {'peak MB':>8} {'planned':>8} {'off':>5}  {'halo MB':>8} {'planned':>8}  "
    f"{'step s':>7} {'planned':>8} {'off':>5}  load"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--adapters", choices=["lora", "longlora"], nargs="+", default=["lora", "longlora"])
    parser.add_argument("--checkpointing", choices=["no", "yes"], nargs="+", default=["no", "yes"])
    parser.add_argument("--sequence", type=int, nargs="+", default=[1], help="P; more than 1 for longlora alone")
    parser.add_argument("--strategy", choices=["ddp", "zero2", "zero3", "fsdp2"], default="ddp")
    parser.add_argument("--steps", type=int, default=2, help="of each case")
    parser.add_argument("--home", type=Path, default=Path(".cache/loray-home"), help="of the base model")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    base, machine = add_base("smollm2", home=args.home.absolute()), measure_machine()
    rates = machine.rates
    assert rates is not None
    products = ", ".join(f"{dtype} {flops / 1e9:.0f}" for dtype, flops in rates.products.items())
    s2, dense = rates.attention_flops / 1e9, rates.dense_attention_flops / 1e9
    click.echo(
        f"{machine.hardware.describe()}: products in GFLOP/s {products}, S2-Attn {s2:.0f}, "
        f"dense attention {dense:.0f}; memory {rates.bandwidth / 1e9:.0f} GB/s"
    )
    click.echo(_COLUMNS)
    rows = []
    for tokens, adapter, checkpointing, sequence in itertools.product(
        args.tokens, args.adapters, args.checkpointing, args.sequence
    ):
        if sequence > 1 and adapter == "lora":
            continue
        case = RowStep(tokens, adapter, checkpointing == "yes", sequence, args.strategy)
        load = load_average()
        measured = measure(case, base, args.steps)
        plan = make_plan(shape_of(case.recipe, base.config), host(machine, sequence))
        rows.append(asdict(case) | asdict(measured) | {"load": load} | _planned(plan))
        click.echo(_line(case, measured, plan, load))
    write_json(args.json, {"rates": asdict(rates), "rows": rows})


def _planned(plan: Plan) -> dict[str, Any]:
    return {
        "planned_peak_bytes": _peak(plan),
        "planned_halo_bytes": plan.traffic.halo_bytes,
        "planned_step_s": plan.time.step_s,
        "dominant": plan.memory.dominant.name,
    }


def _peak(plan: Plan) -> int:
    """Without a checkpoint, which no run here writes. It is held at every moment."""
    return plan.memory.peak_bytes - sum(item.nbytes for item in plan.memory.items if item.name == CHECKPOINT)


def _line(case: RowStep, measured: Measured, plan: Plan, load: float) -> str:
    peak, halo, time = _peak(plan), plan.traffic.halo_bytes, plan.time.step_s
    return (
        f"{case.label:<32} {measured.peak_bytes / 1e6:>8.0f} {peak / 1e6:>8.0f} {peak / measured.peak_bytes - 1:>+5.0%}"
        f"  {measured.halo_bytes / 1e6:>8.3f} {halo / 1e6:>8.3f}"
        f"  {measured.step_s:>7.1f} {time:>8.1f} {time / measured.step_s - 1:>+5.0%}  {load:.1f}"
    )


if __name__ == "__main__":
    main()
