"""Checkpoints: the adapter as it would be published, the state from which a run goes on, and when both are written.

    adapter/       PEFT's format, in the dtype in which it would be published
    optimizer.pt   OptimizerState: fp32 masters of the trained parameters and AdamW's moments, as full tensors
    state.json     RunState: step, data cursor, counters, evaluations

States of random generators are not saved: every step seeds them from (seed, step, rank). The schedule is a function of
the step. A run with any strategy and number of workers can resume from a checkpoint. Reading one does not load PEFT.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from loray.adapters.peft_format import PREFIX, ROWS_SUFFIX, AdapterFiles, write_folder
from loray.errors import IntegrityError, SpecError, TrainingError
from loray.methods import keeps_fp32, method_of
from loray.methods.expert_lora import peft_targets
from loray.spec import (
    LOSS,
    AdapterSpec,
    CheckpointSpec,
    DType,
    Evaluation,
    Frozen,
    Sha256,
    Subject,
    TrainSpec,
)
from loray.train.mesh import World
from loray.train.optimizer import OptimizerState

if TYPE_CHECKING:
    from peft import PeftConfig


ADAPTER = "adapter"
OPTIMIZER = "optimizer.pt"
_RESUMABLE = (  # must be equal in a resumed run
    *("base", "objective", "quantization", "adapter", "attention", "rope_scaling", "init_adapter"),
    *("data", "batch", "dtype", "seed"),
)


class RunState(Frozen):
    """The state after `step` optimizer steps.

    eval_loss     held-out loss of this checkpoint; None where it was not evaluated
    eval_metrics  the objective's further figures at the same evaluation
    num_stale     evaluations in a row that were not better than the best one before by `early_stopping.min_delta`
    saved_at      when the checkpoint was written: the times of files are lost in a bucket
    parent        digest of the adapter that the run went on from
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
        """The counters that each step reports."""
        counts = {"num_tokens": self.num_tokens, "skipped_steps": self.skipped_steps}
        return {"step": self.step, "epoch": self.epoch, **counts}

    @property
    def is_stale(self) -> bool:
        """True where the run is to end early."""
        early = self.recipe.early_stopping
        return early is not None and self.num_stale >= early.patience

    def stepped(self, epoch: int, index: int, *, num_tokens: int, skipped: bool) -> RunState:
        """Add a step after which the data's cursor is (`epoch`, `index`)."""
        update: dict[str, Any] = {
            "step": self.step + 1,
            "epoch": epoch,
            "index": index,
            "skipped_steps": self.skipped_steps + skipped,
            "num_tokens": self.num_tokens + num_tokens,
            "eval_loss": None,
            "eval_metrics": {},
        }
        return self.model_copy(update=update)

    def gave_up(self, num_skipped: int) -> str:
        """Say why a run ends that has skipped so many steps in this process."""
        return (
            f"stopped at step {self.step}: {num_skipped} steps had a loss or gradient that is not finite "
            f"(max_nonfinite_steps is {self.recipe.max_nonfinite_steps}); lower the learning rate or look at the data, "
            "then go on from the last good checkpoint with --resume"
        )

    def check_end(self, evaluated: bool) -> None:
        """Raise TrainingError where all steps were skipped, or neither the last nor the best loss is finite."""
        if self.skipped_steps == self.step:
            raise TrainingError("every step had a loss or gradient that is not finite; look at the data and the base")
        best_is_kept = self.recipe.evaluation.keep_best and self.best_eval_loss is not None
        if evaluated and self.eval_loss is None and not best_is_kept:
            raise TrainingError("the held-out loss after the last step is not finite; lower the learning rate")

    def early_stop(self, num_steps: int) -> dict[str, Any]:
        """Make the event of a run that ends before its `num_steps`."""
        metrics = {"step": self.step, "num_steps": num_steps, "best_eval_loss": self.best_eval_loss}
        return {"event": "early_stop", "num_stale": self.num_stale, **metrics}

    def evaluated(self, loss: float, metrics: dict[str, float]) -> RunState:
        """Add the held-out loss of the parameters, which may not be finite, and the objective's further figures."""
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
        """List the baselines, and this checkpoint where it was evaluated, for the manifest."""
        if self.eval_loss is None:
            return self.baselines
        measured = {LOSS: self.eval_loss} | self.eval_metrics
        return (*self.baselines, *(evaluation(v, "adapter", self.row_length, m) for m, v in measured.items()))


