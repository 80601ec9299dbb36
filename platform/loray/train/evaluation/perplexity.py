"""Dense perplexity as in the evaluation of LongLoRA (Chen et al., ICLR 2024): exp of the mean loss over whole windows.

Every window is computed alone, from its first token on, so that its early tokens have little context. All values
follow this rule, and are comparable. A window takes one pass without a KV cache: attention is dense and causal,
without a T × T mask, and the output head computes a chunk of positions at a time.

Shapes: T tokens of a window, B windows at once, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loray.errors import EvaluationError
from loray.telemetry import StageProgress
from loray.train.loss import summed_cross_entropy
from loray.train.model import evaluating

_TOKENS_AT_ONCE = 4096  # short windows share a pass


@torch.no_grad()
def mean_loss(
    model: Any, windows_T: Sequence[NDArray[np.int32]], progress: StageProgress = lambda share: None
) -> float:
    """Mean loss in nats over the T − 1 predicted tokens of all windows of T tokens: the logarithm of perplexity.

    `model` is a transformers causal language model, which does not change. Raises EvaluationError where a loss is not
    finite.
    """
    num_windows, context_length = len(windows_T), len(windows_T[0])
    device = next(model.parameters()).device
    head = model.get_output_embeddings().weight
    total = 0.0
    rows = max(1, _TOKENS_AT_ONCE // context_length)
    with evaluating(model):
        for start in range(0, num_windows, rows):
            ids_BT = torch.from_numpy(np.stack(windows_T[start : start + rows]).astype(np.int64)).to(device)
            hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
            total += float(summed_cross_entropy(hidden_BTD[:, :-1].flatten(0, 1), head, ids_BT[:, 1:].flatten()))
            progress(min(1.0, (start + rows) / num_windows))
    loss = total / (num_windows * (context_length - 1))
    return finite(loss, f"the loss on windows of {context_length:,} tokens")


def finite(value: float, what: str) -> float:
    """`value` itself. Raises EvaluationError where it is not finite."""
    if not isfinite(value):
        raise EvaluationError(f"{what} is {value}: measure in float32, or look at the weights")
    return value
