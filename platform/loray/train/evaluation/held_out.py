"""Held-out loss: mean cross-entropy per target token, with dense attention also where training uses S2-Attn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import nn

from loray.bases.registry import BaseModel
from loray.errors import TrainingError
from loray.spec import Subject, TrainSpec
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


def measure_baselines(
    model: Any, base: BaseModel, spec: TrainSpec, measure: Callable[[], float]
) -> Iterator[tuple[Subject, float]]:
    """What the model is before training, and its held-out loss, which `measure` finds. An untrained adapter does not
    change the base, which is base_scaled under scaled RoPE; a run that goes on from an adapter starts at its parent.

    Raises TrainingError for a loss that is not finite.
    """
    if spec.init_adapter is not None:
        yield "parent", _finite(measure(), "parent", spec)
        return
    if spec.rope_scaling is not None:
        with unscaled(model, base):
            loss = measure()
        yield "base", _finite(loss, "base", spec)
    subject: Subject = "base" if spec.rope_scaling is None else "base_scaled"
    yield subject, _finite(measure(), subject, spec)


def _finite(loss: float, subject: Subject, spec: TrainSpec) -> float:
    if not isfinite(loss):
        raise TrainingError(
            f"the held-out loss of {subject} is {loss} before any training; "
            f"check the base model and the data, or train in float32 (dtype is {spec.dtype})"
        )
    return loss


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
