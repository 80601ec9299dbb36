"""Attention to a part of the keys, forward and backward, and how several results become one, as in flash attention.

With o and l = log Σ exp(score) over some keys, the result over the keys of both is (o₁ exp(l₁ − l) + o₂ exp(l₂ − l)),
l = log(exp l₁ + exp l₂). The backward pass of a part needs only the final o and l: its probabilities are
exp(score − l).

Shapes: B rows, H query heads, K key-value heads, R = H/K, A queries of a row, S keys, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)
_TILE = 32  # queries, to whose multiples the efficient kernel pads its log-sum-exp


class Partial(NamedTuple):
    """Attention over some of the keys: (B, H, A, D) in fp32 or fp64, and log Σ exp(score) over these keys (B, H, A)."""

    out: Tensor
    lse: Tensor


def merge(one: Partial | None, other: Partial) -> Partial:
    if one is None:
        return other
    lse = torch.logaddexp(one.lse, other.lse)
    weights = ((x.lse - lse).exp_()[..., None] for x in (one, other))
    return Partial(one.out * next(weights) + other.out * next(weights), lse)


def attend_block(q_BHAD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, is_own: bool, scale: float | None) -> Partial:
    """Attend causally to this rank's own keys, and fully to those of others, for which the R query heads of a
    key-value head are folded into one longer query.
    """
    fold = _Fold(q_BHAD, k_BKSD, is_own)
    out, lse = flash(fold.queries(q_BHAD), fold.keys(k_BKSD), fold.keys(v_BKSD), is_causal=is_own, scale=scale)
    return Partial(out.reshape(q_BHAD.shape).to(lse.dtype), lse.reshape(q_BHAD.shape[:3]))


class Gradients(NamedTuple):
    """(B, H, A, D) and (B, K, S, D) twice, in the dtype of the inputs."""

    q: Tensor
    k: Tensor
    v: Tensor


def block_gradients(
    dout_BHAD: Tensor,
    q_BHAD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    out_BHAD: Tensor,
    lse_BHA: Tensor,
    *,
    is_own: bool,
    scale: float | None,
) -> Gradients:
    """The gradients of `attend_block`'s inputs. `out_BHAD` and `lse_BHA` are the results over all keys."""
    fold = _Fold(q_BHAD, k_BKSD, is_own)
    dout, q, out = (fold.queries(x) for x in (dout_BHAD, q_BHAD, out_BHAD))
    lse = fold.queries(lse_BHA[..., None]).squeeze(-1)
    k, v = (fold.keys(x) for x in (k_BKSD, v_BKSD))
    dq, dk, dv = flash_gradients(dout, q, k, v, out, lse, is_causal=is_own, scale=scale)
    dk, dv = (x.sum(1).reshape(k_BKSD.shape) for x in (dk, dv))
    return Gradients(dq.reshape(q_BHAD.shape), dk, dv)


class _Fold:
    """Key-value heads folded into the batch: queries (B·K, R, A, D) to own keys, (B·K, 1, R·A, D) to others' keys."""

    def __init__(self, q_BHAD: Tensor, k_BKSD: Tensor, is_own: bool) -> None:
        self._batch, repeats = k_BKSD.shape[0] * k_BKSD.shape[1], q_BHAD.shape[1] // k_BKSD.shape[1]
        self._heads = repeats if is_own else 1

    def queries(self, x_BHAD: Tensor) -> Tensor:
        return x_BHAD.reshape(self._batch, self._heads, -1, x_BHAD.shape[-1])

    def keys(self, x_BKSD: Tensor) -> Tensor:
        return x_BKSD.reshape(self._batch, 1, *x_BKSD.shape[2:]).expand(-1, self._heads, -1, -1)


def flash(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """scaled_dot_product_attention with its log-sum-exp, which the public function does not return."""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    elif q.dtype in _HALVES:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
    else:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
        lse = lse[..., : q.shape[2]]  # padded to the kernel's tiles
    return out, lse


def flash_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `flash`'s q, k and v. There is no dropout, so that its random state is not used."""
    if q.device.type == "cpu":
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, is_causal, scale=scale
        )
        return dq, dk, dv
    unused = torch.zeros(2, dtype=torch.int64, device=q.device)
    if q.dtype in _HALVES:
        lengths = q.shape[2], k.shape[2]
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, *lengths, 0.0, is_causal, unused, unused, scale=scale
        )
        return dq, dk, dv
    lse = F.pad(lse, (0, -lse.shape[-1] % _TILE), value=torch.inf)
    wanted = [True, True, True, False]
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, unused, unused, 0.0, wanted, is_causal, scale=scale
    )
    return dq, dk, dv
