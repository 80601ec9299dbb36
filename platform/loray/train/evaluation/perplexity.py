"""Dense perplexity as LongLoRA's (Chen et al., ICLR 2024) evaluation has it: exp of the mean loss over whole windows.

Every window is computed by itself, from its first token on, so that its early tokens see little: that is the rule, and
what makes figures comparable. One pass a window, without a KV cache: attention is SDPA's own causal kernel, which makes
no T × T mask, and the output head sees a chunk of positions at a time.

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
from loray.train.loss import summed_cross_entropy
from loray.train.model import dense

Progress = Callable[[float], None]  # the share done, 0 to 1

_TOKENS_AT_ONCE = 4096  # short windows share a pass


@torch.no_grad()
def mean_loss(model: Any, windows_T: Sequence[NDArray[np.int32]], progress: Progress = lambda share: None) -> float:
    """Nats: the mean over windows, all of T tokens, of the mean over their T − 1 predicted tokens; log of perplexity.

    `model` is a transformers causal language model; it is left as it was. EvaluationError where a loss is not finite.
    """
    num_windows, context_length = len(windows_T), len(windows_T[0])
    device = next(model.parameters()).device
    head = model.get_output_embeddings().weight
    was_training = model.training
    model.eval()
    total = 0.0
    rows = max(1, _TOKENS_AT_ONCE // context_length)
    try:
        with dense(model):
            for start in range(0, num_windows, rows):
                ids_BT = torch.from_numpy(np.stack(windows_T[start : start + rows]).astype(np.int64)).to(device)
                hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
                total += float(summed_cross_entropy(hidden_BTD[:, :-1].flatten(0, 1), head, ids_BT[:, 1:].flatten()))
                progress(min(1.0, (start + rows) / num_windows))
    finally:
        model.train(was_training)
    loss = total / (num_windows * (context_length - 1))
    return finite(loss, f"the loss on windows of {context_length:,} tokens")


def finite(value: float, what: str) -> float:
    """`value`; EvaluationError where it is not finite."""
    if not isfinite(value):
        raise EvaluationError(f"{what} is {value}: measure in float32, or look at the weights")
    return value
