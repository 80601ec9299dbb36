"""Cross-entropy of labels, computed from hidden states in chunks, without a (positions × vocabulary) tensor.

Shapes: B rows, T positions, N positions with a label, C of them at once, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from loray.planning.devices import LOSS_CHUNK, LOSS_CHUNK_ON_CPU
from loray.train.data.batches import IGNORED, Batch


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
    """(N,) in fp32, of N labels, none of them −100. Differentiable in `hidden_ND` only.

    Raises ValueError where `weight_VD` is trained.
    """
    if weight_VD.requires_grad and torch.is_grad_enabled():
        raise ValueError("the output head is trained, but this loss holds it frozen")
    with_grad = hidden_ND.requires_grad and torch.is_grad_enabled()
    losses_N: Tensor = _CrossEntropy.apply(hidden_ND, weight_VD, labels_N, with_grad)  # type: ignore[no-untyped-call]
    return losses_N


def summed_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Scalar fp32: the sum of `cross_entropy`."""
    return cross_entropy(hidden_ND, weight_VD, labels_N).sum()


class Loss(NamedTuple):
    """`total` is an fp32 sum over `num_targets` labels. Divide it once, by the number of labels of the whole step."""

    total: Tensor
    num_targets: int


class LabelLosses(NamedTuple):
    """fp32 losses of N labels, in the order in which `learned_BT` marks their positions."""

    losses_N: Tensor
    learned_BT: Tensor


def label_losses(model: Any, batch: Batch) -> LabelLosses:
    """Of a transformers causal language model on one micro-batch. The head skips positions without a label."""
    device = next(model.parameters()).device
    hidden_BTD = model.base_model(**batch.model_inputs(device), use_cache=False).last_hidden_state
    labels_BT = batch.labels_BT.to(device)
    learned_BT = labels_BT != IGNORED
    head = model.get_output_embeddings()
    return LabelLosses(cross_entropy(hidden_BTD[learned_BT], head.weight, labels_BT[learned_BT]), learned_BT)


def batch_loss(model: Any, batch: Batch) -> Loss:
    return Loss(label_losses(model, batch).losses_N.sum(), batch.num_targets)


class Objective(nn.Module):
    """Model and loss as one module, for strategies that gather parameters at a module's call.

    METRICS  names of further figures, means over the terms of the loss
    """

    METRICS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Scalar fp32: the sum over the batch's labels."""
        return batch_loss(self.model, batch).total

    def take(self) -> tuple[float, ...]:
        """The sums of METRICS over all calls since they were last taken."""
        return ()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
