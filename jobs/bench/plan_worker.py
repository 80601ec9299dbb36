"""Steps of one recipe in a process of its own, on random tokens; prints what they took as JSON.

    python -m jobs.bench.plan_worker HOME RECIPE_JSON NUM_STEPS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from loray.bases.registry import get_base
from loray.planning.run import run_of
from loray.spec import TrainSpec
from loray.train.batches import collate
from loray.train.examples import pack_rows
from loray.train.loss import Objective
from loray.train.mesh import World
from loray.train.model import build_model
from loray.train.strategies import prepare


def main(home: Path, spec: TrainSpec, num_steps: int) -> dict[str, float]:
    base = get_base(home, spec.base)
    run = run_of(spec, base.config)
    ids = np.random.default_rng(0).integers(0, base.config.vocab_size, (run.num_rows, run.row_length))
    rows = pack_rows([(row, np.ones(len(row), np.bool_)) for row in ids])
    batch = collate(rows, [(i,) for i in range(run.num_rows)], packed=False)
    before = _status("VmRSS")
    model = build_model(base, spec).train()
    strategy = prepare(Objective(model), spec, World.current(), torch.device("cpu"), None)
    _forget_peak()
    seconds = []
    for _ in range(num_steps):
        began = time.perf_counter()
        strategy.forward_backward(batch, divisor=batch.num_targets, last=True)
        strategy.step(spec.optimizer.learning_rate, loss_is_finite=True)
        seconds.append(time.perf_counter() - began)
    return {"peak_bytes": _status("VmHWM") - before, "step_s": min(seconds)}


def _status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _forget_peak() -> None:
    """VmHWM starts anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    _, home, recipe, num_steps = sys.argv
    measured = main(Path(home), TrainSpec.model_validate_json(recipe), int(num_steps))
    sys.stdout.write(json.dumps(measured) + "\n")
