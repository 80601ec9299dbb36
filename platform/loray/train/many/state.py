"""Snapshots of many adapters in training: what each needs to go on, in one folder.

states.safetensors  of each adapter that has not ended (3, P): fp32 masters and AdamW's moments, its tensors one
                    after the other in the order of its parameters; and its best masters (P,)
cohort.json         CohortState: the round, and of each adapter its RunState, its updates, and how it has ended
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loray.errors import IntegrityError, SpecError
from loray.spec import Frozen
from loray.train.checkpoint import RunState
from loray.train.optimizer import OptimizerState

_STATES = "states.safetensors"
_BEST = "best:"  # before an adapter's name, which has no colon


class AdapterState(Frozen):
    """One adapter's: `best` is the state at which its best weights were kept; None where there are none."""

    state: RunState
    num_updates: int
    best: RunState | None


class CohortState(Frozen):
    FILE: ClassVar[str] = "cohort.json"

    round: int
    adapters: dict[str, AdapterState]


class Snapshot(NamedTuple):
    """`tensors` are those of `states.safetensors`, which share no memory with a bank."""

    cohort: CohortState
    tensors: Mapping[str, Tensor]


def add(tensors: dict[str, Tensor], name: str, optimizer: OptimizerState, best_P: Tensor | None) -> None:
    """Add an adapter's tensors to those of a snapshot."""
    tensors[name] = torch.stack([flat(values) for values in optimizer[:3]])
    if best_P is not None:
        tensors[_BEST + name] = best_P


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot; the states of adapters come last."""
    save_file(dict(snapshot.tensors), folder / _STATES)
    text = snapshot.cohort.model_dump_json() + "\n"
    (folder / CohortState.FILE).write_text(text, encoding="utf-8")


def read_cohort(folder: Path) -> CohortState:
    """Read what a snapshot says of its adapters. Raises IntegrityError where it is not complete."""
    path = folder / CohortState.FILE
    try:
        return CohortState.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as e:
        raise IntegrityError(f"{folder} is not a complete snapshot: {path.name} is missing or damaged") from e


class Weights(NamedTuple):
    optimizer: OptimizerState
    best_P: Tensor | None


def read_weights(folder: Path, name: str, saved: AdapterState, like: Mapping[str, Tensor]) -> Weights:
    """Read one adapter's weights, whose parameters have the names and shapes of `like`.

    Raises IntegrityError where they are missing, and SpecError where the snapshot's adapter has other parameters.
    """
    path = folder / _STATES
    try:
        with safe_open(path, framework="pt") as file:
            states_3P = file.get_tensor(name)
            best_P = file.get_tensor(_BEST + name) if saved.best is not None else None
    except (OSError, SafetensorError) as e:
        raise IntegrityError(f"{path} is missing, damaged, or has no adapter {name}") from e
    if states_3P.shape != (3, sum(tensor.numel() for tensor in like.values())):
        raise SpecError(f"the snapshot's {name} has other parameters than its recipe; start afresh, without --resume")
    masters, exp_avg, exp_avg_sq = (split(flat_P, like) for flat_P in states_3P)
    return Weights(OptimizerState(masters, exp_avg, exp_avg_sq, saved.num_updates), best_P)


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """Copy tensors into one on the CPU, (P,), in their order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in values.values()]).cpu()


def split(flat_P: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take apart what `flat` has made of tensors like these."""
    parts = flat_P.split_with_sizes([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(like.items(), parts, strict=True)}
