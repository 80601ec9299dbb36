"""What this machine computes and moves, for plans: `python -m loray.train.rates` prints it as JSON, in a few seconds.

The best of several passes each: a product of 2048³ in bf16, S2-Attn's kernel over groups, forward and backward, and a
sum over half a gigabyte. All with as many threads as torch takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from loray.planning.compute import attention_pairs
from loray.planning.devices import HostRates
from loray.train.attention import s2_attention

_HEADS, _KV_HEADS, _WIDTH = 8, 4, 64
_TOKENS, _GROUP = 2048, 512


def measure_rates() -> HostRates:
    n = 2048
    x, w = (torch.randn(n, n).to(torch.bfloat16) for _ in range(2))
    source = torch.ones((512 << 20) // 4)
    attention_flops = 3.5 * 4 * _WIDTH * attention_pairs(_TOKENS, _GROUP, _HEADS)  # forward, and 2.5 times backward
    return HostRates(
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        flops=2.0 * n**3 / _seconds(lambda: torch.nn.functional.linear(x, w)),
        attention_flops=attention_flops / _seconds(_attention()),
        bandwidth=source.nbytes / _seconds(source.sum),
    )


def _attention() -> Callable[[], object]:
    def make(num_heads: int) -> torch.Tensor:
        return torch.randn(1, num_heads, _TOKENS, _WIDTH, dtype=torch.bfloat16).requires_grad_()

    q, k, v = make(_HEADS), make(_KV_HEADS), make(_KV_HEADS)
    grad = torch.ones_like(q)
    return lambda: torch.autograd.grad(s2_attention(q, k, v, group_size=_GROUP), (q, k, v), grad)


def _seconds(run: Callable[[], object]) -> float:
    def once() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(5))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure_rates())))
