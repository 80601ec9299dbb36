"""Cross-entropy summed over labels, computed from hidden states in chunks, without a (positions × vocabulary) tensor.

Shapes: B rows, T positions, N positions with a label, C of them at once, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loray.planning.devices import LOSS_CHUNK, LOSS_CHUNK_ON_CPU
from loray.train.data.batches import IGNORED, Batch


class _SummedCrossEntropy(torch.autograd.Function):
    """Σ_n −log softmax(h_n Wᵀ)[label_n], logits upcast to fp32; the head W is frozen.

    The forward pass also computes the gradient for the hidden states, (softmax − onehot) W, from the logits of each
    chunk: two matrix products per chunk, where recomputation in the backward pass would take three.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, with_grad: bool) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        grad_ND = torch.empty_like(hidden_ND) if with_grad else None
        elements = LOSS_CHUNK_ON_CPU if hidden_ND.device.type == "cpu" else LOSS_CHUNK
        rows = max(1, elements // weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], rows):
            part = slice(start, start + rows)
            labels_C1 = labels_N[part, None]
            logits_CV = (hidden_ND[part] @ weight_VD.T).float()
            normaliser_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            total += (normaliser_C1 - logits_CV.gather(1, labels_C1)).sum()
            if grad_ND is not None:
                logits_CV.sub_(normaliser_C1).exp_()  # softmax
                logits_CV.scatter_add_(1, labels_C1, logits_CV.new_full(labels_C1.shape, -1.0))
                grad_ND[part] = logits_CV.to(weight_VD.dtype) @ weight_VD
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.float() * grads[0]).to(grad_ND.dtype), None, None, None


def summed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Scalar fp32: the sum over N labels, none of them −100. Differentiable in `hidden_ND` only.

    Raises ValueError where `weight_VD` is trained.
    """
    if weight_VD.requires_grad and torch.is_grad_enabled():
        raise ValueError("the output head is trained, but this loss holds it frozen")
    with_grad = hidden_ND.requires_grad and torch.is_grad_enabled()
    loss: Tensor = _SummedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, with_grad)  # type: ignore[no-untyped-call]
    return loss


class Loss(NamedTuple):
    """`total` is an fp32 sum over `num_targets` labels. Divide it once, by the number of labels of the whole step."""

    total: Tensor
    num_targets: int


def batch_loss(model: Any, batch: Batch) -> Loss:
    """Loss of a transformers causal language model on one micro-batch. The head skips positions without a label."""
    device = next(model.parameters()).device
    hidden_BTD = model.base_model(**batch.model_inputs(device), use_cache=False).last_hidden_state
    labels_BT = batch.labels_BT.to(device)
    learned_BT = labels_BT != IGNORED
    head = model.get_output_embeddings()
    return Loss(summed_cross_entropy(hidden_BTD[learned_BT], head.weight, labels_BT[learned_BT]), batch.num_targets)


class Objective(nn.Module):
    """Model and loss as one module, for strategies that gather parameters at a module's call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Scalar fp32: the sum over the batch's labels."""
        return batch_loss(self.model, batch).total

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
