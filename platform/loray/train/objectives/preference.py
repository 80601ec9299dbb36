"""Direct Preference Optimization (Rafailov et al., NeurIPS 2023): a loss over pairs of answers to the same prompt.

The reference is the base: the same model with the adapter off, on the same rows, without gradients, in the same step.

Shapes: P pairs, B = 2P rows (first the chosen answers, then the rejected ones), T positions, N positions with a label.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.adapters.inject import AdapterSwitch
from loray.spec import REWARDS, DpoSpec
from loray.train.data.batches import Batch
from loray.train.loss import Objective, label_losses


class PreferenceObjective(Objective):
    """The sum of a batch's pair losses; sums of TRL's metrics over pairs are kept until `take`."""

    METRICS = REWARDS

    def __init__(self, model: Any, spec: DpoSpec) -> None:
        super().__init__(model)
        self._spec = spec
        self._switch = AdapterSwitch(model)
        self._sums: list[Tensor] = []

    def forward(self, batch: Batch) -> Tensor:
        """Scalar fp32: the sum over the batch's pairs."""
        with torch.no_grad(), self._switch.off():
            reference_B, num_targets_B = log_probs(self.model, batch)
        policy_B, _ = log_probs(self.model, batch)
        has_labels_P = num_targets_B.chunk(2)[0] > 0  # a batch that fills up a step has none
        losses_P = pair_losses(policy_B - reference_B, num_targets_B, self._spec)
        self._sums.append(reward_sums(policy_B.detach() - reference_B, has_labels_P, self._spec.beta))
        return torch.where(has_labels_P, losses_P, 0.0).sum()

    def take(self) -> tuple[float, ...]:
        sums, self._sums = self._sums, []
        if not sums:
            return (0.0,) * len(self.METRICS)
        return tuple(torch.stack(sums).double().sum(0).tolist())


def log_probs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(fp32 log-probability of each row's targets, number of them), both (B,)."""
    losses_N, learned_BT = label_losses(model, batch)
    losses_BT = losses_N.new_zeros(learned_BT.shape).masked_scatter(learned_BT, losses_N)
    return -losses_BT.sum(1), learned_BT.sum(1)


def pair_losses(log_ratios_B: Tensor, num_targets_B: Tensor, spec: DpoSpec) -> Tensor:
    """(P,). `log_ratios_B`: log π(answer) − log π_ref(answer), a sum over the answer's `num_targets_B` tokens.

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
    """The sums of REWARDS over pairs: a reward is β times a log-ratio (equation 5)."""
    chosen_P, rejected_P = (beta * log_ratios_B).chunk(2)
    rows = (chosen_P, rejected_P, (chosen_P > rejected_P).float(), chosen_P - rejected_P)
    return torch.stack([torch.where(has_labels_P, row_P, 0.0).sum() for row_P in rows])
