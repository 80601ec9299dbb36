"""A checkpoint: the adapter as it would be published, and the state from which a run can be resumed.

    adapter/       PEFT's format, in the dtype in which it would be published
    optimizer.pt   OptimizerState: fp32 masters of the trained parameters and AdamW's moments, as full tensors
    state.json     RunState: step, data cursor, counters, evaluations

States of random generators are not saved: every step seeds them from (seed, step, rank). The schedule is a function of
the step. A run with any strategy and number of workers can resume from a checkpoint.
"""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field

from loray.adapters.peft_format import AdapterFiles, write_folder
from loray.errors import IntegrityError, SpecError, TrainingError
from loray.spec import LOSS, DType, Evaluation, Frozen, Sha256, Subject, TrainSpec
from loray.train.optimizer import OptimizerState

ADAPTER = "adapter"
_OPTIMIZER = "optimizer.pt"
# must be equal in a resumed run
_RESUMABLE = (
    *("base", "objective", "quantization", "adapter", "attention", "rope_scaling", "init_adapter"),
    *("data", "batch", "dtype", "seed"),
)


class RunState(Frozen):
    """The state after `step` optimizer steps.

    eval_loss  held-out loss of this checkpoint; None where it was not evaluated
    eval_metrics  the objective's further figures at the same evaluation
    num_stale  evaluations in a row that were not better than the best one before by `early_stopping.min_delta`
    saved_at   when the checkpoint was written: the times of files are lost in a bucket
    parent     digest of the adapter that the run went on from
    dtype_reason  why the recipe's dtype is what it is
    """

    FILE: ClassVar[str] = "state.json"

    recipe: TrainSpec
    base_fingerprint: Sha256
    data_fingerprint: Sha256
    step: int = 0
    epoch: int = 0
    index: int = 0
    skipped_steps: int = 0
    num_tokens: int = 0
    eval_loss: float | None = None
    eval_metrics: dict[str, float] = Field(default_factory=dict)
    best_eval_loss: float | None = None
    num_stale: int = 0
    baselines: tuple[Evaluation, ...] = ()
    row_length: int
    saved_at: datetime | None = None
    parent: Sha256 | None = None
    dtype_reason: str | None = None

    @property
    def progress(self) -> dict[str, int]:
        """What the run reports of itself after each step."""
        counts = {"num_tokens": self.num_tokens, "skipped_steps": self.skipped_steps}
        return {"step": self.step, "epoch": self.epoch, **counts}

    @property
    def is_stale(self) -> bool:
        """Whether the run is to end early."""
        early = self.recipe.early_stopping
        return early is not None and self.num_stale >= early.patience

    def early_stop(self, num_steps: int) -> dict[str, Any]:
        """The event of a run that ends before its `num_steps`."""
        metrics = {"step": self.step, "num_steps": num_steps, "best_eval_loss": self.best_eval_loss}
        return {"event": "early_stop", "num_stale": self.num_stale, **metrics}

    def evaluated(self, loss: float, metrics: dict[str, float]) -> RunState:
        """With the held-out loss of its parameters, which may not be finite, and the objective's further figures."""
        best, early = self.best_eval_loss, self.recipe.early_stopping
        is_better = isfinite(loss) and (best is None or loss < best)
        is_stale = not is_better or (best is not None and early is not None and loss > best - early.min_delta)
        update = {
            "eval_loss": loss if isfinite(loss) else None,
            "eval_metrics": metrics if isfinite(loss) else {},
            "best_eval_loss": loss if is_better else best,
            "num_stale": self.num_stale + 1 if is_stale else 0,
        }
        return self.model_copy(update=update)

    def evaluations(self) -> tuple[Evaluation, ...]:
        """The baselines, and this checkpoint where it was evaluated, for the manifest."""
        if self.eval_loss is None:
            return self.baselines
        measured = {LOSS: self.eval_loss} | self.eval_metrics
        return (*self.baselines, *(evaluation(v, "adapter", self.row_length, m) for m, v in measured.items()))


