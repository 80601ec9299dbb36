"""VeRA's shared pair (A, B): drawn from a key, equal on every machine, and identified by its SHA-256.

It is PEFT's pair bit for bit in fp32 where torch draws with fused products, as on x86 with AVX2 or AVX-512. Elsewhere
PEFT's own differs from it in last bits.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from loray.adapters.weights import ProjectionPair


@lru_cache(maxsize=4)
def draw_pair(key: int, rank: int, max_in: int, max_out: int) -> ProjectionPair:
    """A (rank, max_in) and B (max_out, rank), Kaiming-uniform in fan-in, fp32, from one CPU generator: A first, then B.

    Kopiczko et al., *VeRA* (ICLR 2024), section 3.2; the order of draws is PEFT's. Two adapters share a pair only when
    all four arguments are equal. Callers get the same tensors: do not write to them.
    """
    generator = torch.Generator(device="cpu").manual_seed(key)
    a_RI = _kaiming_uniform((rank, max_in), generator)
    b_OR = _kaiming_uniform((max_out, rank), generator)
    return ProjectionPair(a_RI=a_RI, b_OR=b_OR, digest=pair_digest(a_RI, b_OR))


def pair_digest(a_RI: Tensor, b_OR: Tensor) -> str:
    """SHA-256 over both shapes and the fp32 bytes of A and B in row order."""
    digest = hashlib.sha256(f"{tuple(a_RI.shape)}{tuple(b_OR.shape)}".encode())
    for t in (a_RI, b_OR):
        digest.update(t.detach().to(torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    # Rounds in PEFT's order: gain/√fan first, then √3 times it.
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    # torch's uniform_ computes u · 2b - b for u in steps of 2⁻²⁴, rounded once or twice by the instruction set. Here
    # u - ½ is exact, so that the product's rounding is the only one on each.
    u = torch.rand(shape, dtype=torch.float32, device="cpu", generator=generator)
    return u.sub_(0.5).mul_(2 * bound)
