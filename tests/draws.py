"""Normal numbers that are equal on every machine. torch's differ in their last bits between instruction sets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Normal:
    """Draws one fp32 tensor after the other from numpy's PCG64, by additions and products that round alike anywhere."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, *shape: int) -> Tensor:
        return torch.from_numpy(np.asarray(self._generator.standard_normal(shape))).float()