def evaluation(value: float, subject: Subject, row_length: int, metric: str = LOSS) -> Evaluation:
    """Make an Evaluation of a held-out loss, or of another figure of held-out rows."""
    return Evaluation(metric=metric, value=value, dataset="held-out", subject=subject, context_length=row_length)


def baseline(loss: float, subject: Subject, state: RunState) -> Evaluation:
    """Make the Evaluation of the model before any training. Raises TrainingError for a loss that is not finite."""
    if not isfinite(loss):
        raise TrainingError(
            f"the held-out loss of {subject} is {loss} before any training; "
            f"check the base model and the data, or train in float32 (dtype is {state.recipe.dtype})"
        )
    return evaluation(loss, subject, state.row_length)


# -- files ------------------------------------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """A checkpoint to be written, which shares no memory with the model."""

    adapter: AdapterFiles
    optimizer: OptimizerState
    state: RunState


def snapshot(model: Any, optimizer: OptimizerState, state: RunState, dtype: DType) -> Snapshot:
    """Take a checkpoint of `model`, whose adapter gets the masters' values, rounded to `dtype`."""
    from loray.methods.attach import initial_values  # it imports PEFT

    masters = optimizer.masters.items()
    trained = {name: master if keeps_fp32(name) else master.to(getattr(torch, dtype)) for name, master in masters}
    initial = {name: buffer.detach().to("cpu", copy=True) for name, buffer in initial_values(model)}
    files = adapter_files(model, state.recipe.adapter, trained)
    return Snapshot(files, optimizer._replace(initial=initial), state)


