"""Which embedding rows an adapter brings.

Shapes: V vocabulary, D hidden, R rows of a part.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from loray.adapters.weights import AdapterWeights

_COMPARED_BYTES = 16 << 20  # of the base's rows at a time


def own_embedding_rows(weights: AdapterWeights, base_VD: Tensor, dtype: torch.dtype) -> tuple[tuple[int, ...], Tensor]:
    """Tokens whose rows an adapter brings, and these rows: of a dense embedding those that differ from the base's."""
    if weights.embedding is None:
        return (), base_VD[:0]
    rows_VD = weights.embedding.rows_VD.to(dtype)
    if weights.embedding.token_ids is not None:
        return weights.embedding.token_ids, rows_VD
    differs = _differs(rows_VD, base_VD)
    return tuple(differs.nonzero().flatten().tolist()), rows_VD[differs]


def _differs(rows_VD: Tensor, base_VD: Tensor) -> Tensor:
    """Which rows are others than those of `base_VD`, (V,). From a device these are copied on a stream of their own and
    a few MiB at a time: no step waits for them, and they take no memory to speak of.
    """
    num_rows = max(1, _COMPARED_BYTES // (base_VD.element_size() * base_VD.shape[1]))
    with torch.cuda.stream(_beside_steps(base_VD.device) if base_VD.is_cuda else None):
        parts = zip(torch.split(rows_VD, num_rows), torch.split(base_VD, num_rows), strict=True)
        return torch.cat([(own_RD != base_RD.cpu().to(own_RD.dtype)).any(dim=1) for own_RD, base_RD in parts])


@cache
def _beside_steps(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
