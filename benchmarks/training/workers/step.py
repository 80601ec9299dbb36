"""One worker of a recipe: training steps on random tokens; prints memory, traffic and time as JSON.

    python -m benchmarks.training.workers.step HOME RECIPE_JSON NUM_STEPS [--dense] [--tensors]
        [--rendezvous FILE --rank RANK]

The workers of a recipe connect through FILE, over gloo. The first step, over a short row, is not counted; it allocates
gradients, moments and the buffers of libraries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.world import peak_bytes, reset_peak, resident_bytes
from loray.bases.registry import get_base
from loray.planning.run import shape_of
from loray.spec import TrainSpec
from loray.train.data.batches import TrainBatch, collate, pack_rows
from loray.train.hooks import DENSE
from loray.train.mesh import Mesh
from loray.train.model import BaseWeights, build_model
from loray.train.objectives import objective_of
from loray.train.strategies import prepare

_SHORT_ROW = 64  # tokens of a rank


def main(
    home: Path, spec: TrainSpec, num_steps: int, *, is_dense: bool = False, watch_tensors: bool = False
) -> dict[str, float]:
    """The fields of `benchmarks.training.steps.Measured`; `activation_bytes` only with `watch_tensors`."""
    base, device = get_base(home, spec.base), torch.device("cpu")
    run = shape_of(spec, base.config)
    mesh = Mesh.build(spec.parallel.sequence, device)
    before = resident_bytes()
    model = build_model(base, spec).train()
    if is_dense:
        model.set_attn_implementation(DENSE)
    strategy = prepare(objective_of(model, spec), spec, mesh.world, device, BaseWeights(base, spec.chosen_dtype))

    def step(batch: TrainBatch) -> float:
        began = time.perf_counter()
        with mesh.part(batch) as part:
            strategy.forward_backward(part, totals={"targets": batch.num_targets}, last=True)
        strategy.step(spec.optimizer.learning_rate)
        return time.perf_counter() - began

    vocab_size, traffic = run.model.vocab_size, mesh.sequence.traffic
    step(_batch(vocab_size, run.num_rows, min(run.row_length, _SHORT_ROW * spec.parallel.sequence)))
    sent = traffic.forward_bytes + traffic.backward_bytes
    reset_peak()
    batch = _batch(vocab_size, run.num_rows, run.row_length)
    seconds = [step(batch) for _ in range(num_steps)]
    measured = {
        "peak_bytes": peak_bytes() - before,
        "step_s": min(seconds),
        "halo_bytes": (traffic.forward_bytes + traffic.backward_bytes - sent) // num_steps,
    }
    return measured | {"activation_bytes": peak_of_tensors(lambda: step(batch)) if watch_tensors else 0}


def peak_of_tensors(work: Callable[[], object]) -> int:
    """The largest number of bytes that torch's allocator had given out during `work`, above that before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as found:
        work()
    events = found.profiler.kineto_results.events()
    live = itertools.accumulate(int(event.nbytes()) for event in events if event.name() == "[memory]")
    return max(0, *live)


def _batch(vocab_size: int, num_rows: int, row_length: int) -> TrainBatch:
    ids = np.random.default_rng(0).integers(0, vocab_size, (num_rows, row_length))
    rows = pack_rows([(row, np.ones(len(row), np.bool_)) for row in ids])
    return collate(rows, tuple((i,) for i in range(num_rows)), packed=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("recipe", type=TrainSpec.model_validate_json)
    parser.add_argument("num_steps", type=int)
    parser.add_argument("--dense", action="store_true", help="dense attention instead of the recipe's")
    parser.add_argument("--tensors", action="store_true", help="measure the size of all tensors in one more step")
    parser.add_argument("--rendezvous")
    parser.add_argument("--rank", type=int)
    args = parser.parse_args()
    if args.rendezvous:
        os.environ["LOCAL_RANK"] = str(args.rank)  # DeepSpeed reads it
        where = f"file://{args.rendezvous}"
        dist.init_process_group("gloo", init_method=where, rank=args.rank, world_size=args.recipe.num_workers)
    measured = main(args.home, args.recipe, args.num_steps, is_dense=args.dense, watch_tensors=args.tensors)
    sys.stdout.write(json.dumps(measured) + "\n")
    if args.rendezvous:
        dist.destroy_process_group()
