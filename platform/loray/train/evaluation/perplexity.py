"""Dense perplexity as in the evaluation of LongLoRA (Chen et al., ICLR 2024): exp of the mean loss over whole windows.

Every window is computed alone, from its first token on, so that its early tokens have little context. All values
follow this rule, and are comparable. A window takes one pass without a KV cache: attention is dense and causal,
without a T × T mask, and the output head computes a chunk of positions at a time.

Shapes: T tokens of a window, B windows at once, N predicted tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from loray.planning.measuring import MEASURED_AT_ONCE
from loray.train.data.batches import IGNORED
from loray.train.evaluation.kept import Figures, Pass, Take, digest, take_all
from loray.train.evaluation.measured import Measured
from loray.train.loss import summed_cross_entropy

_TOKENS_AT_ONCE = MEASURED_AT_ONCE  # short windows share a pass


def mean_loss(model: Callable[[], Measured], windows_T: Sequence[NDArray[np.int32]], take: Take = take_all) -> float:
    """Mean loss in nats over the T − 1 predicted tokens of all windows of T tokens: the logarithm of perplexity.

    `model` is called for passes alone whose figures `take` does not have. Raises EvaluationError where a loss is not
    finite.
    """
    num_windows, context_length = len(windows_T), len(windows_T[0])
    rows = max(1, _TOKENS_AT_ONCE // context_length)
    batches_BT = [np.stack(windows_T[start : start + rows]) for start in range(0, num_windows, rows)]
    name = f"the loss on windows of {context_length:,} tokens"
    passes = [Pass(digest("perplexity", ids_BT), len(ids_BT), name) for ids_BT in batches_BT]

    def compute(i: int) -> Figures:
        ids_BT = torch.from_numpy(batches_BT[i].astype(np.int64))
        return model().figures(ids_BT, F.pad(ids_BT[:, 1:], (0, 1), value=IGNORED), _summed)

    figures = take(passes, compute)
    return sum(f["nll"] for f in figures) / sum(f["num_tokens"] for f in figures)


def _summed(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Figures:
    return {"nll": float(summed_cross_entropy(hidden_ND, head_VD, labels_N)), "num_tokens": float(len(labels_N))}