def evaluation(value: float, subject: Subject, row_length: int, metric: str = LOSS) -> Evaluation:
    """A held-out loss, or another figure of held-out rows, as an Evaluation."""
    return Evaluation(metric=metric, value=value, dataset="held-out", subject=subject, context_length=row_length)


class Snapshot(NamedTuple):
    """A checkpoint to be written, which shares no memory with the model."""

    adapter: AdapterFiles
    optimizer: OptimizerState
    state: RunState


def snapshot(model: Any, optimizer: OptimizerState, state: RunState, dtype: DType) -> Snapshot:
    """`model` has the adapter's modules; the adapter has the masters' values, rounded to `dtype`. DoRA's magnitudes,
    whose steps are smaller than those of 16 bits, stay fp32.
    """
    from loray.adapters.export import adapter_files  # imports PEFT, which reading does not need
    from loray.adapters.inject import is_magnitude

    masters = optimizer.masters.items()
    trained = {name: master if is_magnitude(name) else master.to(getattr(torch, dtype)) for name, master in masters}
    return Snapshot(adapter_files(model, state.recipe.adapter, trained), optimizer, state)


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint; the state comes last."""
    write_folder(folder / ADAPTER, *snapshot.adapter)
    torch.save(snapshot.optimizer._asdict(), folder / _OPTIMIZER)
    saved = snapshot.state.model_copy(update={"saved_at": datetime.now(UTC)})
    (folder / RunState.FILE).write_text(saved.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_optimizer(folder: Path) -> OptimizerState:
    """The optimizer's state, mapped into memory, so that a rank reads its shards alone. Raises IntegrityError."""
    path = folder / _OPTIMIZER
    try:
        return OptimizerState(**torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (OSError, TypeError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise IntegrityError(f"{path} is missing, damaged, or was written by another version of loray") from e


def read_state(folder: Path) -> RunState:
    """Raises IntegrityError where the checkpoint is not complete."""
    path = folder / RunState.FILE
    try:
        return RunState.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as e:
        raise IntegrityError(f"{folder} is not a complete checkpoint: {path.name} is missing or damaged") from e


def check_publishable(state: RunState) -> None:
    """Raise TrainingError where every step was skipped, or the held-out loss of the checkpoint is not finite."""
    if state.skipped_steps >= state.step:
        raise TrainingError(f"every step up to {state.step} was skipped, so there is no adapter; nothing was published")
    if state.baselines and state.eval_loss is None:  # there are baselines where there is held-out data
        raise TrainingError(
            f"the checkpoint of step {state.step} has no finite held-out loss; nothing was published: "
            "go on with --resume, or lower the learning rate and start afresh"
        )


def check_resumable(state: RunState, spec: TrainSpec, base_fingerprint: str, data_fingerprint: str) -> None:
    """Raise SpecError where a run resumed from `state` would be another run. Its length, learning rates and the way
    workers share the work may change.
    """
    theirs, ours = _comparable(state.recipe), _comparable(spec)
    changed = [field for field in _RESUMABLE if getattr(theirs, field) != getattr(ours, field)]
    if state.recipe.micro_batches_per_step != spec.micro_batches_per_step:
        changed.append("a step's micro-batches (batch.accumulation × num_workers ÷ parallel.sequence)")
    if state.base_fingerprint != base_fingerprint:
        changed.append("the base model's weights")
    if state.data_fingerprint != data_fingerprint:
        changed.append("the data files' contents")
    if changed:
        raise SpecError(
            f"cannot resume from step {state.step}: {', '.join(changed)} changed since; "
            "restore the recipe, or start afresh without --resume"
        )


def _comparable(spec: TrainSpec) -> TrainSpec:
    """`spec` without the paths of data files, whose fingerprint is compared, and without accumulation, of which the
    micro-batches per step are compared.
    """
    unnamed = tuple(source.model_copy(update={"path": ""}) for source in spec.data.train_sources)
    data = spec.data.model_copy(update={"train": unnamed, "eval": None})
    return spec.model_copy(update={"data": data, "batch": spec.batch.model_copy(update={"accumulation": 1})})
