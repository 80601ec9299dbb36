"""Held-out loss: the objective on rows not trained on, with dense attention also where training uses S2-Attn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import nn

from loray.bases.registry import BaseModel
from loray.errors import TrainingError
from loray.spec import Subject, TrainSpec
from loray.train.data.batches import collate, collate_pairs
from loray.train.data.examples import TokenRows
from loray.train.data.plans import pair_lengths, plan_evaluation
from loray.train.loss import Objective
from loray.train.mesh import Mesh
from loray.train.model import dense


class HeldOut(NamedTuple):
    """`loss` is the mean over terms (targets, or pairs), nan where a logit is not finite; `metrics` are the
    objective's further figures.
    """

    loss: float
    metrics: dict[str, float]


@torch.no_grad()
def held_out_loss(
    objective: Objective, compute: nn.Module, rows: TokenRows, spec: TrainSpec, *, device: torch.device, mesh: Mesh
) -> HeldOut:
    """The mean loss over all rows and ranks. Leaves the model in training mode.

    `compute` is the strategy's module that computes a batch's loss by `objective`. Every rank calls it equally often: a
    rank without a batch repeats the last one, and does not count it.
    """
    lengths = pair_lengths(rows.lengths) if spec.is_paired else rows.lengths
    batches = plan_evaluation(lengths, spec.batch)
    total, num_terms = 0.0, 0
    sums = [0.0] * len(objective.METRICS)
    compute.eval()
    with dense(objective.model, mesh.sequence):
        for first in range(0, len(batches), mesh.data_size):
            mine = first + mesh.data_rank
            planned = batches[min(mine, len(batches) - 1)]
            whole = collate_pairs(rows, planned) if spec.is_paired else collate(rows, planned, packed=False)
            with mesh.part(whole) as part:
                loss = float(compute(part))
            taken = objective.take()
            if mine < len(batches):
                total += loss
                num_terms += part.num_terms
                sums = [a + b for a, b in zip(sums, taken, strict=True)]
    compute.train()
    total, count, *sums = mesh.world.sum(total, num_terms, *sums, device=device)
    return HeldOut(total / count, {name: s / count for name, s in zip(objective.METRICS, sums, strict=True)})


def measure_baselines(
    model: Any, base: BaseModel, spec: TrainSpec, measure: Callable[[], HeldOut]
) -> Iterator[tuple[Subject, HeldOut]]:
    """What the model is before training, and its held-out loss, which `measure` finds. An untrained adapter does not
    change the base, which is base_scaled under scaled RoPE; a run that goes on from an adapter starts at its parent.

    Raises TrainingError for a loss that is not finite.
    """
    if spec.init_adapter is not None:
        yield "parent", _finite(measure(), "parent", spec)
        return
    if spec.rope_scaling is not None:
        with unscaled(model, base):
            measured = measure()
        yield "base", _finite(measured, "base", spec)
    subject: Subject = "base" if spec.rope_scaling is None else "base_scaled"
    yield subject, _finite(measure(), subject, spec)


def _finite(measured: HeldOut, subject: Subject, spec: TrainSpec) -> HeldOut:
    if not isfinite(measured.loss):
        raise TrainingError(
            f"the held-out loss of {subject} is {measured.loss} before any training; "
            f"check the base model and the data, or train in float32 (dtype is {spec.dtype})"
        )
    return measured


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
