"""The training loop in plain Python: one process, or one of several over torch.distributed.

A step: its batches → sum of losses over all targets or pairs → gradients, summed over micro-batches and ranks → clip →
AdamW. The strategy distributes parameters, gradients and states over ranks. All ranks make the same reporter calls.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loray.adapters.inject import InitialAdapter, load_weights
from loray.adapters.peft_format import read_adapter
from loray.bases.checkpoint import stored_dtype
from loray.bases.registry import BaseModel
from loray.errors import SpecError, TrainingError
from loray.spec import Subject, TrainSpec
from loray.telemetry import get_logger
from loray.train import checkpoint
from loray.train.checkpoint import RunState, evaluation
from loray.train.data.batches import BatchStream, Cursor
from loray.train.data.dataset import Dataset
from loray.train.determinism import deterministic, seed_step
from loray.train.evaluation.held_out import HeldOut, held_out_loss, measure_baselines
from loray.train.mesh import Mesh
from loray.train.model import build_model, count_parameters
from loray.train.objectives.choice import objective_of
from loray.train.optimizer import StepResult, learning_rate
from loray.train.reporting import Reporter, start_event
from loray.train.saving import Checkpoints, Clock
from loray.train.strategies import prepare
from loray.train.weights.deferred import BaseWeights

log = get_logger(__name__)


def train(
    spec: TrainSpec,
    base: BaseModel,
    data: Dataset,
    *,
    reporter: Reporter,
    workdir: Path,
    resume_from: Path | None = None,
    initial: InitialAdapter | None = None,
    device: torch.device | None = None,
    dtype_reason: str | None = None,
    clock: Clock = time.monotonic,
) -> RunState:
    """Train an adapter. The result is in the checkpoints that `reporter` gets. Returns the last state.

    `initial` is the recipe's `init_adapter`, from whose weights a new run starts; a resumed one has its own.

    `resume_from` is a checkpoint folder: the run continues as if it had not been interrupted, bit for bit on the same
    machine (on a GPU where `spec.deterministic`). Checkpoints are written to `workdir`; `clock` says in seconds when
    the next is due. `dtype_reason`, why the recipe's dtype is what it is, is kept in the state.

    Raises TrainingError after `spec.max_nonfinite_steps` skipped steps, after a checkpoint of the last good state where
    its held-out loss is finite, and where the run ends without a usable adapter; SpecError where `resume_from` belongs
    to another recipe.
    """
    if (spec.init_adapter is None) != (initial is None):
        raise SpecError(f"init_adapter is {spec.init_adapter}: the files of an adapter go with it, and only with it")
    with deterministic(spec.deterministic):
        device = device or torch.device("cpu")
        run = _Run(spec, base, data, reporter, workdir, resume_from, initial, device, dtype_reason, clock)
        try:
            return run.train()
        finally:
            run.checkpoints.close()


class _Step(NamedTuple):
    loss: float
    lr: float
    result: StepResult
    num_tokens: int
    is_overdue: bool  # the next checkpoint, by the clock
    metrics: dict[str, float]


class _Run:
    """Owns the strategy, the batch stream and the state of one run."""

    def __init__(
        self,
        spec: TrainSpec,
        base: BaseModel,
        data: Dataset,
        reporter: Reporter,
        workdir: Path,
        resume_from: Path | None,
        initial: InitialAdapter | None,
        device: torch.device,
        dtype_reason: str | None,
        clock: Clock,
    ) -> None:
        self.spec, self.base, self.data, self.reporter, self.device = spec, base, data, reporter, device
        self.mesh = Mesh.build(spec.parallel.sequence, self.device)
        self.world = self.mesh.world
        self.checkpoints = Checkpoints(spec.checkpoint, reporter, workdir, self.world, self.device, clock)
        self.resumed = resume_from is not None
        if resume_from is None:
            self.state = RunState(
                recipe=spec,
                base_fingerprint=base.fingerprint,
                data_fingerprint=data.fingerprint,
                row_length=data.max_length,
                parent=initial and initial.digest,
                dtype_reason=dtype_reason,
            )
        else:
            saved = checkpoint.read_state(resume_from)
            checkpoint.check_resumable(saved, spec, base.fingerprint, data.fingerprint)
            self.state = saved.model_copy(update={"recipe": spec, "dtype_reason": dtype_reason})
        self.model: Any = build_model(base, spec)
        if initial is not None and resume_from is None:
            load_weights(self.model, read_adapter(initial.folder, base.config))
        self.model.train()
        self.num_parameters = count_parameters(self.model)
        self.published_dtype = spec.publish.dtype or stored_dtype(base.path)
        optimizer_state = None if resume_from is None else checkpoint.read_optimizer(resume_from)
        self.objective, weights = objective_of(self.model, spec), BaseWeights(base, spec.chosen_dtype)
        self.strategy = prepare(self.objective, spec, self.world, self.device, weights, optimizer_state)
        self.stream = BatchStream(
            data.train,
            spec.batch,
            max_length=data.max_length,
            seed=spec.seed,
            cursor=Cursor(self.state.epoch, self.state.index),
            per_step=spec.micro_batches_per_step,
            rank=self.mesh.data_rank,
            size=self.mesh.data_size,
            shares=data.shares,
            paired=data.is_paired,
            cache=data.cache,
        )
        steps = spec.max_steps or self.stream.num_steps(spec.num_epochs or 1.0)
        self.num_steps = self.state.step if self.state.is_stale else steps  # stale: it had ended early
        self.skipped_here = 0  # by this process: a resumed run may skip as many steps again
        self.good_steps_unsaved = 0

    # -- the run --

    def train(self) -> RunState:
        self._report_start()
        if not self.resumed and len(self.data.evaluation):
            self._evaluate_baselines()
        started = ended = time.perf_counter()
        first = self.state.step + 1
        while (step := self.state.step + 1) <= self.num_steps:
            done = self._step(step)
            before, ended = ended, time.perf_counter()
            mean_s = (ended - started) / (step - first + 1)
            # From step to step, evaluations and checkpoints included.
            self._report_step(done, seconds=ended - before, eta_s=(self.num_steps - step) * mean_s)
            if self.skipped_here >= self.spec.max_nonfinite_steps:
                self._stop()
            evaluated = len(self.data.evaluation) > 0 and self._is_due(self.spec.evaluation.interval_steps)
            improved = self._evaluate() if evaluated else False
            if evaluated and self.state.is_stale and step < self.num_steps:
                self._end_early()
            if step == self.num_steps:
                self._check_end(evaluated)
            if self._is_checkpoint_due(evaluated, improved, overdue=done.is_overdue):
                self._save()
        self.checkpoints.finish()
        return self.state

    def _step(self, step: int) -> _Step:
        seed_step(self.spec.seed, step, self.world.rank)
        batches = self.stream.next_step()
        counts = sum(b.num_terms for b in batches), sum(b.num_tokens for b in batches)
        num_terms, num_tokens = (n / self.mesh.sequence.size for n in self.world.sum(*counts, device=self.device))
        mine = 0.0
        for batch in batches:
            with self.mesh.part(batch) as part:
                mine += self.strategy.forward_backward(part, divisor=num_terms, last=batch is batches[-1])
        signals, sums = self.checkpoints.signals(), self.objective.take()
        loss, overdue, written, *totals = self.world.sum(mine, *signals, *sums, device=self.device)
        self.checkpoints.take(written)
        loss /= num_terms
        metrics = {name: total / num_terms for name, total in zip(self.objective.METRICS, totals, strict=True)}
        lr = learning_rate(step, self.num_steps, self.spec.optimizer)
        result = self.strategy.step(lr)
        if result.skipped:
            log.warning("step %d skipped: loss %s, gradient norm %s", step, loss, result.grad_norm)
            self.skipped_here += 1
        else:
            self.good_steps_unsaved += 1
        self.state = self.state.model_copy(
            update={
                "step": step,
                "epoch": self.stream.cursor.epoch,
                "index": self.stream.cursor.done,
                "skipped_steps": self.state.skipped_steps + result.skipped,
                "num_tokens": self.state.num_tokens + int(num_tokens),
                "eval_loss": None,
                "eval_metrics": {},
            }
        )
        return _Step(loss, lr, result, int(num_tokens), overdue > 0, metrics)

    def _stop(self) -> None:
        """Save the parameters where their held-out loss is finite, and raise TrainingError. Skipped steps change
        nothing, but the last good step may have made the parameters unusable.
        """
        if self.good_steps_unsaved and len(self.data.evaluation):
            self._evaluate()
            if self.state.eval_loss is not None:
                self._save()
        self.checkpoints.finish()
        raise TrainingError(
            f"stopped at step {self.state.step}: {self.skipped_here} steps had a loss or gradient that is not finite "
            f"(max_nonfinite_steps is {self.spec.max_nonfinite_steps}); lower the learning rate or look at the data, "
            "then go on from the last good checkpoint with --resume"
        )

    def _check_end(self, evaluated: bool) -> None:
        """Raise TrainingError where all steps were skipped, or neither the last nor the best loss is finite."""
        if self.state.skipped_steps == self.state.step:
            raise TrainingError("every step had a loss or gradient that is not finite; look at the data and the base")
        best_is_kept = self.spec.evaluation.keep_best and self.state.best_eval_loss is not None
        if evaluated and self.state.eval_loss is None and not best_is_kept:
            raise TrainingError("the held-out loss after the last step is not finite; lower the learning rate")

    def _is_due(self, interval: int | None) -> bool:
        step = self.state.step
        return step == self.num_steps or (interval is not None and step % interval == 0)

    def _is_checkpoint_due(self, evaluated: bool, improved: bool, *, overdue: bool) -> bool:
        if evaluated and self.state.eval_loss is None:
            return False  # neither to be published nor to be resumed from
        interval = self.spec.checkpoint.interval_steps
        if self._is_due(interval) or overdue:
            return True
        return evaluated and (interval is None or (improved and self.spec.evaluation.keep_best))

    # -- evaluation --

    def _held_out_loss(self) -> HeldOut:
        rows, compute = self.data.evaluation, self.strategy.objective
        return held_out_loss(self.objective, compute, rows, self.spec, device=self.device, mesh=self.mesh)

    def _evaluate_baselines(self) -> None:
        """Measure what the model computes before any training."""
        baselines = []
        for subject, measured in measure_baselines(self.model, self.base, self.spec, self._held_out_loss):
            baselines.append(evaluation(measured.loss, subject, self.data.max_length))
            self._report_eval(subject, measured)
        self.state = self.state.model_copy(update={"baselines": tuple(baselines)})

    def _evaluate(self) -> bool:
        """Measure and report the held-out loss. Returns whether it is the best so far."""
        measured, before = self._held_out_loss(), self.state.best_eval_loss
        self.state = self.state.evaluated(measured.loss, measured.metrics)
        self._report_eval("adapter", measured)
        return self.state.best_eval_loss != before

    def _end_early(self) -> None:
        self._report(self.state.early_stop(self.num_steps))
        self.num_steps = self.state.step

    # -- reports --

    def _report(self, metrics: dict[str, Any]) -> None:
        self.reporter.report(metrics, None)

    def _report_start(self) -> None:
        counts = self.num_parameters.total, self.num_parameters.trainable
        where = {"num_workers": self.world.size, "device": str(self.device), "dtype": self.state.recipe.chosen_dtype}
        progress = {"step": self.state.step, "num_steps": self.num_steps}
        self._report(start_event(*counts, asdict(self.data.report)) | progress | where)

    def _report_eval(self, subject: Subject, measured: HeldOut) -> None:
        figures = {"eval_loss": measured.loss, **measured.metrics}
        self._report({"event": "eval", "step": self.state.step, "subject": subject, **figures})

    def _report_step(self, step: _Step, *, seconds: float, eta_s: float) -> None:
        self._report(
            {
                "event": "step",
                **self.state.progress,
                "num_steps": self.num_steps,
                "loss": step.loss,
                **step.metrics,
                "lr": step.lr,
                "grad_norm": step.result.grad_norm,
                "tokens_per_s": step.num_tokens / seconds,
                "eta_s": eta_s,
            }
        )

    def _save(self) -> None:
        """Begin a checkpoint of the current state. Only rank 0 writes it."""
        self.checkpoints.finish()  # before this one's copy is made, so that there is one at a time
        state = self.strategy.state()
        taken = None if state is None else checkpoint.snapshot(self.model, state, self.state, self.published_dtype)
        self.checkpoints.begin(taken, step=self.state.step, eval_loss=self.state.eval_loss)
        self.good_steps_unsaved = 0
