"""The loop that trains a cohort: many adapters on one base, in one process or one sequence group.

A round is one optimizer step of each adapter: its micro-batches, from its own data in the order of a run alone →
passes, which join those of all → gradients, of which each row has the divisor of its own adapter's step → clip and
AdamW, adapter by adapter. Schedules, evaluations and ends are functions of an adapter's own step.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite, nan
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from loray.adapters.peft_format import read_adapter
from loray.bases.checkpoint import stored_dtype
from loray.bases.registry import BaseModel
from loray.errors import SpecError, TrainingError
from loray.methods.attach import InitialAdapter
from loray.spec import CheckpointSpec, EndStatus, Subject, TrainSpec
from loray.telemetry import get_logger
from loray.train import checkpoint
from loray.train.checkpoint import ADAPTER, Checkpoints, Clock, Metrics, Reporter, RunState
from loray.train.data.batches import BatchStream, Cursor, collate, plan_evaluation
from loray.train.data.rows import Dataset
from loray.train.loop import deterministic
from loray.train.many import state as snapshots
from loray.train.many.bank import AdapterBank
from loray.train.many.optimizer import Update, update
from loray.train.many.passes import Part, Pass, joined
from loray.train.many.state import AdapterState, CohortState, Weights
from loray.train.mesh import Mesh
from loray.train.model import ParameterCount, count_parameters, dense, trained_base, unscaled
from loray.train.objectives import labelled_states
from loray.train.optimizer import StepResult, learning_rate
from loray.train.progress import HeldOut, TimeLeft, eval_event, is_due, start_event, step_event
from loray.train.sequence import SequenceGroup

log = get_logger(__name__)

_TOLD_S = 1.0  # of an evaluation, between two events of how far it is


class Ended(NamedTuple):
    """An adapter's last state, and why it failed."""

    state: RunState
    status: EndStatus
    message: str | None = None


def train_many(
    specs: Sequence[TrainSpec],
    base: BaseModel,
    datas: Mapping[str, Dataset],
    *,
    reporters: Mapping[str, Reporter],
    reporter: Reporter,
    workdir: Path,
    tokens_per_pass: int,
    resume_from: Path | None = None,
    checkpoints: Mapping[str, Path] = MappingProxyType({}),
    initials: Mapping[str, InitialAdapter] = MappingProxyType({}),
    device: torch.device | None = None,
    group: SequenceGroup = SequenceGroup(),  # noqa: B008 - it is frozen
    dtype_reason: str | None = None,
    clock: Clock = time.monotonic,
    stopped: Callable[[], Collection[str]] = frozenset,
) -> dict[str, Ended]:
    """Train the adapters of one cohort, and say how each has ended. Keys of mappings are the names of `specs`.

    reporters    of each adapter: the events of a run alone, then `end`, with status and message. Its one checkpoint
                 comes before: the best weights with `evaluation.keep_best`, else the last ones, which alone have an
                 optimizer's state beside them. A failed adapter leaves its last weights where they are usable
    reporter     of the cohort: `round`, `progress`, and `checkpoint`, whose folder is a snapshot of the adapters that
                 go on. It is due when any recipe says so, by its own steps, or the least of the minutes
    resume_from  a snapshot's folder. An adapter that it lacks, since it had ended, starts afresh
    checkpoints  of adapters alone, from which they go on where the snapshot is older, or lacks them
    group        the ranks that hold the same rows; all of them train the same adapters
    stopped      adapters that are to end, asked before each round; they leave their last weights

    An adapter that fails does so alone: its steps are skipped where its own loss or gradient is not finite, and others
    do not notice. Raises SpecError where a recipe cannot go on from what was saved.
    """
    with deterministic(any(spec.deterministic for spec in specs)):
        device = device or torch.device("cpu")
        cohort = _Cohort(specs, base, reporter, workdir, tokens_per_pass, device, group, clock, stopped)
        try:
            saved = None if resume_from is None else snapshots.read_cohort(resume_from)
            cohort.round = 0 if saved is None else saved.round
            for spec in specs:
                cohort.add(
                    spec,
                    datas[spec.name],
                    reporters[spec.name],
                    None if saved is None else saved.adapters.get(spec.name),
                    resume_from,
                    checkpoints.get(spec.name),
                    initials.get(spec.name),
                    dtype_reason,
                )
            return cohort.train()
        finally:
            cohort.checkpoints.close()


