"""Held-out loss: mean cross-entropy per target token, with dense attention also where training uses S2-Attn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loray.bases.registry import BaseModel
from loray.spec import TrainSpec
from loray.train.data.batches import collate, plan_evaluation
from loray.train.data.examples import TokenRows
from loray.train.mesh import Mesh
from loray.train.model import dense


@torch.no_grad()
def held_out_loss(
    model: Any, objective: nn.Module, rows: TokenRows, spec: TrainSpec, *, device: torch.device, mesh: Mesh
) -> float:
    """Σ loss / Σ targets over all rows and ranks; nan where a logit is not finite. Leaves the model in training mode.

    `objective` is the strategy's module that computes a batch's loss with `model`. Every rank calls it equally often: a
    rank without a batch repeats the last one, and does not count it.
    """
    batches = plan_evaluation(rows.lengths.tolist(), spec.batch)
    total, num_targets = 0.0, 0
    objective.eval()
    with dense(model, mesh.sequence):
        for first in range(0, len(batches), mesh.data_size):
            mine = first + mesh.data_rank
            with mesh.part(collate(rows, batches[min(mine, len(batches) - 1)], packed=False)) as part:
                loss = float(objective(part))
            if mine < len(batches):
                total += loss
                num_targets += part.num_targets
    objective.train()
    total, count = mesh.world.sum(total, num_targets, device=device)
    return total / count


@contextmanager
def unscaled(model: Any, base: BaseModel) -> Iterator[None]:
    """The base's RoPE inside the block: an untrained model then computes as the base does."""
    inner = model.base_model
    scaled = inner.rotary_emb
    config = copy.deepcopy(model.config)
    config.rope_parameters = base.config.rope.to_hf()
    inner.rotary_emb = type(scaled)(config).to(scaled.inv_freq.device)
    try:
        yield
    finally:
        inner.rotary_emb = scaled
