"""S2-Attn and dense attention, forward and backward, in turn in one process; prints seconds as JSON.

    python -m benchmarks.training.workers.attention NUM_TOKENS GROUP_SIZE NUM_HEADS NUM_KV_HEADS HEAD_DIM REPEATS

Tensors are bf16 and have the memory layout of transformers' models: (rows, positions, heads, width). Every dense
variant runs once; the fastest then runs REPEATS times more, and S2-Attn twice as often. A measurement during which
other processes were busy is repeated up to four times; of five such measurements the shortest counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.world import watch
from loray.train import s2_attention

_WARM_UP = 512  # tokens
_ATTEMPTS = 5
_QUIET = 0.1  # processors that other processes may keep busy


def ours(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Groups of twice the row: what a model trains with where its attention is dense."""
    return s2_attention(q_BHTD, k_BKTD, v_BKTD, group_size=2 * q_BHTD.shape[2])


def with_gqa(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True)


def repeated(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Keys and values are repeated in memory."""
    k_BHTD, v_BHTD = (x.repeat_interleave(q_BHTD.shape[1] // x.shape[1], 1) for x in (k_BKTD, v_BKTD))
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)


def contiguous(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """As `repeated`, with queries copied so that each head is contiguous."""
    return repeated(q_BHTD.contiguous(), k_BKTD, v_BKTD)


def folded(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Key-value heads become rows of the batch; R query heads read the same memory through a stride of 0."""
    num_rows, num_kv_heads, num_tokens, width = k_BKTD.shape
    repeats = q_BHTD.shape[1] // num_kv_heads
    k, v = (x.reshape(-1, 1, num_tokens, width).expand(-1, repeats, -1, -1) for x in (k_BKTD, v_BKTD))
    q = q_BHTD.reshape(-1, repeats, num_tokens, width)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(num_rows, -1, num_tokens, width)


VARIANTS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "repeated": repeated,
    "contiguous": contiguous,
    "folded": folded,
    "enable_gqa": with_gqa,
}


class Seconds(NamedTuple):
    forward: float
    backward: float


def main(tokens: int, group_size: int, heads: int, kv_heads: int, width: int, repeats: int) -> dict[str, object]:
    torch.manual_seed(0)

    def s2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return s2_attention(q, k, v, group_size=min(group_size, q.shape[2] // 2))

    for attend in (s2, *VARIANTS.values()):
        _time(attend, *_tensors(min(tokens, _WARM_UP), heads, kv_heads, width))
    tensors = _tensors(tokens, heads, kv_heads, width)
    _time(s2, *tensors)
    dense = {name: [_undisturbed(attend, *tensors)] for name, attend in VARIANTS.items()}
    fastest = min(dense, key=lambda name: sum(dense[name][0]))
    found = []
    for _ in range(repeats):
        found.append(_undisturbed(s2, *tensors))
        dense[fastest].append(_undisturbed(VARIANTS[fastest], *tensors))
        found.append(_undisturbed(s2, *tensors))
    return {"s2": found, "dense": dense, "fastest": fastest}


def _tensors(tokens: int, heads: int, kv_heads: int, width: int) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, (1, heads, tokens, width)."""
    return tuple(
        torch.randn(1, tokens, n, width).to(torch.bfloat16).transpose(1, 2) for n in (heads, kv_heads, kv_heads, heads)
    )


def _undisturbed(attend: Callable[[Tensor, Tensor, Tensor], Tensor], *tensors: Tensor) -> Seconds:
    found = []
    for _ in range(_ATTEMPTS):
        with watch() as disturbance:
            found.append(_time(attend, *tensors))
        if disturbance.cores < _QUIET:
            return found[-1]
    return min(found, key=sum)


def _time(attend: Callable[[Tensor, Tensor, Tensor], Tensor], *tensors: Tensor) -> Seconds:
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    began = time.perf_counter()
    out = attend(q, k, v)
    between = time.perf_counter()
    torch.autograd.grad(out, (q, k, v), tensors[3])
    return Seconds(between - began, time.perf_counter() - between)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*map(int, sys.argv[1:]))) + "\n")
