"""Snapshots of many adapters in training: what each needs to go on, in one folder.

NAME.safetensors  of each adapter that goes on: `states` (3, P), its fp32 masters and AdamW's moments, its tensors
                  one after the other in the order of its parameters; and `best` (P,), its best masters
cohort.json       CohortState: the round, and of each of these adapters its RunState and the number of its updates
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loray.errors import IntegrityError, SpecError
from loray.spec import Frozen
from loray.train.checkpoint import RunState
from loray.train.optimizer import OptimizerState

_STATES, _BEST, _INITIAL = "states", "best", "initial:"


class AdapterState(Frozen):
    """One adapter's: `best` is the state at which its best weights were kept; None where there are none."""

    state: RunState
    num_updates: int
    best: RunState | None


class CohortState(Frozen):
    FILE: ClassVar[str] = "cohort.json"

    round: int
    adapters: dict[str, AdapterState]


class Weights(NamedTuple):
    """`best_P`: masters of the best evaluation; None where there are none."""

    optimizer: OptimizerState
    best_P: Tensor | None


def write_weights(folder: Path, name: str, weights: Weights) -> None:
    """Write one adapter's weights to a snapshot."""
    tensors = {_STATES: torch.stack([flat(values) for values in weights.optimizer[:3]])}
    if weights.best_P is not None:
        tensors[_BEST] = weights.best_P
    tensors |= {_INITIAL + key: tensor for key, tensor in (weights.optimizer.initial or {}).items()}
    save_file(tensors, _file(folder, name))


def write_cohort(folder: Path, cohort: CohortState) -> None:
    """Write what makes a snapshot whole, after the weights of its adapters."""
    text = cohort.model_dump_json() + "\n"
    (folder / CohortState.FILE).write_text(text, encoding="utf-8")


def read_cohort(folder: Path) -> CohortState:
    """Read what a snapshot says of its adapters. Raises IntegrityError where it is not complete."""
    path = folder / CohortState.FILE
    try:
        return CohortState.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as e:
        raise IntegrityError(f"{folder} is not a complete snapshot: {path.name} is missing or damaged") from e


def read_weights(folder: Path, name: str, saved: AdapterState, like: Mapping[str, Tensor]) -> Weights:
    """Read one adapter's weights, whose parameters have the names and shapes of `like`.

    Raises IntegrityError where they are missing, and SpecError where the snapshot's adapter has other parameters.
    """
    path = _file(folder, name)
    try:
        tensors = load_file(path)
        states_3P, best_P = tensors[_STATES], tensors.get(_BEST)
    except (OSError, KeyError, SafetensorError) as e:
        raise IntegrityError(f"{path} is missing or damaged: go on from the snapshot before") from e
    if states_3P.shape != (3, sum(tensor.numel() for tensor in like.values())):
        raise SpecError(f"the snapshot's {name} has other parameters than its recipe; start afresh, without --resume")
    masters, exp_avg, exp_avg_sq = (split(flat_P, like) for flat_P in states_3P)
    initial = {key.removeprefix(_INITIAL): t for key, t in tensors.items() if key.startswith(_INITIAL)}
    return Weights(OptimizerState(masters, exp_avg, exp_avg_sq, saved.num_updates, initial), best_P)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """Copy tensors into one on the CPU, (P,), in their order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in values.values()]).cpu()


def split(flat_P: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take apart what `flat` has made of tensors like these."""
    parts = flat_P.split_with_sizes([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(like.items(), parts, strict=True)}