def write(folder: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint; the state comes last."""
    write_folder(folder / ADAPTER, *snapshot.adapter)
    write_states(folder, snapshot.optimizer, snapshot.state)


def write_states(folder: Path, optimizer: OptimizerState | None, state: RunState) -> None:
    """Write what a checkpoint has beside its adapter; nothing goes on from one without an optimizer's state."""
    if optimizer is not None:
        torch.save(optimizer._asdict(), folder / OPTIMIZER)
    saved = state.model_copy(update={"saved_at": datetime.now(UTC)})
    (folder / RunState.FILE).write_text(saved.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_optimizer(folder: Path) -> OptimizerState:
    """Map the optimizer's state into memory, so that a rank reads its shards alone. Raises IntegrityError."""
    path = folder / OPTIMIZER
    try:
        return OptimizerState(**torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (OSError, TypeError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise IntegrityError(f"{path} is missing, damaged, or was written by another version of loray") from e


def read_state(folder: Path) -> RunState:
    """Read the run's state. Raises IntegrityError where the checkpoint is not complete."""
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


# -- PEFT's format ----------------------------------------------------------------------------------------------------

_INDEX_NBYTES = 16  # of one token id as a line of the configuration


def save_adapter(model: Any, spec: AdapterSpec, folder: Path, *, trained: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter that `attach` put into `model` to `folder`, in PEFT's format.

    `trained` has the full values of the trained parameters by name, for a model that holds only shards of them.
    """
    if trained is None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    write_folder(folder, *adapter_files(model, spec, trained))


def adapter_files(model: Any, spec: AdapterSpec, trained: Mapping[str, Tensor]) -> AdapterFiles:
    """Make the files of `save_adapter`. The tensors are those of `trained`, and VeRA's pair.

    The base's name is the last part of `model.config.name_or_path`. An input embedding that is not tied to the output
    head is saved as its changed rows (PEFT's `trainable_token_indices`) where that is smaller.
    """
    from loray.methods.attach import on_model, trained_norms  # they import PEFT

    return files_with(model, on_model(model, spec), trained, trained_norms(model))


def files_with(model: Any, spec: AdapterSpec, trained: Mapping[str, Tensor], norms: Sequence[str]) -> AdapterFiles:
    """Make the files of `save_adapter` of a `spec` that names the modules of `model`, and of these trained norms."""
    from loray.methods.attach import peft_name  # it imports PEFT

    method = method_of(spec)
    published = method.published(spec, model, {peft_name(name): t for name, t in trained.items()})
    tensors = {PREFIX + name: t for name, t in published.items()}
    token_ids = _replace_embedding_by_rows(model, spec, tensors)
    modules_to_save = [*norms]
    if token_ids is None and model.get_input_embeddings().weight.requires_grad:
        modules_to_save.append("embed_tokens")
    tensors |= method.stored_beside(spec, model)
    options: dict[str, Any] = {
        "modules_to_save": modules_to_save or None,
        "base_model_name_or_path": PurePath(model.config.name_or_path).name,
        "inference_mode": True,
    }
    if token_ids is not None:
        options["trainable_token_indices"] = token_ids
    if method.adapts_experts:
        options |= peft_targets(spec, model)
    return AdapterFiles(_fields(method.peft_config(spec, **options)), tensors)


def _replace_embedding_by_rows(model: Any, spec: AdapterSpec, tensors: dict[str, Tensor]) -> list[int] | None:
    """Replace the dense embedding in `tensors` by its changed rows, and return their token ids. None where the
    embedding stays dense.
    """
    from loray.methods.attach import BASE_ROWS  # it imports PEFT

    embedding = model.get_input_embeddings()
    base_VD = getattr(embedding, BASE_ROWS, None)
    if base_VD is None or not method_of(spec).keeps_embedding_rows:  # tied: PEFT would change the head too
        return None
    name = PREFIX + next(name for name, p in model.named_parameters() if p is embedding.weight)
    weight_VD = tensors[name].detach()
    changed = (weight_VD != base_VD.to(weight_VD.device)).any(dim=1).nonzero().squeeze(1)
    row_nbytes = weight_VD[0].nbytes
    if not len(changed) or len(changed) * (row_nbytes + _INDEX_NBYTES) >= weight_VD.nbytes:
        return None
    del tensors[name]
    tensors[name.removesuffix(".weight") + ROWS_SUFFIX] = weight_VD[changed]
    return [int(i) for i in changed]


def _fields(config: PeftConfig) -> dict[str, Any]:
    """The fields of `config` with sets sorted: PEFT writes them in the order of their hashes, which varies."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


# -- reports and their times ------------------------------------------------------------------------------------------

Metrics = dict[str, Any]


class Reporter(Protocol):
    """Takes the events and checkpoints of a run."""

    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        """Every rank makes the same calls, but for those that tell how far a stage is. `metrics["event"]` is start,
        step, eval, early_stop, progress or checkpoint.

        `checkpoint` is a folder on rank 0, which the loop deletes after the call: move or copy its files.
        """


class SavedCheckpoint(NamedTuple):
    path: Path
    step: int
    eval_loss: float | None


class FolderReporter:
    """Collects events in `events`, and keeps checkpoints as `folder/step_000010`: the `keep` best, and the latest."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep
        self.events: list[Metrics] = []
        self.checkpoints: list[SavedCheckpoint] = []

    def report(self, metrics: Metrics, checkpoint: Path | None) -> None:
        self.events.append(metrics)
        if checkpoint is None:
            return
        path = self._folder / f"step_{metrics['step']:06d}"
        shutil.copytree(checkpoint, path)
        latest = SavedCheckpoint(path, metrics["step"], metrics.get("eval_loss"))
        self.checkpoints.append(latest)
        for old in self._ranked()[self._keep :]:
            if old != latest:
                shutil.rmtree(old.path)
                self.checkpoints.remove(old)

    @property
    def best(self) -> SavedCheckpoint:
        """The checkpoint with the lowest evaluation loss; the latest where none was evaluated. Raises IndexError where
        there is none.
        """
        return self._ranked()[0]

    def _ranked(self) -> list[SavedCheckpoint]:
        return sorted(self.checkpoints, key=lambda c: (float("inf") if c.eval_loss is None else c.eval_loss, -c.step))


Clock = Callable[[], float]
Leaving = Callable[[], frozenset[str]]  # machines of the run that will be taken away soon
WRITTEN = "written-"  # before the step in the name of a checkpoint that is whole, and not reported yet
_UNDER_WAY, _WRITTEN, _FAILED = 0.0, 1.0, 2.0


class Signals(NamedTuple):
    """Rank 0 tells the others these in a sum that they take anyway; the others add zeros.

    overdue  1 where the last checkpoint was begun `interval_minutes` ago or earlier, or before it was known that a
             machine will be taken away
    status   of the checkpoint that is being written
    """

    overdue: float = 0.0
    status: float = _UNDER_WAY


class _Pending(NamedTuple):
    """A checkpoint that is not reported yet. `written` is the folder to come, None on ranks that write none."""

    metrics: Metrics
    written: Future[Path] | None


class Checkpoints:
    """Writes one checkpoint at a time, in a thread of rank 0; the next one waits for it.

    A checkpoint is reported, on all ranks at the same step, once it is written. All ranks make the same calls.
    """

    def __init__(
        self,
        spec: CheckpointSpec,
        reporter: Reporter,
        workdir: Path,
        world: World,
        device: torch.device,
        clock: Clock = time.monotonic,
        leaving: Leaving = frozenset,
    ) -> None:
        minutes = spec.interval_minutes
        self._interval_s = float("inf") if minutes is None else 60 * minutes
        self._reporter, self._workdir, self._world, self._device = reporter, workdir, world, device
        self._clock, self._begun_at = clock, clock()
        self._leaving, self._left = leaving, frozenset[str]()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    def signals(self) -> Signals:
        if self._world.rank:
            return Signals()
        is_due = self._clock() - self._begun_at >= self._interval_s or bool(self._leaving() - self._left)
        return Signals(float(is_due), self._status())

    def take(self, status: float) -> None:
        """Report the checkpoint under way if it is written. `status` is the sum over ranks of the signal.

        Raises TrainingError, on all ranks, where it could not be written.
        """
        pending = self._pending
        if pending is None or status == _UNDER_WAY:
            return
        self._pending = None
        if status == _FAILED:
            error = None if pending.written is None else str(pending.written.exception())
            (reason, *_) = self._world.gather(error)
            raise TrainingError(
                f"the checkpoint of step {pending.metrics['step']} could not be written to {self._workdir}: {reason}; "
                "see that there is space and that it may be written to, then go on from the checkpoint before with "
                "--resume"
            )
        folder = None if pending.written is None else pending.written.result()
        try:
            self._reporter.report(pending.metrics, folder)
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def begin(self, write: Callable[[Path], None] | None, *, step: int, eval_loss: float | None) -> None:
        """Start to `write` a folder, which only rank 0 does. The checkpoint before must be finished."""
        assert self._pending is None, "the checkpoint before is finished"
        self._begun_at = self._clock()
        if not self._world.rank:
            self._left |= self._leaving()
        metrics: dict[str, Any] = {"event": "checkpoint", "step": step, "eval_loss": eval_loss}
        written = None if write is None else self._thread.submit(self._write, write, step)
        self._pending = _Pending(metrics, written)

    def finish(self) -> None:
        """Wait until the checkpoint under way is written, and report it. Raises as `take` does."""
        if self._pending is None:
            return
        if self._pending.written is not None:
            self._pending.written.exception()  # waits
        (status,) = self._world.sum(self._status(), device=self._device)
        self.take(status)

    def close(self) -> None:
        """Wait for the thread. A checkpoint that it has written and that is not reported stays in the folder."""
        self._thread.shutdown()

    def _status(self) -> float:
        written = None if self._pending is None else self._pending.written
        if written is None or not written.done():
            return _UNDER_WAY
        return _WRITTEN if written.exception() is None else _FAILED

    def _write(self, write: Callable[[Path], None], step: int) -> Path:
        """A folder gets its name when it is whole: a worker that replaces a lost one may use it."""
        partial = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self._workdir))
        try:
            write(partial)
            return partial.rename(self._workdir / f"{WRITTEN}{step:06d}")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
