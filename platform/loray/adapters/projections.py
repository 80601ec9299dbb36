"""VeRA's shared pair (A, B): drawn from a key, equal on every machine, and identified by its SHA-256.

It is PEFT's pair bit for bit in fp32 where torch draws with fused products, as on x86 with AVX2 or AVX-512. Elsewhere
PEFT's own differs from it in last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loray.adapters.pairs import PairKey, begin_digest, draw_blocks
from loray.adapters.weights import ProjectionPair

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@lru_cache(maxsize=4)
def draw_pair(key: int, rank: int, max_in: int, max_out: int) -> ProjectionPair:
    """A (rank, max_in) and B (max_out, rank) in fp32 on the CPU, the numbers of `pairs.draw_blocks`.

    Two adapters share a pair only when all four arguments are equal. Callers get the same tensors: do not write to
    them.
    """
    pair = PairKey(key, rank, max_in, max_out)
    blocks = draw_blocks(pair)
    a_RI, b_OR = (_filled(shape, blocks) for shape in pair.shapes)
    return ProjectionPair(a_RI=a_RI, b_OR=b_OR, digest=pair_digest(a_RI, b_OR))


def pair_digest(a_RI: Tensor, b_OR: Tensor) -> str:
    """SHA-256 over both shapes and the fp32 bytes of A and B in row order."""
    digest = begin_digest(tuple(a_RI.shape), tuple(b_OR.shape))
    for t in (a_RI, b_OR):
        digest.update(t.detach().to(torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _filled(shape: tuple[int, int], blocks: Iterator[NDArray[np.float32]]) -> Tensor:
    filled = torch.empty(shape, dtype=torch.float32, device="cpu")
    numbers, start = filled.numpy().reshape(-1), 0
    while start < numbers.size:
        block = next(blocks)
        numbers[start : start + block.size] = block
        start += block.size
    return filled
