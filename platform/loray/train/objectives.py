"""The losses that a recipe names, as modules around the model: supervised fine-tuning, and preferences.

Cross-entropy is computed from hidden states in chunks, without a (positions × vocabulary) tensor.

Shapes: B rows, T positions, N positions with a label, C of them at once, D hidden size, V vocabulary; P pairs, whose
B = 2P rows are first the chosen answers, then the rejected ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from loray.planning.devices import loss_chunks
from loray.spec import DistillSpec, DpoSpec, KtoSpec, ObjectiveSpec, ObjectiveType, OrpoSpec, SimpoSpec, TrainSpec
from loray.train.attention.prefixes import PathSegments, PrefixTree, along_paths
from loray.train.data.batches import IGNORED, TrainBatch
from loray.train.divergence import cap_slopes, divergence, head_logits, needs_gradient
from loray.train.sequence import group_size, sum_over_group

Score = Callable[[TrainBatch], Tensor]


class _CrossEntropy(torch.autograd.Function):
    """−log softmax(h_n Wᵀ)[label_n] for each n, logits in fp32 or better; the head W is frozen.

    The forward pass also computes the gradient for the hidden states, (softmax − onehot) W, from the logits of each
    chunk: two matrix products per chunk, where recomputation in the backward pass would take three.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, soft_cap: float | None, with_grad: bool
    ) -> Tensor:
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        losses_N = hidden_ND.new_empty(len(labels_N), dtype=exact)
        grad_ND = torch.empty_like(hidden_ND) if with_grad else None
        for part in loss_chunks(len(hidden_ND), len(weight_VD), hidden_ND.device.type):
            labels_C1 = labels_N[part, None]
            logits_CV = head_logits(hidden_ND[part], weight_VD, soft_cap, exact)
            slopes_CV = cap_slopes(logits_CV, soft_cap if with_grad else None)
            normaliser_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            losses_N[part] = (normaliser_C1 - logits_CV.gather(1, labels_C1)).squeeze(1)
            if grad_ND is not None:
                logits_CV.sub_(normaliser_C1).exp_()  # softmax
                logits_CV.scatter_add_(1, labels_C1, logits_CV.new_full(labels_C1.shape, -1.0))
                if slopes_CV is not None:
                    logits_CV.mul_(slopes_CV)
                grad_ND[part] = logits_CV.to(weight_VD.dtype) @ weight_VD
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.to(grads[0].dtype) * grads[0][:, None]).to(grad_ND.dtype), None, None, None, None


def cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, soft_cap: float | None = None) -> Tensor:
    """Compute the losses (N,), in fp32 or better, of N labels, none of them −100, with the logits of `head_logits`.
    Differentiable in `hidden_ND` only.

    Raises ValueError where `weight_VD` is trained.
    """
    with_grad = needs_gradient(hidden_ND, weight_VD)
    arguments = (hidden_ND, weight_VD, labels_N, soft_cap, with_grad)
    losses_N: Tensor = _CrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return losses_N


class LabelledStates(NamedTuple):
    """Last hidden states of the N positions that `learned_BT` marks, their labels, and the output head, whose logits
    may have a soft cap.
    """

    hidden_ND: Tensor
    head_VD: Tensor
    labels_N: Tensor
    soft_cap: float | None
    learned_BT: Tensor

    def losses(self) -> Tensor:
        """Compute the labels' cross-entropies, (N,)."""
        return cross_entropy(self.hidden_ND, self.head_VD, self.labels_N, self.soft_cap)


def soft_cap_of(model: Any) -> float | None:
    """Find the soft cap on the logits of a transformers model."""
    return getattr(model.config, "final_logit_softcapping", None)


def labelled_states(model: Any, batch: TrainBatch) -> LabelledStates:
    """Run a transformers model on one micro-batch. The head skips positions without a label."""
    device = next(model.parameters()).device
    hidden_BTD = model.base_model(**batch.model_inputs(device), use_cache=False).last_hidden_state
    labels_BT = batch.labels_BT.to(device)
    learned_BT = labels_BT != IGNORED
    head_VD = model.get_output_embeddings().weight
    return LabelledStates(hidden_BTD[learned_BT], head_VD, labels_BT[learned_BT], soft_cap_of(model), learned_BT)


