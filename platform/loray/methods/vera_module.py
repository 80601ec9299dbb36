"""VeRA as a torch module, and its shared pair as PEFT draws it.

The vectors d (width R) and b (width O) of each module are trained; they have PEFT's names. The pair is neither a
parameter nor in a state dict: it is a function of (key, R, max_in, max_out). It is PEFT's pair bit for bit in fp32
where torch draws with fused products, as on x86 with AVX2 or AVX-512. Elsewhere PEFT's own differs from it in last
bits.

Shapes: R rank, I input width, O output width of one module. The pair has the largest widths of all target modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loray.bases.quantized import is_quantized
from loray.methods.lora_module import replace_module, target_linears
from loray.methods.pairs import PairKey, begin_digest, draw_blocks
from loray.methods.weights import SharedProjection
from loray.spec import VeraSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@lru_cache(maxsize=4)
def draw_pair(key: int, rank: int, max_in: int, max_out: int) -> SharedProjection:
    """Draw A (rank, max_in) and B (max_out, rank) in fp32 on the CPU, the numbers of `pairs.draw_blocks`.

    Two adapters share a pair only when all four arguments are equal. Callers get the same tensors: do not write to
    them.
    """
    pair = PairKey(key, rank, max_in, max_out)
    blocks = draw_blocks(pair)
    a_RI, b_OR = (_filled(shape, blocks) for shape in pair.shapes)
    return SharedProjection(a_RI=a_RI, b_OR=b_OR, digest=pair_digest(a_RI, b_OR))


def pair_digest(a_RI: Tensor, b_OR: Tensor) -> str:
    """Compute the SHA-256 over both shapes and the fp32 bytes of A and B in row order."""
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


_INNER = "_vera_inner"


class ProjectionBuffer:
    """One pair for a whole model, with a copy for each device and dtype that modules use."""

    def __init__(self, pair: SharedProjection) -> None:
        self.pair = pair
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Copy (A, B) to the device and the dtype of `x`, once."""
        key = (x.device, x.dtype)
        if key not in self._copies:
            self._copies[key] = (self.pair.a_RI.to(*key), self.pair.b_OR.to(*key))
        return self._copies[key]

    def inner(self, x: Tensor) -> Tensor:
        """Compute A x, (…, R). It is an attribute of `x`, so that modules with the same input (q, k, v; gate, up) share
        it.
        """
        known: Tensor | None = getattr(x, _INNER, None)
        if known is None or known.requires_grad != (x.requires_grad and torch.is_grad_enabled()):
            known = F.linear(x, self.like(x)[0][:, : x.shape[-1]])
            setattr(x, _INNER, known)
        return known


class VeraLinear(nn.Module):
    """A linear module with its VeRA vectors. In fp32 it is bit-equal to PEFT's; in bf16 the pair is bf16, too.

    d starts at `d_initial` and b at 0, so that an untrained module computes the same as its base.
    """

    def __init__(
        self, base_layer: nn.Linear, shared: ProjectionBuffer, *, rank: int, d_initial: float, dropout: float
    ) -> None:
        super().__init__()
        weight: Any = base_layer.weight
        dtype = base_layer.compute_dtype if is_quantized(weight) else weight.dtype
        self.base_layer = base_layer
        self.shared = shared  # not an nn.Module, so that its tensors are in no state dict
        self.dropout = nn.Dropout(dropout)
        like: Any = {"dtype": dtype, "device": weight.device}
        self.vera_lambda_b = nn.Parameter(torch.zeros(base_layer.out_features, **like))
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), d_initial, **like))

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base_layer(x)
        b_OR = self.shared.like(x)[1]
        # With dropout every module has an input of its own.
        inner = self.shared.inner(self.dropout(x) if self.dropout.p else x)
        outer = F.linear(self.vera_lambda_d * inner, b_OR[: self.base_layer.out_features])
        return base + self.vera_lambda_b * outer


def inject_vera(model: nn.Module, spec: VeraSpec) -> ProjectionBuffer:
    """Replace every target module of `model` by a VeraLinear, and freeze all other parameters."""
    targets = dict(target_linears(model, spec.target_modules))
    max_in = max(m.in_features for m in targets.values())
    max_out = max(m.out_features for m in targets.values())
    shared = ProjectionBuffer(draw_pair(spec.projection_prng_key, spec.rank, max_in, max_out))
    model.requires_grad_(False)
    for path, module in targets.items():
        vera = VeraLinear(module, shared, rank=spec.rank, d_initial=spec.d_initial, dropout=spec.dropout)
        replace_module(model, path, vera)
    return shared