class _Best(NamedTuple):
    state: RunState
    masters_P: torch.Tensor


@dataclass(eq=False)
class _Adapter:
    """One adapter in training."""

    spec: TrainSpec
    data: Dataset
    reporter: Reporter
    state: RunState
    stream: BatchStream
    num_steps: int
    is_fresh: bool
    left: TimeLeft
    best: _Best | None = None
    skipped_here: int = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_evaluated(self) -> bool:
        return len(self.data.evaluation) > 0

    @property
    def has_given_up(self) -> bool:
        return self.skipped_here >= self.spec.max_nonfinite_steps

    def report(self, metrics: Metrics, folder: Path | None = None) -> None:
        self.reporter.report(metrics, folder)


class _Done(NamedTuple):
    """What a round has done for one adapter."""

    loss: float
    lr: float
    result: StepResult
    num_tokens: int


class _Cohort:
    """Owns the base, the bank and the states of the adapters."""

    def __init__(
        self,
        specs: Sequence[TrainSpec],
        base: BaseModel,
        reporter: Reporter,
        workdir: Path,
        tokens_per_pass: int,
        device: torch.device,
        group: SequenceGroup,
        clock: Clock,
        stopped: Callable[[], Collection[str]],
    ) -> None:
        first = specs[0]
        self.base, self.reporter, self.workdir, self.device = base, reporter, workdir, device
        self.tokens_per_pass, self.stopped = tokens_per_pass, stopped
        self.mesh = Mesh.of_group(group)
        self.world = self.mesh.world
        self.model: Any = trained_base(base, first).to(device)
        self.bank = AdapterBank(self.model, base, first.chosen_dtype)
        self.num_base_parameters = count_parameters(self.model).total
        if any(spec.gradient_checkpointing for spec in specs):
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        minutes = [m for spec in specs if (m := spec.checkpoint.interval_minutes) is not None]
        often = CheckpointSpec(interval_minutes=min(minutes, default=None))
        self.checkpoints = Checkpoints(often, reporter, workdir, self.world, device, clock)
        self.active: dict[str, _Adapter] = {}
        self.ended: dict[str, Ended] = {}
        self.round = 0

    def add(
        self,
        spec: TrainSpec,
        data: Dataset,
        reporter: Reporter,
        saved: AdapterState | None,
        snapshot: Path | None,
        alone: Path | None,
        initial: InitialAdapter | None,
        dtype_reason: str | None,
    ) -> None:
        """Take an adapter as `saved` in `snapshot`, as in its `alone` checkpoint where that is newer, or anew."""
        name = spec.name
        if (spec.init_adapter is None) != (initial is None):
            raise SpecError(f"{name}: init_adapter is {spec.init_adapter}: the files of an adapter go with it")
        state = RunState(
            recipe=spec,
            base_fingerprint=self.base.fingerprint,
            data_fingerprint=data.fingerprint,
            row_length=data.max_length,
            parent=initial and initial.digest,
            dtype_reason=dtype_reason,
        )
        found = None if saved is None else saved.state
        own = None if alone is None else checkpoint.read_state(alone)
        if own is not None and (found is None or own.step > found.step):
            found, saved = own, None
        if found is not None:
            checkpoint.check_resumable(found, spec, self.base.fingerprint, data.fingerprint)
            state = found.model_copy(update={"recipe": spec, "dtype_reason": dtype_reason})
        weights = None if initial is None else read_adapter(initial.folder, self.base.config)
        self.bank.add(name, spec.adapter, seed=spec.seed, weights=weights)
        best = None
        if saved is not None and snapshot is not None:
            optimizer, best_P = snapshots.read_weights(snapshot, name, saved, self.bank.masters(name))
            self.bank.restore(name, optimizer)
            best = None if saved.best is None or best_P is None else _Best(saved.best, best_P)
        elif found is not None and alone is not None:
            self.bank.restore(name, checkpoint.read_optimizer(alone))
            if found.eval_loss is not None and found.eval_loss == found.best_eval_loss:
                best = _Best(found, snapshots.flat(self.bank.masters(name)))
        stream = data.stream(spec, cursor=Cursor(state.epoch, state.index))
        num_steps = state.step if state.is_stale else stream.steps_of(spec)
        rows = data.evaluation
        interval = (spec.evaluation.interval_steps or num_steps) if len(rows) else None
        left = TimeLeft(num_steps, interval, int(rows.lengths.sum()), 0)
        self.active[name] = _Adapter(spec, data, reporter, state, stream, num_steps, found is None, left, best)

    # -- the run --

    def train(self) -> dict[str, Ended]:
        for run in self.active.values():
            num_trained = sum(master.numel() for master in self.bank.masters(run.name).values())
            parameters = ParameterCount(self.num_base_parameters + num_trained, num_trained)
            run.report(start_event(run.state, run.num_steps, parameters, run.data, self.world.size, self.device))
        self._evaluate_baselines()
        for run in [run for run in self.active.values() if run.state.step >= run.num_steps]:
            self._end(run, "succeeded")  # it was whole before it was resumed
        ended = time.perf_counter()
        while self._active_after_stops():
            self.round += 1
            is_overdue, num_passes, done = self._round()
            before, ended = ended, time.perf_counter()
            self._report_round(done, num_passes, ended - before)
            due = [run for run in self.active.values() if self._is_evaluation_due(run)]
            self._evaluate(due)
            for run in list(self.active.values()):
                self._settle(run, is_evaluated=run in due)
            if self.active and (is_overdue or any(map(_is_checkpoint_due, self.active.values()))):
                self._save()
        return self.ended

    def _active_after_stops(self) -> bool:
        """End what is to stop. Rank 0 says what that is."""
        if self.active:
            (told, *_) = self.world.gather(json.dumps(sorted(self.stopped())))
            for name in json.loads(told or "[]"):
                if (run := self.active.get(name)) is not None:
                    self._end(run, "stopped")
        return bool(self.active)

    def _round(self) -> tuple[bool, int, dict[str, _Done]]:
        """Take a step of every adapter. Returns whether a snapshot is due, the number of passes, and what was done."""
        parts, num_tokens = list[Part](), dict[str, int]()
        for name, run in self.active.items():
            batches = run.stream.next_step()
            weight = 1 / sum(batch.num_targets for batch in batches)
            num_tokens[name] = sum(batch.num_tokens for batch in batches)
            parts += [Part.of(name, batch, weight=weight) for batch in batches]
        mine, num_passes = dict.fromkeys(self.active, 0.0), 0
        for each in joined(parts, self.tokens_per_pass, self.bank.order):
            num_passes += 1
            for name, loss in self._pass(each, learn=True).items():
                mine[name] += loss
        self.bank.reduce_gradients(self.mesh.sequence)
        *summed, overdue, _ = self.world.sum(*mine.values(), *self.checkpoints.signals(), device=self.device)
        losses = dict(zip(mine, summed, strict=True))
        rates = {
            name: learning_rate(run.state.step + 1, run.num_steps, run.spec.optimizer)
            for name, run in self.active.items()
        }
        broken = [name for name, loss in losses.items() if not isfinite(loss)]  # whose gradients may be finite
        self.bank.zero_gradients(broken)
        results = dict.fromkeys(broken, StepResult(nan, skipped=True)) | update(
            self.bank,
            [Update(n, rates[n], run.spec.optimizer) for n, run in self.active.items() if n not in broken],
        )
        for name, run in self.active.items():
            result = results[name]
            if result.skipped:
                log.warning("%s: step %d skipped: loss %s", name, run.state.step + 1, losses[name])
                run.skipped_here += 1
            run.state = run.state.stepped(*run.stream.cursor, num_tokens=num_tokens[name], skipped=result.skipped)
        done = {name: _Done(losses[name], rates[name], results[name], num_tokens[name]) for name in self.active}
        return overdue > 0, num_passes, done

    def _pass(self, each: Pass, *, learn: bool) -> dict[str, float]:
        """Sum the weighted losses of each adapter's labels, in fp64, of this rank's part of the rows; to `learn`, their
        gradients are added, too.
        """
        names = list(each.num_targets)
        with self.mesh.part(each.batch) as part, self.bank.rows(each.names, part.input_ids_BT.shape[1]):
            states = labelled_states(self.model, part)
            losses_N, rows_N = states.losses(), states.learned_BT.nonzero()[:, 0]
            weighted_N = losses_N * each.weights_B.to(losses_N)[rows_N]
            if learn:
                weighted_N.sum().backward()  # type: ignore[no-untyped-call]
        number = {name: i for i, name in enumerate(names)}
        numbers_B = torch.tensor([number[name] for name in each.names], device=self.device)
        sums_A = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        sums_A.index_add_(0, numbers_B[rows_N], weighted_N.detach().double())
        return dict(zip(names, sums_A.tolist(), strict=True))

    def _settle(self, run: _Adapter, *, is_evaluated: bool) -> None:
        """End an adapter whose time has come."""
        if run.has_given_up:
            self._end(run, "failed", run.state.gave_up(run.skipped_here), is_usable=is_evaluated)
            return
        if is_evaluated and run.state.is_stale and run.state.step < run.num_steps:
            run.report(run.state.early_stop(run.num_steps))
            run.num_steps = run.state.step
        if run.state.step < run.num_steps:
            return
        try:
            run.state.check_end(is_evaluated)
        except TrainingError as e:
            self._end(run, "failed", str(e))
        else:
            self._end(run, "succeeded")

    def _end(self, run: _Adapter, status: EndStatus, message: str | None = None, *, is_usable: bool = False) -> None:
        """Report an adapter's checkpoint and its end, and give back its place. A failed one has a checkpoint where its
        last weights are usable.
        """
        has_learned = run.state.skipped_steps < run.state.step
        is_usable = is_usable and run.state.eval_loss is not None
        if status == "succeeded" or (status == "stopped" and has_learned) or is_usable:
            self._checkpoint(run, run.best if status == "succeeded" else None)
        self.bank.remove(run.name)
        del self.active[run.name]
        self.ended[run.name] = Ended(run.state, status, message)
        run.report({"event": "end", "step": run.state.step, "status": status, "message": message})

    # -- evaluation --

    def _is_evaluation_due(self, run: _Adapter) -> bool:
        if not run.is_evaluated:
            return False
        has_learned = run.state.skipped_steps < run.state.step
        if run.has_given_up:
            return has_learned
        return is_due(run.state.step, run.num_steps, run.spec.evaluation.interval_steps)

    def _evaluate(self, runs: Sequence[_Adapter]) -> None:
        """Measure and report held-out losses, and keep the weights of the best."""
        for run, loss in self._held_out_losses(runs):
            before = run.state.best_eval_loss
            run.state = run.state.evaluated(loss, {})
            run.report(eval_event(run.state.step, "adapter", HeldOut(loss, {})))
            if run.state.best_eval_loss != before and run.spec.evaluation.keep_best:
                run.best = _Best(run.state, snapshots.flat(self.bank.masters(run.name)))

    def _evaluate_baselines(self) -> None:
        """Measure adapters before any training, which do not change the base yet, but for those that go on from one. An
        adapter fails where its loss is not finite.
        """
        fresh = [run for run in self.active.values() if run.is_fresh and run.is_evaluated]
        continued = [run for run in fresh if run.spec.init_adapter is not None]
        new = [run for run in fresh if run.spec.init_adapter is None]
        is_scaled = any(run.spec.rope_scaling is not None for run in new)
        measured: list[tuple[Subject, list[_Adapter], AbstractContextManager[None]]] = [
            ("parent", continued, nullcontext()),
            ("base", new, unscaled(self.model, self.base) if is_scaled else nullcontext()),
            ("base_scaled", new if is_scaled else [], nullcontext()),
        ]
        for subject, runs, scaling in measured:
            with scaling:
                losses = self._held_out_losses([run for run in runs if run.name in self.active])
            for run, loss in losses:
                try:
                    found = checkpoint.baseline(loss, subject, run.state)
                except TrainingError as e:
                    self._end(run, "failed", str(e))
                    continue
                run.state = run.state.model_copy(update={"baselines": (*run.state.baselines, found)})
                run.report(eval_event(run.state.step, subject, HeldOut(loss, {})))

    @torch.no_grad()
    def _held_out_losses(self, runs: Sequence[_Adapter]) -> list[tuple[_Adapter, float]]:
        """Measure the mean loss over all held-out rows of each, with dense attention."""
        if not runs:
            return []
        began = told_at = time.perf_counter()
        parts = [part for run in runs for part in _held_out_parts(run)]
        sums, num_targets, num_rows = dict[str, float](), dict[str, int](), 0
        total = sum(part.num_rows for part in parts)
        self.model.eval()
        with dense(self.model, self.mesh.sequence):
            for each in joined(parts, self.tokens_per_pass, self.bank.order):
                for name, loss in self._pass(each, learn=False).items():
                    sums[name] = sums.get(name, 0.0) + loss
                    num_targets[name] = num_targets.get(name, 0) + each.num_targets[name]
                num_rows += len(each.names)
                if time.perf_counter() - told_at > _TOLD_S:
                    told_at = time.perf_counter()
                    stage = {"stage": "evaluating held-out rows", "done": num_rows / total, "total": 1}
                    self.reporter.report({"event": "progress", **stage}, None)
        self.model.train()
        summed = self.world.sum(*(sums[run.name] for run in runs), device=self.device)
        for run in runs:
            run.left.evaluated(time.perf_counter() - began)
        return [(run, loss / num_targets[run.name]) for run, loss in zip(runs, summed, strict=True)]

    # -- reports --

    def _report_round(self, done: Mapping[str, _Done], num_passes: int, seconds: float) -> None:
        for name, run in self.active.items():
            loss, lr, result, num_tokens = done[name]
            run.left.stepped(seconds, num_tokens)
            run.report(
                step_event(
                    run.state,
                    run.num_steps,
                    loss=loss,
                    metrics={},
                    lr=lr,
                    grad_norm=result.grad_norm,
                    tokens_per_s=num_tokens / seconds,
                    eta_s=run.left.after(run.state.step),
                )
            )
        num_tokens = sum(each.num_tokens for each in done.values())
        told = {
            "event": "round",
            "round": self.round,
            "num_active": len(self.active),
            "num_passes": num_passes,
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / seconds,
            "eta_s": max(run.left.after(run.state.step) for run in self.active.values()),
        }
        self.reporter.report(told, None)

    def _checkpoint(self, run: _Adapter, best: _Best | None) -> None:
        """Write and report the best weights, or the last ones. The adapter has ended: the best replace the last."""
        state, optimizer = run.state, self.bank.state(run.name)
        is_last = best is None or best.state.step == state.step
        if best is not None and not is_last:
            masters = snapshots.split(best.masters_P, optimizer.masters)
            self.bank.restore(run.name, optimizer._replace(masters=masters))
            state = best.state
        folder = None
        if not self.world.rank:
            folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self.workdir))
            dtype = run.spec.publish.dtype or stored_dtype(self.base.path)
            self.bank.write(run.name, folder / ADAPTER, dtype)
            checkpoint.write_states(folder, optimizer if is_last else None, state)
        try:
            run.report({"event": "checkpoint", "step": state.step, "eval_loss": state.eval_loss}, folder)
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _save(self) -> None:
        """Write a snapshot of the adapters that go on, one after the other, so that there is no copy of all."""

        def write(folder: Path) -> None:
            adapters = dict[str, AdapterState]()
            for name, run in self.active.items():
                optimizer, best = self.bank.state(name), run.best
                snapshots.write_weights(folder, name, Weights(optimizer, best and best.masters_P))
                adapters[name] = AdapterState(
                    state=run.state, num_updates=optimizer.num_updates, best=best and best.state
                )
            snapshots.write_cohort(folder, CohortState(round=self.round, adapters=adapters))

        self.checkpoints.begin(None if self.world.rank else write, step=self.round, eval_loss=None)
        self.checkpoints.finish()


def _is_checkpoint_due(run: _Adapter) -> bool:
    interval = run.spec.checkpoint.interval_steps
    return interval is not None and run.state.step % interval == 0


def _held_out_parts(run: _Adapter) -> Iterator[Part]:
    rows = run.data.evaluation
    for planned in plan_evaluation(rows.lengths, run.spec.batch):
        length = max(int(rows.lengths[document]) for row in planned for document in row)
        yield Part(run.name, len(planned), length, partial(collate, rows, planned, packed=False))
