"""What this machine computes and moves, for plans: `python -m loray.train.rates` prints it as JSON, in a few seconds.

The best of several passes each: a product of 2048³ in bf16, S2-Attn and dense attention forward and backward, and a sum
over half a gigabyte. All with as many threads as torch takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.planning.compute import attention_pairs
from loray.planning.devices import HostRates
from loray.train.attention.shifted import s2_attention

_HEADS, _KV_HEADS, _WIDTH = 8, 4, 64
_TOKENS, _GROUP = 4096, 1024


def measure_rates() -> HostRates:
    n = 2048
    x, w = (torch.randn(n, n).to(torch.bfloat16) for _ in range(2))
    source = torch.ones((512 << 20) // 4)
    return HostRates(
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        flops=2.0 * n**3 / _seconds(lambda: F.linear(x, w)),
        attention_flops=_attention_flops(_GROUP),
        dense_attention_flops=_attention_flops(None),
        bandwidth=source.nbytes / _seconds(source.sum),
    )


def _attention_flops(group_size: int | None) -> float:
    """Forward and backward, which takes five products for two."""

    def make(num_heads: int) -> Tensor:
        return torch.randn(1, num_heads, _TOKENS, _WIDTH, dtype=torch.bfloat16).requires_grad_()

    q, k, v = make(_HEADS), make(_KV_HEADS), make(_KV_HEADS)

    def run() -> object:
        if group_size is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = s2_attention(q, k, v, group_size=group_size)
        return torch.autograd.grad(out, (q, k, v), q)

    return 3.5 * 4 * _WIDTH * attention_pairs(_TOKENS, group_size, _HEADS) / _seconds(run)


def _seconds(run: Callable[[], object]) -> float:
    def once() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(3))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure_rates())))
