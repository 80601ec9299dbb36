"""The loss of distillation: a divergence from a teacher's likeliest tokens, mixed with cross-entropy, in chunks.

Shapes: N positions with a label, C of them at once, D hidden size, V vocabulary, K tokens of the teacher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loray.planning.devices import loss_chunks

LEAST_REST = 2.0**-20  # of a teacher's probability: fp32 sums of K tokens do not tell less from 0
_LEAST_LOG_REST = -60.0  # of the student's, where a gradient divides by it


class Mixed(NamedTuple):
    """Of each target, (N,): the loss, and its two parts without gradients."""

    losses_N: Tensor
    divergences_N: Tensor
    cross_entropies_N: Tensor


def head_logits(hidden_CD: Tensor, weight_VD: Tensor, soft_cap: float | None, dtype: torch.dtype) -> Tensor:
    """Compute z = h Wᵀ in `dtype`, or c · tanh(h Wᵀ / c) where the head has a soft cap c (Gemma 2)."""
    logits_CV = (hidden_CD @ weight_VD.T).to(dtype)
    return logits_CV if soft_cap is None else logits_CV.div_(soft_cap).tanh_().mul_(soft_cap)


def cap_slopes(logits_CV: Tensor, soft_cap: float | None) -> Tensor | None:
    """Compute dz / d(h Wᵀ) = 1 − (z / c)² of `head_logits`; None where it is 1."""
    return None if soft_cap is None else 1 - (logits_CV / soft_cap).square()


def needs_gradient(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Tell whether a loss is differentiated. Raises ValueError where the output head `weight_VD` is trained."""
    if weight_VD.requires_grad and torch.is_grad_enabled():
        raise ValueError("the output head is trained, but this loss holds it frozen")
    return hidden_ND.requires_grad and torch.is_grad_enabled()


class _Divergence(torch.autograd.Function):
    """w · KL + (1 − w) · (−log q_label) of each position, q = softmax(h Wᵀ) in fp32 or better; the head W is frozen.

    KL compares the teacher p and the student q as distributions over the teacher's K likeliest tokens S and everything
    else as one more token r: p_r = max(1 − Σ_S p, LEAST_REST) and q_r = Σ_{v∉S} q_v. By the log-sum inequality it is a
    lower bound of the divergence over the whole vocabulary.

        forward  KL(p‖q) = Σ_{i∈S,r} p_i (log p_i − log q_i)     Hinton et al., 2015; the student covers the teacher
        reverse  KL(q‖p) = Σ_{i∈S,r} q_i (log q_i − log p_i)     Gu et al., MiniLLM, ICLR 2024; it keeps to its modes

    With all logits z of the vocabulary, the gradients are

        forward  ∂/∂z_v = q_v − p_v for v ∈ S,                    q_v (1 − p_r/q_r) for the others
        reverse  ∂/∂z_v = q_v (log q_v − log p_v − KL) for v ∈ S, q_v (log q_r − log p_r − KL) for the others

    (p_r is not below LEAST_REST, so that Σ p may exceed 1 by as much: then forward's q_v has the factor Σ p.) The
    forward pass computes the gradient of the hidden states from the logits of each chunk, as cross-entropy does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        ids_NK: Tensor,
        log_probs_NK: Tensor,
        weight: float,
        is_reverse: bool,
        soft_cap: float | None,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        kl_N, ce_N = (hidden_ND.new_empty(len(labels_N), dtype=exact) for _ in range(2))
        grad_ND = torch.empty_like(hidden_ND) if with_grad else None
        for part in loss_chunks(len(hidden_ND), len(weight_VD), hidden_ND.device.type):
            labels_C1, ids_CK, log_p_CK = labels_N[part, None], ids_NK[part], log_probs_NK[part].to(exact)
            logits_CV = head_logits(hidden_ND[part], weight_VD, soft_cap, exact)
            slopes_CV = cap_slopes(logits_CV, soft_cap if with_grad else None)
            normaliser_C1 = logits_CV.logsumexp(1, keepdim=True)
            ce_N[part] = (normaliser_C1 - logits_CV.gather(1, labels_C1)).squeeze(1)
            top_CK = logits_CV.gather(1, ids_CK)
            logits_CV.scatter_(1, ids_CK, -torch.inf)  # all but S, whose probability 1 − Σ would not tell from 0
            log_q_rest_C1 = logits_CV.logsumexp(1, keepdim=True) - normaliser_C1
            p_rest_C1 = (1 - log_p_CK.exp().sum(1, keepdim=True)).clamp(min=LEAST_REST)
            log_p_CJ = torch.cat([log_p_CK, p_rest_C1.log()], 1)
            log_q_CJ = torch.cat([top_CK - normaliser_C1, log_q_rest_C1], 1)
            ratios_CJ = log_q_CJ - log_p_CJ
            weights_CJ = log_q_CJ.exp() if is_reverse else -log_p_CJ.exp()
            kl_C1 = (weights_CJ * ratios_CJ).sum(1, keepdim=True)
            kl_N[part] = kl_C1.squeeze(1)
            if grad_ND is None:
                continue
            q_CK = log_q_CJ[:, :-1].exp()
            if is_reverse:
                of_top_CK, of_rest_C1 = q_CK * (ratios_CJ[:, :-1] - kl_C1), ratios_CJ[:, -1:] - kl_C1
            else:
                total_C1 = log_p_CJ.exp().sum(1, keepdim=True)
                of_top_CK = total_C1 * q_CK - log_p_CK.exp()
                of_rest_C1 = total_C1 - p_rest_C1 * (-log_q_rest_C1.clamp(min=_LEAST_LOG_REST)).exp()
            logits_CV.sub_(normaliser_C1).exp_()  # softmax, 0 for S
            logits_CV.mul_(weight * of_rest_C1 + (1 - weight))
            logits_CV.scatter_(1, ids_CK, weight * of_top_CK + (1 - weight) * q_CK)
            logits_CV.scatter_add_(1, labels_C1, logits_CV.new_full(labels_C1.shape, weight - 1))
            if slopes_CV is not None:
                logits_CV.mul_(slopes_CV)
            grad_ND[part] = logits_CV.to(weight_VD.dtype) @ weight_VD
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(kl_N, ce_N)
        return weight * kl_N + (1 - weight) * ce_N, kl_N, ce_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.to(grads[0].dtype) * grads[0][:, None]).to(grad_ND.dtype), *[None] * 8


def divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    ids_NK: Tensor,
    log_probs_NK: Tensor,
    *,
    weight: float,
    is_reverse: bool,
    soft_cap: float | None = None,
) -> Mixed:
    """Compute the losses of N labels beside a teacher's log-probabilities of K different tokens at each, K < V. Logits
    are those of `head_logits`. Differentiable in `hidden_ND` only. Raises as `needs_gradient`.
    """
    with_grad = needs_gradient(hidden_ND, weight_VD)
    arguments = (hidden_ND, weight_VD, labels_N, ids_NK.long(), log_probs_NK, weight, is_reverse, soft_cap, with_grad)
    return Mixed(*_Divergence.apply(*arguments))  # type: ignore[no-untyped-call]
