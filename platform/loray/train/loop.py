"""The training loop in plain Python: one process, or one of several over torch.distributed.

A step: its batches → sum of losses over all targets or pairs → gradients, summed over micro-batches and ranks → clip →
AdamW. The strategy distributes parameters, gradients and states over ranks. All ranks make the same reporter calls.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from loray.adapters.peft_format import read_adapter
from loray.bases.checkpoint import stored_dtype
from loray.bases.registry import BaseModel
from loray.errors import SpecError, TrainingError
from loray.methods.attach import InitialAdapter, load_weights
from loray.spec import Subject, TrainSpec
from loray.telemetry import get_logger
from loray.train import checkpoint
from loray.train.checkpoint import Checkpoints, Clock, Leaving, Reporter, RunState, evaluation
from loray.train.data.batches import (
    BatchStream,
    Cursor,
    TokenizedRows,
    collate,
    collate_pairs,
    pair_lengths,
    plan_evaluation,
)
from loray.train.data.rows import Dataset
from loray.train.mesh import Mesh
from loray.train.model import BaseWeights, build_model, count_parameters, dense
from loray.train.objectives import Objective, objective_of
from loray.train.optimizer import StepResult, learning_rate
from loray.train.strategies import prepare

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
    leaving: Leaving = frozenset,
) -> RunState:
    """Train an adapter. The result is in the checkpoints that `reporter` gets. Returns the last state.

    `initial` is the recipe's `init_adapter`, from whose weights a new run starts; a resumed one has its own.

    `resume_from` is a checkpoint folder: the run continues as if it had not been interrupted, bit for bit on the same
    machine (on a GPU where `spec.deterministic`). Checkpoints are written to `workdir`; `clock` says in seconds when
    the next is due, and one is whenever rank 0 hears from `leaving` of a further machine that will be taken away.
    `dtype_reason`, why the recipe's dtype is what it is, is kept in the state.

    Raises TrainingError after `spec.max_nonfinite_steps` skipped steps, after a checkpoint of the last good state where
    its held-out loss is finite, and where the run ends without a usable adapter; SpecError where `resume_from` belongs
    to another recipe.
    """
    if (spec.init_adapter is None) != (initial is None):
        raise SpecError(f"init_adapter is {spec.init_adapter}: the files of an adapter go with it, and only with it")
    with deterministic(spec.deterministic):
        device = device or torch.device("cpu")
        run = _Run(spec, base, data, reporter, workdir, resume_from, initial, device, dtype_reason, clock, leaving)
        try:
            return run.train()
        finally:
            run.checkpoints.close()


class _Step(NamedTuple):
    loss: float
    lr: float
    result: StepResult
    num_tokens: int
    is_overdue: bool  # the next checkpoint, by the clock or since a machine will be taken away
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
        leaving: Leaving,
    ) -> None:
        self.spec, self.base, self.data, self.reporter, self.device = spec, base, data, reporter, device
        self.mesh = Mesh.build(spec.parallel.sequence, self.device)
        self.world = self.mesh.world
        self.checkpoints = Checkpoints(spec.checkpoint, reporter, workdir, self.world, self.device, clock, leaving)
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
            share_out=partial(self.world.share_out, device=self.device),
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
                self._report(self.state.early_stop(self.num_steps))
                self.num_steps = step
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
        metrics = {name: total / num_terms for name, total in zip(self.objective.metrics, totals, strict=True)}
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
        """Measure the model before any training. Raises TrainingError for a loss that is not finite."""
        baselines = []
        for subject, measured in self._measure_baselines():
            if not isfinite(measured.loss):
                raise TrainingError(
                    f"the held-out loss of {subject} is {measured.loss} before any training; "
                    f"check the base model and the data, or train in float32 (dtype is {self.spec.dtype})"
                )
            baselines.append(evaluation(measured.loss, subject, self.data.max_length))
            self._report_eval(subject, measured)
        self.state = self.state.model_copy(update={"baselines": tuple(baselines)})

    def _measure_baselines(self) -> Iterator[tuple[Subject, HeldOut]]:
        """An untrained adapter does not change the base, which is base_scaled under scaled RoPE. A run that goes on
        from an adapter starts at its parent.
        """
        if self.spec.init_adapter is not None:
            yield "parent", self._held_out_loss()
        elif self.spec.rope_scaling is None:
            yield "base", self._held_out_loss()
        else:
            with unscaled(self.model, self.base):
                measured = self._held_out_loss()
            yield "base", measured
            yield "base_scaled", self._held_out_loss()

    def _evaluate(self) -> bool:
        """Measure and report the held-out loss. Returns whether it is the best so far."""
        measured, before = self._held_out_loss(), self.state.best_eval_loss
        self.state = self.state.evaluated(measured.loss, measured.metrics)
        self._report_eval("adapter", measured)
        return self.state.best_eval_loss != before

    # -- reports --

    def _report(self, metrics: dict[str, Any]) -> None:
        self.reporter.report(metrics, None)

    def _report_start(self) -> None:
        count = self.num_parameters
        self._report(
            {
                "event": "start",
                "num_parameters": count.total,
                "num_trainable": count.trainable,
                "trainable_share": count.trainable / count.total,
                "num_threads": torch.get_num_threads(),
                "pid": os.getpid(),
                "data": asdict(self.data.report),
                "step": self.state.step,
                "num_steps": self.num_steps,
                "num_workers": self.world.size,
                "device": str(self.device),
                "dtype": self.state.recipe.chosen_dtype,
            }
        )

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


# -- what makes a run give the same bits again ------------------------------------------------------------------------


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from these arguments alone, so that a resumed run draws the same numbers."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use torch's deterministic algorithms inside the block, where `enabled`.

    An operation without one raises RuntimeError. On a GPU enter it before the first product, for cuBLAS reads its
    setting once.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    before, filled = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing here reads memory before it is written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled


# -- held-out loss ----------------------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """`loss` is the mean over terms (targets, or pairs), nan where a logit is not finite; `metrics` are the
    objective's further figures.
    """

    loss: float
    metrics: dict[str, float]


@torch.no_grad()
def held_out_loss(
    objective: Objective, compute: nn.Module, rows: TokenizedRows, spec: TrainSpec, *, device: torch.device, mesh: Mesh
) -> HeldOut:
    """Measure the mean loss over all rows and ranks, with dense attention also where training uses S2-Attn.

    The model is in training mode afterwards.

    `compute` is the strategy's module that computes a batch's loss by `objective`. Every rank calls it equally often: a
    rank without a batch repeats the last one, and does not count it.
    """
    lengths = pair_lengths(rows.lengths) if spec.is_paired else rows.lengths
    batches = plan_evaluation(lengths, spec.batch)
    total, num_terms = 0.0, 0
    sums = [0.0] * len(objective.metrics)
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
    return HeldOut(total / count, {name: s / count for name, s in zip(objective.metrics, sums, strict=True)})


@contextmanager
def unscaled(model: Any, base: BaseModel) -> Iterator[None]:
    """Give the model the base's RoPE inside the block: an untrained model then computes as the base does."""
    inner = model.base_model
    scaled = inner.rotary_emb
    config = copy.deepcopy(model.config)
    config.rope_parameters = base.config.rope.to_hf()
    inner.rotary_emb = type(scaled)(config).to(scaled.inv_freq.device)
    try:
        yield
    finally:
        inner.rotary_emb = scaled
