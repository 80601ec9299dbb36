"""Held-out loss: mean cross-entropy a target token, with dense attention, whatever attention training uses."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loray.bases.registry import BaseModel
from loray.spec import TrainSpec
from loray.train.batches import collate, plan_evaluation
from loray.train.data_parallel import World
from loray.train.examples import TokenRows
from loray.train.loss import batch_loss
from loray.train.model import dense


@torch.no_grad()
def held_out_loss(model: Any, rows: TokenRows, spec: TrainSpec, *, device: torch.device, world: World) -> float:
    """Σ loss / Σ targets over all rows and ranks; nan where a logit is not finite. Leaves the model training."""
    total, num_targets = 0.0, 0
    model.eval()
    with dense(model):
        for batch in plan_evaluation(rows.lengths.tolist(), spec.batch)[world.rank :: world.size]:
            loss = batch_loss(model, collate(rows, batch, packed=False))
            total += float(loss.total)
            num_targets += loss.num_targets
    model.train()
    total, count = world.sum(total, num_targets, device=device)
    return total / count


def unscaled_base_loss(
    base: BaseModel, rows: TokenRows, spec: TrainSpec, *, device: torch.device, world: World
) -> float:
    """Of the base as it is, with its own RoPE, on the rows that a long-context adapter is judged by."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=getattr(torch, spec.dtype)).to(device)
    return held_out_loss(model, rows, spec, device=device, world=world)
