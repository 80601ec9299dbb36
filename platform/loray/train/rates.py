"""Measured rates of a device: FLOP/s and bytes/s, for plans, for MFU and for the lower bounds of benchmarks.

`python -m loray.train.rates` measures this machine, its CPU with torch's number of threads and its first GPU, in a few
seconds, and prints JSON.
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

from loray.machine import GpuRates, Rates, hardware, serving_dtype, training_dtype
from loray.planning.compute import ATTENTION_BACKWARD, attention_pairs
from loray.spec import DType
from loray.train.attention.attend import s2_attention

_PRODUCT_WIDTH = {"cpu": 2048, "cuda": 8192}
_READ_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
_HEADS, _KV_HEADS, _HEAD_DIM = 8, 4, 64
_TOKENS, _GROUP = 4096, 1024
_MOST_S = 1.5


def measure_rates() -> Rates:
    """Measure this machine. Attention is measured in the dtype that trains fast on the CPU."""
    cpu, found = torch.device("cpu"), hardware()
    dtype = getattr(torch, training_dtype(found, use_gpu=False).dtype)
    products: dict[DType, float] = {
        "bfloat16": product_flops(cpu, torch.bfloat16),
        "float32": product_flops(cpu, torch.float32),
    }
    gpu = None
    if found.gpus and torch.cuda.is_available():
        device = torch.device("cuda", 0)
        gpu = GpuRates(fastest_product_flops(device), read_bandwidth(device))
    return Rates(
        products=products,
        attention_flops=_attention_flops(_GROUP, dtype),
        dense_attention_flops=_attention_flops(None, dtype),
        bandwidth=read_bandwidth(cpu),
        gpu=gpu,
    )


def fastest_product_flops(device: torch.device, passes: int = 5) -> float:
    """Measure FLOP/s of products in the dtype that the device multiplies fastest, with which MFU and floors compare."""
    chosen = serving_dtype(hardware(), use_gpu=device.type == "cuda", has_kernels=False).dtype
    return product_flops(device, getattr(torch, chosen), passes)


def product_flops(device: torch.device, dtype: torch.dtype, passes: int = 5) -> float:
    """Measure FLOP/s of a square matrix product, the fastest of several. Torch's random state does not change."""
    n = _PRODUCT_WIDTH.get(device.type, 4096)
    generator = torch.Generator(device).manual_seed(0)
    x, w = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    return 2.0 * n**3 / _seconds(lambda: F.linear(x, w), device, passes)


def read_bandwidth(device: torch.device) -> float:
    """Measure bytes/s of a sum over a tensor that is larger than the caches, the fastest of several."""
    source = torch.ones(_READ_BYTES.get(device.type, 512 << 20) // 4, device=device)
    return source.nbytes / _seconds(source.sum, device)


def _attention_flops(group_size: int | None, dtype: torch.dtype) -> float:
    """Measure FLOP/s of attention, forward and backward."""

    def make(num_heads: int) -> Tensor:
        return torch.randn(1, num_heads, _TOKENS, _HEAD_DIM, dtype=dtype).requires_grad_()

    q, k, v = make(_HEADS), make(_KV_HEADS), make(_KV_HEADS)

    def run() -> object:
        out = s2_attention(q, k, v, group_size=group_size or 2 * _TOKENS)  # groups of twice the row: dense
        return torch.autograd.grad(out, (q, k, v), q)

    forward = 4 * _HEAD_DIM * attention_pairs(_TOKENS, group_size, _HEADS)
    return (1 + ATTENTION_BACKWARD) * forward / _seconds(run, q.device)


def _seconds(run: Callable[[], object], device: torch.device, passes: int = 5) -> float:
    """Seconds of the shortest pass after one warm-up pass: of `passes`, or of those that fit in `_MOST_S`."""

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    taken = [once()]
    while len(taken) < passes and sum(taken) < _MOST_S:
        taken.append(once())
    return min(taken)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(measure_rates())))
