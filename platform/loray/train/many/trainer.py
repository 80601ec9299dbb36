"""Forward and backward passes of many models' data, joined, and their optimizer steps: what a trainer computes.

Shapes: B rows and T positions of a pass, N of its positions that a datum has, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loray.adapters.peft_format import AdapterFiles
from loray.errors import ContextLengthExceeded, LorayError, NotFoundError, RequestError, TrainingError
from loray.methods.weights import AdapterWeights
from loray.spec import AdapterSpec, DType, OptimizerSpec
from loray.spec.datums import Array, Datum, ForwardBackward, LossOutput, OptimStep
from loray.telemetry import get_logger
from loray.train.attention.prefixes import PrefixTree, plant
from loray.train.data.batches import IGNORED, TrainBatch
from loray.train.hooks import takes_paths
from loray.train.many.bank import AdapterBank
from loray.train.many.optimizer import Update, update
from loray.train.many.passes import grouped
from loray.train.objectives import labelled_states, tree_losses
from loray.train.optimizer import OptimizerState
from loray.train.rl.losses import FlatDatums, token_losses

log = get_logger(__name__)

_WORTH = 0.8  # of the datums' tokens, the most that a tree computes: with more, rows of their own are as fast
_PATHS = 8  # tokens of a tree's datums, as a multiple of a pass's: attention holds those of one layer at a time


class _Row(NamedTuple):
    """Datums of an operation, by their numbers: one, or those of a tree."""

    model: str
    op: int
    numbers: Sequence[int]
    length: int
    tree: PrefixTree | None = None
    num_rows: int = 1

    @property
    def is_packed(self) -> bool:
        return self.tree is not None


class _Output:
    """Holds what the passes of one operation have computed so far."""

    def __init__(self, num_datums: int) -> None:
        self.logprobs: list[Array | None] = [None] * num_datums
        self.loss = 0.0
        self.metrics: dict[str, float] = {}


class BankTrainer:
    """Computes the operations of many models, each an adapter of a bank.

    Operations given together share passes, whatever their models, ranks and losses; each has what it has alone. One
    that fails leaves the gradients of its model as they were, and concerns no other. What datums of an operation begin
    with in common is computed once.
    """

    def __init__(self, bank: AdapterBank, tokens_per_pass: int) -> None:
        self.bank = bank
        self._tokens_per_pass = tokens_per_pass
        self._has_gradients: set[str] = set()
        bank.model.eval()

    # -- models -------------------------------------------------------------------------------------------------------

    def create(self, model: str, spec: AdapterSpec, *, seed: int, weights: AdapterWeights | None = None) -> None:
        """Begin a model, with new weights from `seed` or with `weights`. Raises as `AdapterBank.add`."""
        self.bank.add(model, spec, seed=seed, weights=weights)

    def remove(self, model: str) -> None:
        """Forget a model."""
        self.bank.remove(model)
        self._has_gradients.discard(model)

    def files(self, model: str, dtype: DType) -> AdapterFiles:
        """Copy a model's weights in PEFT's format."""
        return self.bank.files(model, dtype)

    def files_in_memory(self, model: str, dtype: DType) -> dict[str, bytes]:
        """Copy a model's weights as the bytes of files in PEFT's format."""
        return self.bank.files_in_memory(model, dtype)

    def state(self, model: str) -> tuple[OptimizerState, dict[str, Tensor]]:
        """Copy the optimizer's state of a model, and the gradients that no step has used, none where they are 0."""
        has_any = model in self._has_gradients
        gradients = {n: t.to("cpu", copy=True) for n, t in self.bank.gradients(model).items()} if has_any else {}
        return self.bank.state(model), gradients

    @torch.no_grad()
    def restore(self, model: str, state: OptimizerState, gradients: dict[str, Tensor] | None = None) -> None:
        """Take what `state` gave, or a state of a checkpoint. Raises SpecError where it is of another adapter."""
        self.bank.restore(model, state)
        self._has_gradients.discard(model)
        if gradients:
            for name, gradient in self.bank.gradients(model).items():
                gradient.copy_(gradients[name])
            self._has_gradients.add(model)

    # -- operations ---------------------------------------------------------------------------------------------------

    def forward_backward(self, ops: Sequence[ForwardBackward]) -> list[LossOutput | LorayError]:
        """Compute the losses, and add their gradients to those of the models where an operation asks for them.

        Log-probabilities are of all positions, also of weight 0. A result is RequestError where the data cannot be
        computed, NotFoundError where there is no such model, and TrainingError where a loss or gradient is not finite.
        """
        results: list[LossOutput | LorayError | None] = [self._refused(op) for op in ops]
        chosen = [i for i, refused in enumerate(results) if refused is None]
        models = sorted({ops[i].model for i in chosen if not ops[i].forward_only})
        before = {model: self._gradient(model).clone() for model in models if model in self._has_gradients}
        try:
            outputs = self._compute([ops[i] for i in chosen])
            failed = self._failed([ops[i] for i in chosen], outputs, models)
        except Exception as e:  # noqa: BLE001 - an operation's own failure must not be that of the process
            log.warning("%d operations could not be computed together: %s", len(chosen), e)
            outputs, failed = [], dict.fromkeys((ops[i].model for i in chosen), f"{type(e).__name__}: {e}")
        with torch.no_grad():
            for model in failed.keys() & {*models}:
                if model in before:
                    self._gradient(model).copy_(before[model])
                else:
                    self.bank.zero_gradients([model])
        self._has_gradients |= {*models} - failed.keys()
        for place, i in enumerate(chosen):
            why = failed.get(ops[i].model)
            if why is None:
                results[i] = outputs[place]
            elif len(chosen) == 1:
                results[i] = TrainingError(f"{why}; the gradients are as they were before")
            else:  # what was computed beside it is computed again, by itself
                (results[i],) = self.forward_backward([ops[i]])
        return [result for result in results if result is not None]

    def optim_step(self, ops: Sequence[OptimStep]) -> list[dict[str, float] | LorayError]:
        """Step each model, of which there is one operation, by its gradients, which are 0 afterwards.

        Metrics are `grad_norm`, before clipping, and `num_updates` of the model so far. TrainingError where the sum of
        the gradients is not finite: then nothing changes but that they are 0.
        """
        known = [op for op in ops if op.model in self.bank]
        done = update(self.bank, [Update(op.model, op.adam.learning_rate, _optimizer(op)) for op in known])
        self._has_gradients -= done.keys()
        results: list[dict[str, float] | LorayError] = []
        for op in ops:
            if op.model not in done:
                results.append(NotFoundError(f"the trainer has no model {op.model!r}"))
            elif done[op.model].skipped:
                results.append(TrainingError("the sum of the gradients was not finite; the step was skipped"))
            else:
                metrics = {"grad_norm": done[op.model].grad_norm}
                results.append(metrics | {"num_updates": float(self.bank.num_updates(op.model))})
        return results

    # -- inside -------------------------------------------------------------------------------------------------------

    def _refused(self, op: ForwardBackward) -> LorayError | None:
        if op.model not in self.bank:
            return NotFoundError(f"the trainer has no model {op.model!r}")
        head_VD = self.bank.model.get_output_embeddings().weight
        context = self.bank.base.config.max_position_embeddings
        for i, datum in enumerate(op.datums):
            if len(datum) > context:
                return ContextLengthExceeded(f"datum {i} has {len(datum)} tokens; the base has a context of {context}")
            for what, ids in (("token", datum.token_ids), ("target", datum.target_ids)):
                if ids.min() < 0 or ids.max() >= len(head_VD):
                    wrong = int(ids.min() if ids.min() < 0 else ids.max())
                    return RequestError(f"datum {i} has the {what} {wrong}; the base knows 0 to {len(head_VD) - 1}")
        return None

    def _compute(self, ops: Sequence[ForwardBackward]) -> list[LossOutput]:
        outputs = [_Output(len(op.datums)) for op in ops]
        for forward_only in (False, True):
            rows = [row for i, op in enumerate(ops) if op.forward_only == forward_only for row in self._rows(i, op)]
            for group in grouped(rows, self._tokens_per_pass):
                places = {model: place for place, model in enumerate(self.bank.order({row.model for row in group}))}
                ordered = sorted(group, key=lambda row: (places[row.model], row.op, row.numbers[0]))
                with torch.no_grad() if forward_only else nullcontext():
                    self._pass(ops, ordered, outputs, with_gradients=not forward_only)
        return [LossOutput(tuple(o.logprobs), o.loss, o.metrics) for o in outputs]  # type: ignore[arg-type]

    def _rows(self, i: int, op: ForwardBackward) -> list[_Row]:
        """Make trees of the datums where these have a good deal in common, else a row of each."""
        if len(op.datums) > 1 and takes_paths(self.bank.model.config):
            sequences = [datum.token_ids for datum in op.datums]
            trees = plant(sequences, self._tokens_per_pass, _PATHS * self._tokens_per_pass)
            if sum(map(len, trees)) <= _WORTH * sum(map(len, sequences)):
                numbers = iter(range(len(sequences)))
                return [_Row(op.model, i, [next(numbers) for _ in tree.nodes], len(tree), tree) for tree in trees]
        return [_Row(op.model, i, [number], len(datum)) for number, datum in enumerate(op.datums)]

    def _pass(
        self, ops: Sequence[ForwardBackward], rows: Sequence[_Row], outputs: Sequence[_Output], *, with_gradients: bool
    ) -> None:
        """Compute rows of one pass, whose order is the bank's."""
        model, device = self.bank.model, self.bank.model.get_input_embeddings().weight.device
        datums = _datums(ops, rows)
        reference_N = self._reference(ops, rows)
        if model.training != with_gradients:
            model.train(with_gradients)  # for dropout
        with self.bank.rows([row.model for row in rows], max(row.length for row in rows)):
            logprobs_N = self._logprobs(ops, rows)
            total = logprobs_N.new_zeros((), dtype=torch.float64)
            for i, part, place in _parts(ops, rows):
                own = FlatDatums.of(datums[part], device, None if reference_N is None else reference_N[place])
                loss, told = token_losses(ops[i].loss, logprobs_N[place], own)
                total = total + loss
                output = outputs[i]
                output.loss += float(loss.detach())
                for name, value in told.items():
                    output.metrics[name] = output.metrics.get(name, 0.0) + float(value)
            if with_gradients:
                total.backward()  # type: ignore[no-untyped-call]
        values_N = logprobs_N.detach().cpu().numpy()
        owners = [(row.op, number) for row in rows for number in row.numbers]
        ends = np.cumsum([len(datum) for datum in datums])
        for (op, number), datum, end in zip(owners, datums, ends, strict=True):
            outputs[op].logprobs[number] = values_N[end - len(datum) : end].copy()

    def _logprobs(self, ops: Sequence[ForwardBackward], rows: Sequence[_Row]) -> Tensor:
        """Compute the log-probabilities of the targets of the rows' datums, (N,)."""
        datums, trees = _datums(ops, rows), [row.tree for row in rows if row.tree is not None]
        if trees:
            return -tree_losses(self.bank.model, trees, [datum.target_ids for datum in datums])
        return -labelled_states(self.bank.model, _batch(datums)).losses()

    def _reference(self, ops: Sequence[ForwardBackward], rows: Sequence[_Row]) -> Tensor | None:
        """Compute the base's log-probabilities (N,) of the rows whose loss has a divergence from it; 0 of others."""
        asking = [row for row in rows if ops[row.op].loss.kl]
        if not asking:
            return None
        self.bank.model.eval()
        with torch.no_grad(), self.bank.without_adapters():
            found_N = self._logprobs(ops, asking)
        asks = [bool(ops[row.op].loss.kl) for row in rows for _ in row.numbers]
        asks_N = torch.tensor(np.repeat(asks, [len(datum) for datum in _datums(ops, rows)]), device=found_N.device)
        return found_N.new_zeros(len(asks_N)).masked_scatter(asks_N, found_N)

    def _failed(
        self, ops: Sequence[ForwardBackward], outputs: Sequence[LossOutput], models: Sequence[str]
    ) -> dict[str, str]:
        """Find the models of which something is not finite, and what."""
        norms = self.bank.gradient_norms(models)
        failed = {m: "the gradient is not finite" for m in models if not math.isfinite(norms[m])}
        for op, output in zip(ops, outputs, strict=True):
            if not math.isfinite(output.loss):
                failed[op.model] = f"the loss is {output.loss}"
        return failed

    def _gradient(self, model: str) -> Tensor:
        bucket, slot = self.bank.place(model)
        return bucket.memory.gradient[slot]


