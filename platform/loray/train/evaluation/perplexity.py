"""Dense perplexity as in the evaluation of LongLoRA (Chen et al., ICLR 2024): exp of the mean loss over whole windows.

Every window is computed alone, from its first token on, so that its early tokens have little context. All values
follow this rule, and are comparable. A window takes one pass without a KV cache: attention is dense and causal,
without a T × T mask, and the output head computes a chunk of positions at a time.

Shapes: T tokens of a window, B windows at once, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loray.errors import EvaluationError
from loray.train.evaluation.kept import Figures, Pass, Take, compute_all, digest
from loray.train.loss import summed_cross_entropy
from loray.train.model import evaluating

_TOKENS_AT_ONCE = 4096  # short windows share a pass


def mean_loss(model: Callable[[], Any], windows_T: Sequence[NDArray[np.int32]], take: Take = compute_all) -> float:
    """Mean loss in nats over the T − 1 predicted tokens of all windows of T tokens: the logarithm of perplexity.

    `model` gives a transformers causal language model, which does not change. It is called for passes alone whose
    figures `take` does not have. Raises EvaluationError where a loss is not finite.
    """
    num_windows, context_length = len(windows_T), len(windows_T[0])
    rows = max(1, _TOKENS_AT_ONCE // context_length)
    batches_BT = [np.stack(windows_T[start : start + rows]) for start in range(0, num_windows, rows)]
    passes = [Pass(digest("perplexity", ids_BT), len(ids_BT)) for ids_BT in batches_BT]

    def compute(i: int) -> Figures:
        return {"nll": _summed_loss(model(), batches_BT[i]), "num_tokens": len(batches_BT[i]) * (context_length - 1)}

    figures = take(passes, compute)
    return sum(f["nll"] for f in figures) / sum(f["num_tokens"] for f in figures)


@torch.no_grad()
def _summed_loss(model: Any, ids_BT: NDArray[np.int32]) -> float:
    inputs_BT = torch.from_numpy(ids_BT.astype(np.int64)).to(next(model.parameters()).device)
    head = model.get_output_embeddings().weight
    with evaluating(model):
        hidden_BTD = model.base_model(input_ids=inputs_BT, use_cache=False).last_hidden_state
        loss = float(summed_cross_entropy(hidden_BTD[:, :-1].flatten(0, 1), head, inputs_BT[:, 1:].flatten()))
    return finite(loss, f"the loss on windows of {ids_BT.shape[1]:,} tokens")


def finite(value: float, what: str) -> float:
    """`value` itself. Raises EvaluationError where it is not finite."""
    if not isfinite(value):
        raise EvaluationError(f"{what} is {value}: measure in float32, or look at the weights")
    return value
