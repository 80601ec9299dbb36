"""The training loop in plain Python: one process, or one of several over torch.distributed.

A step: its batches → counts of the loss's terms, summed over micro-batches and ranks → each micro-batch's part of the
mean loss → gradients, summed likewise → clip → AdamW. The strategy distributes parameters, gradients and states over
ranks. All ranks make the same reporter calls.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from loray.adapters.peft_format import read_adapter
from loray.bases.checkpoint import stored_dtype
from loray.bases.registry import BaseModel
from loray.errors import SpecError, TrainingError
from loray.methods.attach import InitialAdapter, load_weights
from loray.recipes.resolve import resolve
from loray.spec import Subject, TrainSpec
from loray.telemetry import get_logger
from loray.train import checkpoint
from loray.train.checkpoint import Checkpoints, Clock, Leaving, Reporter, RunState, baseline
from loray.train.data.batches import (
    Cursor,
    TokenizedRows,
    TrainBatch,
    collate,
    collate_pairs,
    pair_lengths,
    plan_evaluation,
)
from loray.train.data.lessons import Lessons, lessons_of, teach
from loray.train.data.rows import Dataset
from loray.train.mesh import Mesh
from loray.train.model import BaseWeights, build_model, count_parameters, dense, unscaled
from loray.train.objectives import Objective, Score, objective_of
from loray.train.optimizer import StepResult, learning_rate
from loray.train.progress import HeldOut, TimeLeft, eval_event, is_due, start_event, step_event
from loray.train.reference import Reference
from loray.train.strategies import prepare
from loray.train.teacher import BaseTeacher

log = get_logger(__name__)

_REFERENCE = "computing the reference of pairs"


def train(
    spec: TrainSpec,
    base: BaseModel,
    data: Dataset,
    *,
    reporter: Reporter,
    workdir: Path,
    resume_from: Path | None = None,
    initial: InitialAdapter | None = None,
    teacher: BaseModel | None = None,
    device: torch.device | None = None,
    dtype_reason: str | None = None,
    measured_tokens: int = 0,
    clock: Clock = time.monotonic,
    leaving: Leaving = frozenset,
) -> RunState:
    """Train an adapter. The result is in the checkpoints that `reporter` gets. Returns the last state.

    `initial` is the recipe's `init_adapter`, from whose weights a new run starts; a resumed one has its own. `teacher`
    is the base that a recipe of distillation names; a served teacher has been asked, and `data` has its lessons.

    `resume_from` is a checkpoint folder: the run continues as if it had not been interrupted, bit for bit on the same
    machine (on a GPU where `spec.deterministic`). Checkpoints are written to `workdir`; `clock` says in seconds when
    the next is due, and one is whenever rank 0 hears from `leaving` of a further machine that will be taken away.
    `dtype_reason`, why the recipe's dtype is what it is, is kept in the state. `measured_tokens` are those that go
    through models once the run has ended, which the time that is left counts.

    Raises TrainingError after `spec.max_nonfinite_steps` skipped steps, after a checkpoint of the last good state where
    its held-out loss is finite, and where the run ends without a usable adapter; SpecError where `resume_from` belongs
    to another recipe.
    """
    if (spec.init_adapter is None) != (initial is None):
        raise SpecError(f"init_adapter is {spec.init_adapter}: the files of an adapter go with it, and only with it")
    if (spec.objective.teaching is None) != (teacher is None and data.lessons is None):
        raise SpecError("objective.teacher: a base, or what a served model says of the rows, goes with it")
    with deterministic(spec.deterministic):
        device = device or torch.device("cpu")
        run = _Run(
            spec,
            base,
            data,
            reporter,
            workdir,
            resume_from,
            initial,
            teacher,
            device,
            dtype_reason,
            measured_tokens,
            clock,
            leaving,
        )
        try:
            return run.train()
        finally:
            run.checkpoints.close()


class Known(Protocol):
    """What was found out about rows before the first step: a reference, or a teacher's lessons."""

    def joined(self, batch: TrainBatch) -> TrainBatch:
        """Give a batch of these rows what is known of them."""


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
        teacher: BaseModel | None,
        device: torch.device,
        dtype_reason: str | None,
        measured_tokens: int,
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
        self.published_dtype = spec.publish.dtype or stored_dtype(base.path)
        cursor = Cursor(self.state.epoch, self.state.index)
        self.stream = data.stream(
            spec,
            cursor=cursor,
            rank=self.mesh.data_rank,
            size=self.mesh.data_size,
            share_out=partial(self.world.share_out, device=self.device),
        )
        steps = self.stream.steps_of(spec)
        self.num_steps = self.state.step if self.state.is_stale else steps  # stale: it had ended early
        self.lessons = data.lessons if teacher is None else self._taught(teacher)
        self.references = self._references(steps, initial) if spec.objective.has_reference else None
        is_missing = self.references is not None and any(reference.missing for reference in self.references)
        if is_missing and resume_from is not None:  # what was kept has gone: the checkpoint's weights do not say it
            self._build(None, initial)
            self._compute_references()
            del self.model, self.objective, self.strategy
        self._build(resume_from, initial)
        if is_missing and resume_from is None:
            self._compute_references()
        self.skipped_here = 0  # by this process: a resumed run may skip as many steps again
        self.good_steps_unsaved = 0
        interval = spec.evaluation.interval_steps or self.num_steps
        rows = data.evaluation
        self.left = TimeLeft(self.num_steps, interval if len(rows) else None, int(rows.lengths.sum()), measured_tokens)

    def _build(self, resume_from: Path | None, initial: InitialAdapter | None) -> None:
        """Distribute the model as it is before the first step, or as the checkpoint `resume_from` has it."""
        self.model: Any = build_model(self.base, self.spec)
        if initial is not None and resume_from is None:
            load_weights(self.model, read_adapter(initial.folder, self.base.config))
        self.model.train()
        self.num_parameters = count_parameters(self.model)
        optimizer_state = None if resume_from is None else checkpoint.read_optimizer(resume_from)
        self.objective, weights = objective_of(self.model, self.spec), BaseWeights(self.base, self.spec.chosen_dtype)
        self.strategy = prepare(self.objective, self.spec, self.world, self.device, weights, optimizer_state)

    # -- what is found out about the rows before the first step --

    def _taught(self, teacher: BaseModel) -> tuple[Lessons, Lessons]:
        """Ask a base about the rows that nobody has asked it about, each rank about its share of them."""
        spec, teaching = self.spec, self.spec.objective.teaching
        assert teaching is not None
        named = [teacher.fingerprint, spec.chosen_dtype]
        num_tokens = self.base.config.vocab_size
        lessons = lessons_of(spec, self.data, named, teaching.num_top, num_tokens, stream=self.stream)
        # Rank 0 says what is missing: another run may keep a block between two ranks' looks.
        first, *_ = self.world.gather(json.dumps([part.missing for part in lessons]))
        for part, missing in zip(lessons, json.loads(first or "[]"), strict=True):
            part.missing = missing
        if any(part.missing for part in lessons):
            asked = BaseTeacher(teacher, spec.chosen_dtype, self.device, teaching.num_top)
            answers = partial(map, asked.top)
            for told in teach(lessons, self.data, answers, rank=self.world.rank, size=self.world.size):
                self._report({"event": "progress", **told})
            self.world.gather(None)
        return lessons

    def _references(self, num_steps: int, initial: InitialAdapter | None) -> tuple[Reference, Reference]:
        """Read what is kept of training rows, which have the run's attention, and of held-out ones."""
        spec, data, device = self.spec, self.data, self.device
        fields = spec.model_dump(mode="json", include={"dtype", "quantization", "rope_scaling"})
        model = [self.base.fingerprint, initial and initial.digest, fields]
        trained = [*model, resolve(spec, self.base.config).group_size]
        measured = plan_evaluation(pair_lengths(data.evaluation.lengths), spec.batch)
        return (
            Reference(data.train, self.stream.planned(num_steps), trained, data.cache, self.mesh, device),
            Reference(data.evaluation, measured, [*model, None], data.cache, self.mesh, device),
        )

    def _compute_references(self) -> None:
        """Compute what is missing with the model at hand, and report how far that is."""
        assert self.references is not None
        missing = [batch for reference in self.references for block in reference.missing for batch in block]
        total, done, began = sum(map(len, missing)), 0, time.perf_counter()
        # A step computes its rows forward, and backward in twice the time.
        num_batches = (self.num_steps - self.state.step) * self.spec.micro_batches_per_step
        steps = (3 + self.spec.gradient_checkpointing) * num_batches * total / len(missing)
        self._report({"event": "progress", "stage": _REFERENCE, "done": 0, "total": total})
        compute = self.strategy.objective
        compute.eval()  # DeepSpeed's returns nothing
        score = _score_with(compute, self.mesh)
        attentions: list[AbstractContextManager[object]] = [nullcontext(), dense(self.model, self.mesh.sequence)]
        for reference, attention in zip(self.references, attentions, strict=True):
            with attention:
                for num_pairs in reference.compute(score):
                    done += num_pairs
                    eta_s = (time.perf_counter() - began) / done * (total - done + steps)
                    told = {"stage": _REFERENCE, "done": done, "total": total, "eta_s": eta_s}
                    self._report({"event": "progress", **told})
        compute.train()

    @property
    def _known(self) -> tuple[Known, Known] | None:
        """Of training rows and of held-out ones."""
        return self.references or self.lessons

    # -- the run --

    def train(self) -> RunState:
        self._report_start()
        if not self.resumed and len(self.data.evaluation):
            self._evaluate_baselines()
        ended = time.perf_counter()
        while (step := self.state.step + 1) <= self.num_steps:
            done = self._step(step)
            before, ended = ended, time.perf_counter()
            # From step to step, evaluations and checkpoints included.
            self.left.stepped(ended - before, done.num_tokens)
            self._report_step(done, seconds=ended - before, eta_s=self.left.after(step))
            if self.skipped_here >= self.spec.max_nonfinite_steps:
                self._stop()
            evaluated = len(self.data.evaluation) > 0 and self._is_due(self.spec.evaluation.interval_steps)
            improved = self._evaluate() if evaluated else False
            if evaluated and self.state.is_stale and step < self.num_steps:
                self._report(self.state.early_stop(self.num_steps))
                self.num_steps = step
            if step == self.num_steps:
                self.state.check_end(evaluated)
            if self._is_checkpoint_due(evaluated, improved, overdue=done.is_overdue):
                self._save()
        self.checkpoints.finish()
        return self.state

    def _step(self, step: int) -> _Step:
        seed_step(self.spec.seed, step, self.world.rank)
        batches = self.stream.next_step()
        if self._known is not None:
            batches = [self._known[0].joined(batch) for batch in batches]
        score, learned = _score_with(self.strategy.objective, self.mesh), [*map(self.objective.learned, batches)]
        counts = [
            {"tokens": part.num_tokens, **self.objective.counts(whole, score)}
            for whole, part in zip(batches, learned, strict=True)
        ]
        totals = _totals(counts, self.mesh, self.device)
        num_tokens = int(totals["tokens"])
        mine = 0.0
        for batch in learned:
            with self.mesh.part(batch) as part:
                mine += self.strategy.forward_backward(part, totals=totals, last=batch is learned[-1])
        signals, parts = self.checkpoints.signals(), self.objective.take()
        loss, overdue, written, *means = self.world.sum(mine, *signals, *parts, device=self.device)
        self.checkpoints.take(written)
        metrics = dict(zip(self.objective.metrics, means, strict=True))
        lr = learning_rate(step, self.num_steps, self.spec.optimizer)
        result = self.strategy.step(lr)
        if result.skipped:
            log.warning("step %d skipped: loss %s, gradient norm %s", step, loss, result.grad_norm)
            self.skipped_here += 1
        else:
            self.good_steps_unsaved += 1
        self.state = self.state.stepped(*self.stream.cursor, num_tokens=num_tokens, skipped=result.skipped)
        return _Step(loss, lr, result, num_tokens, overdue > 0, metrics)

    def _stop(self) -> None:
        """Save the parameters where their held-out loss is finite, and raise TrainingError. Skipped steps change
        nothing, but the last good step may have made the parameters unusable.
        """
        if self.good_steps_unsaved and len(self.data.evaluation):
            self._evaluate()
            if self.state.eval_loss is not None:
                self._save()
        self.checkpoints.finish()
        raise TrainingError(self.state.gave_up(self.skipped_here))

    def _is_due(self, interval: int | None) -> bool:
        return is_due(self.state.step, self.num_steps, interval)

    def _is_checkpoint_due(self, evaluated: bool, improved: bool, *, overdue: bool) -> bool:
        if evaluated and self.state.eval_loss is None:
            return False  # neither to be published nor to be resumed from
        interval = self.spec.checkpoint.interval_steps
        if self._is_due(interval) or overdue:
            return True
        return evaluated and (interval is None or (improved and self.spec.evaluation.keep_best))

    # -- evaluation --

    def _held_out_loss(self) -> HeldOut:
        began = told_at = time.perf_counter()

        def tell(done: int, total: int) -> None:
            nonlocal told_at
            if time.perf_counter() - told_at > _TOLD_S:
                told_at = time.perf_counter()
                stage = {"stage": "evaluating held-out rows", "done": done / total, "total": 1}
                self._report({"event": "progress", **stage})

        rows, compute = self.data.evaluation, self.strategy.objective
        known = None if self._known is None else self._known[1]
        found = held_out_loss(
            self.objective, compute, rows, self.spec, device=self.device, mesh=self.mesh, known=known, progress=tell
        )
        self.left.evaluated(time.perf_counter() - began)
        return found

    def _evaluate_baselines(self) -> None:
        """Measure the model before any training. Raises TrainingError for a loss that is not finite."""
        baselines = []
        for subject, measured in self._measure_baselines():
            baselines.append(baseline(measured.loss, subject, self.state))
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
        told = start_event(self.state, self.num_steps, self.num_parameters, self.data, self.world.size, self.device)
        self._report(told)

    def _report_eval(self, subject: Subject, measured: HeldOut) -> None:
        self._report(eval_event(self.state.step, subject, measured))

    def _report_step(self, step: _Step, *, seconds: float, eta_s: float) -> None:
        self._report(
            step_event(
                self.state,
                self.num_steps,
                loss=step.loss,
                metrics=step.metrics,
                lr=step.lr,
                grad_norm=step.result.grad_norm,
                tokens_per_s=step.num_tokens / seconds,
                eta_s=eta_s,
            )
        )

    def _save(self) -> None:
        """Begin a checkpoint of the current state. Only rank 0 writes it."""
        self.checkpoints.finish()  # before this one's copy is made, so that there is one at a time
        state = self.strategy.state()
        write = None
        if state is not None:
            taken = checkpoint.snapshot(self.model, state, self.state, self.published_dtype)
            write = partial(checkpoint.write, snapshot=taken)
        self.checkpoints.begin(write, step=self.state.step, eval_loss=self.state.eval_loss)
        self.good_steps_unsaved = 0


