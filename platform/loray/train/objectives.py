"""The losses that a recipe names, as modules around the model: supervised fine-tuning, and preferences (DPO).

Cross-entropy is computed from hidden states in chunks, without a (positions × vocabulary) tensor.

Shapes: B rows, T positions, N positions with a label, C of them at once, D hidden size, V vocabulary; P pairs, whose
B = 2P rows are first the chosen answers, then the rejected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loray.planning.devices import LOSS_CHUNK, LOSS_CHUNK_ON_CPU
from loray.spec import DpoSpec, ObjectiveSpec, ObjectiveType, TrainSpec
from loray.train.data.batches import IGNORED, TrainBatch
from loray.train.sequence import group_size, sum_over_group


class _CrossEntropy(torch.autograd.Function):
    """−log softmax(h_n Wᵀ)[label_n] for each n, logits upcast to fp32; the head W is frozen.

    The forward pass also computes the gradient for the hidden states, (softmax − onehot) W, from the logits of each
    chunk: two matrix products per chunk, where recomputation in the backward pass would take three.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, with_grad: bool) -> Tensor:
        losses_N = hidden_ND.new_empty(len(labels_N), dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND) if with_grad else None
        elements = LOSS_CHUNK_ON_CPU if hidden_ND.device.type == "cpu" else LOSS_CHUNK
        rows = max(1, elements // weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            labels_C1 = labels_N[part, None]
            logits_CV = (hidden_ND[part] @ weight_VD.T).float()
            normaliser_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            losses_N[part] = (normaliser_C1 - logits_CV.gather(1, labels_C1)).squeeze(1)
            if grad_ND is not None:
                logits_CV.sub_(normaliser_C1).exp_()  # softmax
                logits_CV.scatter_add_(1, labels_C1, logits_CV.new_full(labels_C1.shape, -1.0))
                grad_ND[part] = logits_CV.to(weight_VD.dtype) @ weight_VD
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.float() * grads[0][:, None]).to(grad_ND.dtype), None, None, None


def cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Compute the losses (N,), fp32, of N labels, none of them −100. Differentiable in `hidden_ND` only.

    Raises ValueError where `weight_VD` is trained.
    """
    if weight_VD.requires_grad and torch.is_grad_enabled():
        raise ValueError("the output head is trained, but this loss holds it frozen")
    with_grad = hidden_ND.requires_grad and torch.is_grad_enabled()
    losses_N: Tensor = _CrossEntropy.apply(hidden_ND, weight_VD, labels_N, with_grad)  # type: ignore[no-untyped-call]
    return losses_N


class LabelledStates(NamedTuple):
    """Last hidden states of the N positions that `learned_BT` marks, their labels, and the output head."""

    hidden_ND: Tensor
    head_VD: Tensor
    labels_N: Tensor
    learned_BT: Tensor


def labelled_states(model: Any, batch: TrainBatch) -> LabelledStates:
    """Run a transformers model on one micro-batch. The head skips positions without a label."""
    device = next(model.parameters()).device
    hidden_BTD = model.base_model(**batch.model_inputs(device), use_cache=False).last_hidden_state
    labels_BT = batch.labels_BT.to(device)
    learned_BT = labels_BT != IGNORED
    head_VD = model.get_output_embeddings().weight
    return LabelledStates(hidden_BTD[learned_BT], head_VD, labels_BT[learned_BT], learned_BT)


def batch_loss(model: Any, batch: TrainBatch) -> Tensor:
    """Sum the losses of a micro-batch, in fp32. Divide once, by the number of labels of the whole step."""
    return cross_entropy(*labelled_states(model, batch)[:3]).sum()


class Objective(nn.Module):
    """Cross-entropy of a batch's labels, as a module around the model: strategies gather parameters at a module's call.

    A loss is a sum of means, each over terms of its own kind: labels here, pairs elsewhere. The loop sums the `counts`
    of a step over micro-batches and ranks, and each micro-batch then computes its part of every mean.

    metrics  names of further figures, which are means, too
    """

    def __init__(self, model: Any, spec: ObjectiveSpec) -> None:
        super().__init__()
        self.model = model
        self.metrics = spec.metrics
        self._parts: list[Tensor] = []  # of the means `metrics`, of each call

    def counts(self, batch: TrainBatch) -> Mapping[str, float]:
        """Count the batch's terms by their kinds, which are the same for every batch."""
        return {"targets": batch.num_targets}

    def forward(self, batch: TrainBatch, totals: Mapping[str, float]) -> Tensor:
        """Compute the batch's part of the mean loss, a scalar in fp64. `totals` are the counts of all batches that the
        mean is over.
        """
        return batch_loss(self.model, batch).double() / totals["targets"]

    def take(self) -> tuple[float, ...]:
        """Take the parts of `metrics` of all calls since the last time, summed."""
        parts, self._parts = self._parts, []
        return tuple(torch.stack(parts).sum(0).tolist()) if parts else (0.0,) * len(self.metrics)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """List the trained parameters by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


class PreferenceObjective(Objective):
    """Direct Preference Optimization (Rafailov et al., NeurIPS 2023): a loss over pairs of answers to the same prompt.

    The reference is the model before the first step: a batch has its log-probabilities, and for one that has none
    those of the model are the result, (B,) (`loray.train.reference`). `metrics` are TRL's.
    """

    def __init__(self, model: Any, spec: DpoSpec) -> None:
        super().__init__(model, spec)
        self._spec = spec

    def counts(self, batch: TrainBatch) -> Mapping[str, float]:
        return {"pairs": batch.num_pairs or 0}

    def forward(self, batch: TrainBatch, totals: Mapping[str, float]) -> Tensor:
        policy_B, num_targets_B = log_probs(self.model, batch)
        if batch.reference_B is None:
            return policy_B
        reference_B = batch.reference_B.to(policy_B)
        divisor = totals["pairs"] * group_size()  # all ranks that share the rows have their whole loss
        has_labels_P = num_targets_B.chunk(2)[0] > 0  # a batch that fills up a step has none
        losses_P = pair_losses(policy_B - reference_B, num_targets_B, self._spec)
        rewards = reward_sums(policy_B.detach() - reference_B, has_labels_P, self._spec.beta)
        self._parts.append(rewards.double() / divisor)
        return torch.where(has_labels_P, losses_P, 0.0).sum().double() / divisor


def log_probs(model: Any, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each whole row's targets, in fp32, and count them; both (B,)."""
    *states, learned_BT = labelled_states(model, batch)
    losses_N = cross_entropy(*states)
    losses_BT = losses_N.new_zeros(learned_BT.shape).masked_scatter(learned_BT, losses_N)
    log_probs_B, num_targets_B = sum_over_group(-losses_BT.sum(1), learned_BT.sum(1))
    return log_probs_B, num_targets_B


