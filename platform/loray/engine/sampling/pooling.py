"""Embeddings: the hidden states of a prompt, pooled. Shapes: P tokens of one step, D hidden size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from loray.engine.model.batch import Pooled
from loray.engine.request import Request


class PooledStates:
    """Takes one step's hidden states, after the final norm, into its requests. A prompt that begins anew, or a chunk
    that is computed again, replaces what was there.
    """

    def __init__(self, parts: Sequence[Pooled]) -> None:
        self._parts = parts

    def add(self, x_PD: Tensor) -> None:
        """Take the hidden states of all parts, one after the other."""
        for part, own_PD in zip(self._parts, torch.split(x_PD, [p.stop - p.start for p in self._parts]), strict=True):
            if not part.start:
                part.request.pooled.clear()
            part.request.pooled[part.start] = own_PD.float().sum(0)


def embedding_of(request: Request) -> tuple[float, ...] | None:
    """Give the embedding of a prompt that has been computed, see `PoolingParams`; None if it is not finite."""
    pooling = request.spec.pooling
    assert pooling is not None
    sums = [part_D for part_D in request.pooled.values() if isinstance(part_D, Tensor)]
    x_D = torch.stack(sums).sum(0) / (request.num_prompt_tokens if pooling.kind == "mean" else 1)
    x_D = x_D[: pooling.dimensions]
    found = tuple((normalize(x_D, dim=0) if pooling.normalize else x_D).tolist())
    return found if all(map(math.isfinite, found)) else None