_TOLD_S = 1.0  # of an evaluation, until it is told how far it is, and from then to the next time


def _totals(counts: Iterable[Mapping[str, float]], mesh: Mesh, device: torch.device) -> dict[str, float]:
    """Sum the counts of each kind over micro-batches and ranks. A sequence group's ranks count the same batches."""
    summed: dict[str, float] = {}
    for of_batch in counts:
        summed = {kind: summed.get(kind, 0) + count for kind, count in of_batch.items()}
    totals = mesh.world.sum(*summed.values(), device=device)
    return {kind: total / mesh.sequence.size for kind, total in zip(summed, totals, strict=True)}


def _score_with(compute: nn.Module, mesh: Mesh) -> Score:
    """Make what computes the log-probabilities of a batch's rows by the model as it is."""

    @torch.no_grad()
    def score(batch: TrainBatch) -> Tensor:
        with mesh.part(batch) as part:
            log_probs_B: Tensor = compute(part, {})
        return log_probs_B

    return score


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


@torch.no_grad()
def held_out_loss(
    objective: Objective,
    compute: nn.Module,
    rows: TokenizedRows,
    spec: TrainSpec,
    *,
    device: torch.device,
    mesh: Mesh,
    known: Known | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOut:
    """Measure the mean loss over all rows and ranks, with dense attention also where training uses S2-Attn.

    The model is in training mode afterwards.

    `compute` is the strategy's module that computes a batch's loss by `objective`. Every rank calls it equally often: a
    rank without a batch repeats the last one, and does not count it. `known`: what the objective learns from beside the
    rows. `progress` is told how many of all batches are done.
    """
    lengths = pair_lengths(rows.lengths) if spec.is_paired else rows.lengths
    batches = plan_evaluation(lengths, spec.batch)

    def collated() -> Iterator[tuple[TrainBatch, bool]]:
        """This rank's batches, and whether each counts."""
        for mine in range(mesh.data_rank, len(batches) + mesh.data_rank, mesh.data_size):
            planned = batches[min(mine, len(batches) - 1)]
            whole = collate_pairs(rows, planned) if spec.is_paired else collate(rows, planned, packed=False)
            yield whole if known is None else known.joined(whole), mine < len(batches)

    compute.eval()
    score = _score_with(compute, mesh)
    with dense(objective.model, mesh.sequence):
        counts = ({kind: n * counted for kind, n in objective.counts(b, score).items()} for b, counted in collated())
        totals = _totals(counts, mesh, device)
        figures = [0.0] * (1 + len(objective.metrics))
        for number, (whole, counted) in enumerate(collated()):
            with mesh.part(objective.learned(whole)) as part:
                loss = float(compute(part, totals))
            taken = objective.take()
            if counted:
                figures = [a + b for a, b in zip(figures, (loss, *taken), strict=True)]
            progress(min((number + 1) * mesh.data_size, len(batches)), len(batches))
    compute.train()
    loss, *means = mesh.world.sum(*figures, device=device)
    return HeldOut(loss, dict(zip(objective.metrics, means, strict=True)))
