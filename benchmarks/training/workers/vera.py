"""Training steps of VeRA, loray's and PEFT's, in turn in one process on the same batches; prints JSON.

    python -m benchmarks.training.workers.vera HOME BASE NUM_TOKENS RANK REPEATS

    ours        loray's modules in bf16 with fp32 masters
    peft        PEFT's default: on a bf16 base, pair and vectors are fp32
    peft-bf16   PEFT with pair and vectors in bf16 (`autocast_adapter_dtype=False`)

A batch is one row, and all linear modules of the base are adapted. Initial vectors, loss, clipping and AdamW agree; the
systems differ in the modules and in how they keep the trained vectors.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import VeraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.world import on_this_machine
from loray.bases.registry import BaseModel, get_base
from loray.recommend import recipe_of
from loray.spec import LINEAR_MODULES, VeraSpec
from loray.train.data.batches import TrainBatch, collate, pack_rows
from loray.train.mesh import Mesh
from loray.train.model import BaseWeights, build_model
from loray.train.objectives import batch_loss, objective_of
from loray.train.strategies import prepare

_RATE = 4e-3  # the paper's for instruction tuning

Step = Callable[[TrainBatch], float]  # returns the mean loss before the step


def main(home: Path, name: str, num_tokens: int, rank: int, repeats: int) -> dict[str, Any]:
    """Seconds and losses of each step, by system. The first step of each warms up and has no seconds."""
    base = get_base(home, name)
    steps = {
        "ours": _ours(base, num_tokens, rank),
        "peft": _pefts(base, rank, in_bf16=False),
        "peft-bf16": _pefts(base, rank, in_bf16=True),
    }
    seconds: dict[str, list[float]] = {system: [] for system in steps}
    losses: dict[str, list[float]] = {system: [] for system in steps}
    for i in range(repeats + 1):
        batch = _batch(base.config.vocab_size, num_tokens, seed=i)
        for system, step in steps.items():
            began = time.perf_counter()
            losses[system].append(step(batch))
            if i:
                seconds[system].append(time.perf_counter() - began)
    return {"seconds": seconds, "losses": losses}


def _ours(base: BaseModel, num_tokens: int, rank: int) -> Step:
    adapter = VeraSpec.model_validate({"rank": rank, "target_modules": LINEAR_MODULES})
    spec = on_this_machine(recipe_of(adapter, num_tokens))
    mesh = Mesh.build(1, torch.device("cpu"))
    model, weights = build_model(base, spec).train(), BaseWeights(base, spec.chosen_dtype)
    strategy = prepare(objective_of(model, spec), spec, mesh.world, torch.device("cpu"), weights)

    def step(batch: TrainBatch) -> float:
        loss = strategy.forward_backward(batch, totals={"targets": batch.num_targets}, last=True)
        strategy.step(_RATE)
        return loss

    return step


def _pefts(base: BaseModel, rank: int, *, in_bf16: bool) -> Step:
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = VeraConfig(r=rank, target_modules=list(LINEAR_MODULES), projection_prng_key=0, save_projection=False)
        wrapped = get_peft_model(plain, config, autocast_adapter_dtype=not in_bf16)
    if in_bf16:
        wrapped.to(torch.bfloat16)
    model: Any = wrapped.base_model.model.train()
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0)

    def step(batch: TrainBatch) -> float:
        adam.zero_grad()
        loss = batch_loss(model, batch) / batch.num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        return float(loss.detach())

    return step


def _batch(vocab_size: int, num_tokens: int, seed: int) -> TrainBatch:
    """One row of tokens with frequencies like those of text, so that the loss can fall."""
    ids = np.random.default_rng(seed).zipf(1.3, num_tokens) % vocab_size
    return collate(pack_rows([(ids, np.ones(num_tokens, np.bool_))]), ((0,),), packed=False)


if __name__ == "__main__":
    home, name, *numbers = sys.argv[1:]
    sys.stdout.write(json.dumps(main(Path(home), name, *map(int, numbers))) + "\n")
