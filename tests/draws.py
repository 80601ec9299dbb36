"""Normal numbers that are equal on every machine. torch's differ in their last bits between instruction sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Normal:
    """Draws one tensor after the other from numpy's PCG64, whose generator rounds once for each number."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(np.asarray(self._generator.standard_normal(shape))).to(dtype)


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first tensor of `Normal(seed)`."""
    return Normal(seed)(*shape, dtype=dtype)
