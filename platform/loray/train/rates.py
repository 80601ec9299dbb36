"""Measured rates of a device: FLOP/s and bytes/s, for plans, for MFU and for the lower bounds of benchmarks.

`python -m loray.train.rates` measures this machine's CPU with torch's number of threads, in a few seconds, and prints
JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.planning.compute import ATTENTION_BACKWARD, attention_pairs
from loray.planning.devices import HostRates, host_memory
from loray.train.attention.shifted import s2_attention

_PRODUCT_WIDTH = {"cpu": 2048, "cuda": 8192}
_READ_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
_HEADS, _KV_HEADS, _HEAD_DIM = 8, 4, 64
_TOKENS, _GROUP = 4096, 1024


def measure_rates() -> HostRates:
    cpu = torch.device("cpu")
    return HostRates(
        memory_bytes=host_memory(),
        flops=product_flops(cpu, torch.bfloat16),
        attention_flops=_attention_flops(_GROUP),
        dense_attention_flops=_attention_flops(None),
        bandwidth=read_bandwidth(cpu),
    )


def product_flops(device: torch.device, dtype: torch.dtype, passes: int = 5) -> float:
    """FLOP/s of a square matrix product, the fastest of several. Torch's random state does not change."""
    n = _PRODUCT_WIDTH.get(device.type, 4096)
    generator = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    return 2.0 * n**3 / _seconds(lambda: F.linear(x, w), device, passes)


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of a sum over a tensor that is larger than the caches, the fastest of several."""
    source = torch.ones(_READ_BYTES.get(device.type, 512 << 20) // 4, device=device)
    return source.nbytes / _seconds(source.sum, device)


def _attention_flops(group_size: int | None) -> float:
    """FLOP/s of attention, forward and backward."""

    def make(num_heads: int) -> Tensor:
        return torch.randn(1, num_heads, _TOKENS, _HEAD_DIM, dtype=torch.bfloat16).requires_grad_()

    q, k, v = make(_HEADS), make(_KV_HEADS), make(_KV_HEADS)

    def run() -> object:
        out = s2_attention(q, k, v, group_size=group_size or 2 * _TOKENS)  # groups of twice the row: dense
        return torch.autograd.grad(out, (q, k, v), q)

    forward = 4 * _HEAD_DIM * attention_pairs(_TOKENS, group_size, _HEADS)
    return (1 + ATTENTION_BACKWARD) * forward / _seconds(run, q.device)


def _seconds(run: Callable[[], object], device: torch.device, passes: int = 5) -> float:
    """Seconds of the shortest pass, after one warm-up pass."""

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(passes))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure_rates())))