def _datums(ops: Sequence[ForwardBackward], rows: Sequence[_Row]) -> list[Datum]:
    return [ops[row.op].datums[number] for row in rows for number in row.numbers]


def _parts(ops: Sequence[ForwardBackward], rows: Sequence[_Row]) -> Iterator[tuple[int, slice, slice]]:
    """Yield an operation's number, its datums, and their positions of the pass's N."""
    first = at = 0
    for op, own in groupby(rows, lambda row: row.op):
        lengths = [len(datum) for datum in _datums(ops, list(own))]
        yield op, slice(first, first + len(lengths)), slice(at, at + sum(lengths))
        first, at = first + len(lengths), at + sum(lengths)


def _batch(datums: Sequence[Datum]) -> TrainBatch:
    """Pad rows on the right, where causal attention does not look."""
    shape = (len(datums), max(map(len, datums)))
    ids_BT, targets_BT = np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for b, datum in enumerate(datums):
        ids_BT[b, : len(datum)] = datum.token_ids
        targets_BT[b, : len(datum)] = datum.target_ids
    num_tokens = sum(map(len, datums))
    return TrainBatch(torch.from_numpy(ids_BT), torch.from_numpy(targets_BT), None, None, num_tokens, num_tokens)


def _optimizer(op: OptimStep) -> OptimizerSpec:
    adam = op.adam
    return OptimizerSpec(
        learning_rate=1.0,  # `Update` has it
        beta1=adam.beta1,
        beta2=adam.beta2,
        eps=adam.eps,
        weight_decay=adam.weight_decay,
        max_grad_norm=adam.grad_clip_norm or None,
    )