def tree_losses(model: Any, trees: Sequence[PrefixTree], targets: Sequence[NDArray[np.int64]]) -> Tensor:
    """Compute the losses of the targets of all sequences of trees, one after the other (N,), in fp32 or better.

    Each sequence has a target for each token. A target that sequences share from the same prefix is computed once.
    """
    device = next(model.parameters()).device
    length = max(map(len, trees))
    ids_BT, positions_BT = (
        torch.tensor([values + [0] * (length - len(values)) for values in of_trees], device=device)
        for of_trees in ([tree.token_ids for tree in trees], [tree.positions for tree in trees])
    )
    nodes_N = np.concatenate([np.array(nodes) + b * length for b, tree in enumerate(trees) for nodes in tree.nodes])
    head_VD = model.get_output_embeddings().weight
    pairs_L, of_N = np.unique(nodes_N * len(head_VD) + np.concatenate(targets), return_inverse=True)
    nodes_L, labels_L = (torch.from_numpy(ids_L).to(device) for ids_L in divmod(pairs_L, len(head_VD)))
    with along_paths(PathSegments.of(trees, length, device)):
        hidden_BTD = model.base_model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
    hidden_LD = hidden_BTD.flatten(0, 1).index_select(0, nodes_L)
    losses_L = cross_entropy(hidden_LD, head_VD, labels_L, soft_cap_of(model))
    return losses_L.index_select(0, torch.from_numpy(of_N).to(device))


def batch_loss(model: Any, batch: TrainBatch) -> Tensor:
    """Sum the losses of a micro-batch, in fp32 or better. Divide once, by the number of labels of the whole step."""
    return labelled_states(model, batch).losses().sum()


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

    def counts(self, batch: TrainBatch, score: Score) -> Mapping[str, float]:
        """Count the batch's terms by their kinds, which are the same for every batch. `score`, for sums that a loss
        takes over the whole step, computes the log-probabilities (B,) of a batch's rows without gradients.
        """
        return {"targets": batch.num_targets}

    def learned(self, batch: TrainBatch) -> TrainBatch:
        """Take the rows that `forward` is to have."""
        return batch

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

    def counts(self, batch: TrainBatch, score: Score) -> Mapping[str, float]:
        return {"pairs": batch.num_pairs}

    def forward(self, batch: TrainBatch, totals: Mapping[str, float]) -> Tensor:
        policy_B, num_targets_B = log_probs(self.model, batch)
        if batch.reference_B is None:
            return policy_B
        reference_B = batch.reference_B.to(policy_B)
        divisor = totals["pairs"] * group_size()  # all ranks that share the rows have their whole loss
        has_labels_P = num_targets_B.chunk(2)[0] > 0  # a batch that fills up a step has none
        losses_P = pair_losses(policy_B - reference_B, num_targets_B, self._spec)
        self._parts.append(reward_sums(policy_B.detach() - reference_B, has_labels_P, self._spec.beta) / divisor)
        return summed([losses_P], has_labels_P)[0] / divisor


