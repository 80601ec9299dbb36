"""One worker of a recipe in a process of its own: steps on random tokens; prints what they took as JSON.

    python -m jobs.bench.plan_worker HOME RECIPE_JSON NUM_STEPS [RENDEZVOUS RANK]

RENDEZVOUS is a file in which the workers of a recipe find each other, over gloo.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from loray.bases.registry import get_base
from loray.planning.run import Run, run_of
from loray.spec import TrainSpec
from loray.train.batches import Batch, collate
from loray.train.examples import pack_rows
from loray.train.loss import Objective
from loray.train.mesh import Mesh
from loray.train.model import build_model
from loray.train.strategies import prepare


def main(home: Path, spec: TrainSpec, num_steps: int) -> dict[str, float]:
    base, device = get_base(home, spec.base), torch.device("cpu")
    batch = _batch(run_of(spec, base.config))
    mesh = Mesh.build(spec.parallel.sequence, device)
    before = _status("VmRSS")
    model = build_model(base, spec).train()
    strategy = prepare(Objective(model), spec, mesh.world, device)
    _forget_peak()
    seconds = []
    for _ in range(num_steps):
        began = time.perf_counter()
        with mesh.part(batch) as part:
            strategy.forward_backward(part, divisor=batch.num_targets, last=True)
        strategy.step(spec.optimizer.learning_rate)
        seconds.append(time.perf_counter() - began)
    traffic = mesh.sequence.traffic
    return {
        "peak_bytes": _status("VmHWM") - before,
        "step_s": min(seconds),
        "halo_bytes": (traffic.forward_bytes + traffic.backward_bytes) // num_steps,
    }


def _batch(run: Run) -> Batch:
    ids = np.random.default_rng(0).integers(0, run.model.vocab_size, (run.num_rows, run.row_length))
    rows = pack_rows([(row, np.ones(len(row), np.bool_)) for row in ids])
    return collate(rows, tuple((i,) for i in range(run.num_rows)), packed=False)


def _status(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _forget_peak() -> None:
    """VmHWM starts anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    home, recipe, num_steps, *rendezvous = sys.argv[1:]
    spec = TrainSpec.model_validate_json(recipe)
    if rendezvous:
        file, rank = rendezvous
        os.environ["LOCAL_RANK"] = rank  # DeepSpeed asks for it
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=int(rank), world_size=spec.num_workers)
    measured = main(Path(home), spec, int(num_steps))
    sys.stdout.write(json.dumps(measured) + "\n")
    if rendezvous:
        dist.destroy_process_group()