def pair_losses(log_ratios_B: Tensor, num_targets_B: Tensor, spec: DpoSpec) -> Tensor:
    """Compute the losses (P,). `log_ratios_B`: log π(answer) − log π_ref(answer), a sum over the answer's
    `num_targets_B` tokens.

    sigmoid  −log σ(β Δ), with Δ the chosen log-ratio minus the rejected one (equation 7)
    robust   (−(1 − ε) log σ(β Δ) + ε log σ(−β Δ)) / (1 − 2ε), with ε the label smoothing (Chowdhury et al., 2024)
    ipo      (Δ' − 1/(2β))², Δ' of log-ratios a token (Azar et al., 2023)
    hinge    max(0, 1 − β Δ)
    """
    if spec.loss_type == "ipo":
        log_ratios_B = log_ratios_B / num_targets_B.clamp(min=1)
    chosen_P, rejected_P = log_ratios_B.chunk(2)
    delta_P = chosen_P - rejected_P
    match spec.loss_type:
        case "ipo":
            return (delta_P - 1 / (2 * spec.beta)).square()
        case "hinge":
            return F.relu(1 - spec.beta * delta_P)
        case "sigmoid":
            return -F.logsigmoid(spec.beta * delta_P)
        case "robust":
            flipped, logits_P = spec.label_smoothing, spec.beta * delta_P
            unscaled_P = flipped * F.logsigmoid(-logits_P) - (1 - flipped) * F.logsigmoid(logits_P)
            return unscaled_P / (1 - 2 * flipped)


def reward_sums(log_ratios_B: Tensor, has_labels_P: Tensor, beta: float) -> Tensor:
    """Sum REWARDS over pairs: a reward is β times a log-ratio (equation 5)."""
    chosen_P, rejected_P = (beta * log_ratios_B).chunk(2)
    rows = (chosen_P, rejected_P, (chosen_P > rejected_P).float(), chosen_P - rejected_P)
    return torch.stack([torch.where(has_labels_P, row_P, 0.0).sum() for row_P in rows])


def objective_of(model: Any, spec: TrainSpec) -> Objective:
    """Make the objective that the recipe names."""
    return _OBJECTIVES[spec.objective.type](model, spec.objective)


_OBJECTIVES: Mapping[ObjectiveType, Callable[[Any, Any], Objective]] = {"sft": Objective, "dpo": PreferenceObjective}