class OddsRatioObjective(Objective):
    """ORPO (Hong et al., EMNLP 2024): the cross-entropy of chosen answers with their prompts (equation 6), and the odds
    ratio of both answers (equation 7), where an answer's probability is that of its mean token.
    """

    def __init__(self, model: Any, spec: OrpoSpec) -> None:
        super().__init__(model, spec)
        self._beta = spec.beta

    def counts(self, batch: TrainBatch, score: Score) -> Mapping[str, float]:
        return {"pairs": batch.num_pairs, "chosen": int((self._chosen(batch) != IGNORED).sum())}

    def forward(self, batch: TrainBatch, totals: Mapping[str, float]) -> Tensor:
        answers_BT = batch.labels_BT != IGNORED
        chosen_PT = self._chosen(batch)
        labels_BT = torch.cat([chosen_PT, batch.labels_BT[len(chosen_PT) :]])
        losses_BT = label_losses(self.model, batch._replace(labels_BT=labels_BT))
        answers_BT = answers_BT.to(losses_BT.device)
        sums_B, num_targets_B = sum_over_group(-(losses_BT * answers_BT).sum(1), answers_BT.sum(1))
        has_labels_P = num_targets_B.chunk(2)[0] > 0
        means_B = sums_B / num_targets_B.clamp(min=1)
        divisor = totals["pairs"] * group_size()
        log_odds_P = log_odds(means_B)
        ratios_P = F.logsigmoid(log_odds_P)
        nll = losses_BT[: len(chosen_PT)].sum().double() / totals["chosen"]  # of this rank's part of the rows
        of_pairs = summed([ratios_P, log_odds_P], has_labels_P) / divisor
        rewards = reward_sums(means_B.detach(), has_labels_P, self._beta) / divisor
        self._parts.append(torch.cat([rewards, nll.detach()[None], of_pairs.detach()]))
        return nll - self._beta * of_pairs[0]

    @staticmethod
    def _chosen(batch: TrainBatch) -> Tensor:
        """The labels of chosen answers and their prompts, (P, T): of those that have any."""
        assert batch.following_BT is not None
        return batch.following_BT[: len(batch.following_BT) // 2]


class MarginObjective(Objective):
    """SimPO (Meng et al., NeurIPS 2024), equation 6, and the cross-entropy of chosen answers with the weight
    `cpo_alpha` (CPO: Xu et al., ICML 2024).
    """

    def __init__(self, model: Any, spec: SimpoSpec) -> None:
        super().__init__(model, spec)
        self._spec = spec

    def counts(self, batch: TrainBatch, score: Score) -> Mapping[str, float]:
        chosen_PT = batch.labels_BT[: len(batch.labels_BT) // 2]
        return {"pairs": batch.num_pairs, "targets": int((chosen_PT != IGNORED).sum())}

    def forward(self, batch: TrainBatch, totals: Mapping[str, float]) -> Tensor:
        spec = self._spec
        sums_B, num_targets_B = log_probs(self.model, batch)
        has_labels_P = num_targets_B.chunk(2)[0] > 0
        means_B = sums_B / num_targets_B.clamp(min=1)
        chosen_P, rejected_P = means_B.chunk(2)
        losses_P = -F.logsigmoid(spec.beta * (chosen_P - rejected_P) - spec.simpo_gamma)
        divisor = totals["pairs"] * group_size()
        nll = -sums_B.chunk(2)[0].sum().double() / (totals["targets"] * group_size())
        rewards = reward_sums(means_B.detach(), has_labels_P, spec.beta) / divisor
        self._parts.append(torch.cat([rewards, nll.detach()[None]]))
        return summed([losses_P], has_labels_P)[0] / divisor + spec.cpo_alpha * nll


class UnpairedObjective(Objective):
    """KTO (Ethayarajh et al., ICML 2024), equation 8, on answers that are desirable or not.

    The reference point, an estimate of the KL divergence that is at least 0, is one of a step: the mean log-ratio of
    its prompts with the answers of other prompts. A batch of P answers has P such rows after them.
    """

    def __init__(self, model: Any, spec: KtoSpec) -> None:
        super().__init__(model, spec)
        self._spec = spec

    def counts(self, batch: TrainBatch, score: Score) -> Mapping[str, float]:
        assert batch.desirable_P is not None
        unrelated = _side(batch, 1)
        assert unrelated.reference_B is not None
        ratios_P = score(unrelated._replace(reference_B=None)).cpu() - unrelated.reference_B
        has_labels_P = (unrelated.labels_BT != IGNORED).any(1)  # a batch that fills up a step has none
        num_rows, num_desirable = int(has_labels_P.sum()), int((has_labels_P & batch.desirable_P).sum())
        kl = float(summed([ratios_P], has_labels_P))
        return {"rows": num_rows, "desirable": num_desirable, "undesirable": num_rows - num_desirable, "kl": kl}

    def learned(self, batch: TrainBatch) -> TrainBatch:
        return _side(batch, 0)

    def forward(self, batch: TrainBatch, totals: Mapping[str, float]) -> Tensor:
        policy_P, num_targets_P = log_probs(self.model, batch)
        if batch.reference_B is None:
            return policy_P
        assert batch.desirable_P is not None
        spec, has_labels_P = self._spec, num_targets_P > 0
        desirable_P = batch.desirable_P.to(policy_P.device)
        ratios_P = policy_P - batch.reference_B.to(policy_P)
        kl = max(0.0, totals["kl"] / totals["rows"])
        losses_P = 1 - torch.sigmoid(spec.beta * torch.where(desirable_P, ratios_P - kl, kl - ratios_P))
        losses_P = torch.where(desirable_P, spec.desirable_weight * losses_P, spec.undesirable_weight * losses_P)
        size = group_size()
        rewards_P = spec.beta * ratios_P.detach()
        chosen = summed([rewards_P], has_labels_P & desirable_P)[0] / (max(totals["desirable"], 1) * size)
        rejected = summed([rewards_P], has_labels_P & ~desirable_P)[0] / (max(totals["undesirable"], 1) * size)
        share = has_labels_P.sum().double() / (totals["rows"] * size)
        self._parts.append(torch.stack([chosen, rejected, chosen - rejected, kl * share]))
        return summed([losses_P], has_labels_P)[0] / (totals["rows"] * size)


class DistillationObjective(Objective):
    """Distillation: the divergence from a teacher's likeliest tokens, mixed with the cross-entropy of the labels
    (`loray.train.divergence`).
    """

    def __init__(self, model: Any, spec: DistillSpec) -> None:
        super().__init__(model, spec)
        self._spec = spec

    def forward(self, batch: TrainBatch, totals: Mapping[str, float]) -> Tensor:
        hidden_ND, head_VD, labels_N, soft_cap, learned_BT = labelled_states(self.model, batch)
        assert batch.teacher_ids_BTK is not None
        assert batch.teacher_log_probs_BTK is not None
        ids_NK, log_probs_NK = (
            of_teacher.to(learned_BT.device)[learned_BT]
            for of_teacher in (batch.teacher_ids_BTK, batch.teacher_log_probs_BTK)
        )
        spec = self._spec
        is_reverse = spec.divergence == "reverse"
        found = divergence(
            *(hidden_ND, head_VD, labels_N, ids_NK, log_probs_NK),
            weight=spec.weight,
            is_reverse=is_reverse,
            soft_cap=soft_cap,
        )
        loss, *parts = (values_N.sum().double() / totals["targets"] for values_N in found)
        self._parts.append(torch.stack(parts))
        return loss


def _side(batch: TrainBatch, side: int) -> TrainBatch:
    """Take the first or the second sequences of a batch's rows."""

    def half(tensor_BT: Tensor | None) -> Tensor | None:
        return None if tensor_BT is None else tensor_BT.chunk(2)[side]

    labels_PT, document_ids_PT = batch.labels_BT.chunk(2)[side], half(batch.document_ids_BT)
    num_tokens = labels_PT.numel() if document_ids_PT is None else int((document_ids_PT >= 0).sum())
    return batch._replace(
        input_ids_BT=batch.input_ids_BT.chunk(2)[side],
        labels_BT=labels_PT,
        document_ids_BT=document_ids_PT,
        position_ids_BT=half(batch.position_ids_BT),
        reference_B=half(batch.reference_B),
        following_BT=half(batch.following_BT),
        num_tokens=num_tokens if batch.num_tokens else 0,
        num_targets=int((labels_PT != IGNORED).sum()),
    )


def label_losses(model: Any, batch: TrainBatch) -> Tensor:
    """Compute the loss of each position (B, T), 0 where it has no label."""
    states = labelled_states(model, batch)
    losses_N, learned_BT = states.losses(), states.learned_BT
    return losses_N.new_zeros(learned_BT.shape).masked_scatter(learned_BT, losses_N)


def log_probs(model: Any, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each whole row's targets, in fp32 or better, and count them; both (B,)."""
    losses_BT = label_losses(model, batch)
    num_targets_B = (batch.labels_BT != IGNORED).sum(1).to(losses_BT.device)
    log_probs_B, num_targets_B = sum_over_group(-losses_BT.sum(1), num_targets_B)
    return log_probs_B, num_targets_B


def log_odds(means_B: Tensor) -> Tensor:
    """Compute the log odds (P,) of chosen answers over rejected ones, log p/(1 − p), from log p, (B,)."""
    means_B = means_B.clamp(max=-torch.finfo(means_B.dtype).eps)  # the odds of p = 1 are infinite
    # 1 − p is exact by expm1 where p is near 1, and by log1p where it is near 0.
    near_B = means_B > -math.log(2)
    log1mexp_B = torch.where(
        near_B,
        torch.log(-torch.expm1(means_B.masked_fill(~near_B, -1.0))),
        torch.log1p(-torch.exp(means_B.masked_fill(near_B, -1.0))),
    )
    chosen_P, rejected_P = (means_B - log1mexp_B).chunk(2)
    return chosen_P - rejected_P


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
    """Sum REWARDS over pairs, in fp64: a reward is β times a log-ratio (DPO's equation 5) or a log-probability."""
    chosen_P, rejected_P = (beta * log_ratios_B).chunk(2)
    return summed([chosen_P, rejected_P, (chosen_P > rejected_P).float(), chosen_P - rejected_P], has_labels_P)


def summed(values: Sequence[Tensor], counted_P: Tensor) -> Tensor:
    """Sum each of the values (P,) over the rows that count, and give the sums in fp64."""
    return torch.stack([torch.where(counted_P, values_P, 0.0).sum() for values_P in values]).double()


def objective_of(model: Any, spec: TrainSpec) -> Objective:
    """Make the objective that the recipe names."""
    return _OBJECTIVES[spec.objective.type](model, spec.objective)


_OBJECTIVES: Mapping[ObjectiveType, Callable[[Any, Any], Objective]] = {
    "sft": Objective,
    "dpo": PreferenceObjective,
    "orpo": OddsRatioObjective,
    "simpo": MarginObjective,
    "kto": UnpairedObjective,
    "distill": DistillationObjective,
}
