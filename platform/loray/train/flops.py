"""Model FLOPs of training, and the rate of a device's matrix products: what model FLOPs utilisation (MFU) is made of.

MFU (Chowdhery et al., 2022, PaLM, appendix B): the floating-point operations that the model's equations ask for, over
what the device could have done in that time. What is computed again for want of memory is not counted.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray

from loray.bases.config import ModelConfig
from loray.planning.compute import attention_pairs
from loray.planning.shapes import count_factors
from loray.spec import AdapterSpec, VeraSpec

_MEASURE_S = 0.2
_WIDTH = {"cpu": 1024, "cuda": 8192}


def flops_per_token(
    model: ModelConfig,
    adapter: AdapterSpec,
    lengths: NDArray[np.int64],
    *,
    group_size: int | None,
    target_share: float = 1.0,
) -> float:
    """Of forward and backward pass, the mean over rows of these lengths.

    A frozen matrix of n elements takes 2n forward and 2n for the gradient of its input; a trained one, which LoRA's A
    and B are, 2n more for its own. The output head, frozen, sees the `target_share` of tokens that have a label. A
    pair of query and key takes 4 head_dim a head forward and 8 backward; pairs are those that causal attention
    looks at: S2-Attn's with `group_size`, all of the row without.
    """
    head = model.vocab_size * model.hidden_size
    frozen = model.num_matrix_elements - head + target_share * head
    factors = count_factors(model, adapter) * model.num_layers
    adapter_flops = (4 if isinstance(adapter, VeraSpec) else 6) * factors  # VeRA trains vectors; its factors are frozen
    found, counts = np.unique(lengths, return_counts=True)
    pairs = sum(
        int(k) * attention_pairs(int(n), group_size, model.num_heads) for n, k in zip(found, counts, strict=True)
    )
    attention = 12.0 * model.head_dim * model.num_layers * pairs / float(lengths.sum())
    return 4.0 * frozen + adapter_flops + attention


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of the square matrix products that a fifth of a second has time for, two at least."""
    width = _WIDTH.get(device.type, 4096)
    a = torch.ones(width, width, dtype=dtype, device=device)
    best, deadline, count = float("inf"), time.perf_counter() + _MEASURE_S, 0
    while count < 3 or time.perf_counter() < deadline:
        started = time.perf_counter()
        float((a @ a)[0, 0])  # reading a result waits for the device
        if count:  # the first one prepares
            best = min(best, time.perf_counter() - started)
        count += 1
    return 2.0 * width**3 / best
