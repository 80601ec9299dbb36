"""Losses of reinforcement learning, on log-probabilities that a model has already given.

Written with lp for the trainer's log-probability of a token, lq for the sampler's, ρ = exp(lp − lq), A for the
advantage, and sg(·) for a value without gradient. All of them are sums over the positions of the datums, each times
its weight. They are computed in fp64: N numbers cost nothing, and a ratio of them is exact to the last bits.

Formulas and defaults are those of Tinker's losses (tinker-docs.thinkingmachines.ai: PPO, CISPO, DRO), which for ppo are
those of Schulman et al., 2017, for gspo of Zheng et al., 2025, and for cispo of MiniMax-M1, 2025.

Shapes: N positions of all datums, one after another; S datums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loray.spec.datums import Datum, LossType, TokenLoss


class FlatDatums(NamedTuple):
    """The positions of some datums, one after another. In fp64; NaN: that position has none.

    segments_N    each position's datum
    weights_N     factors of the losses; a position of weight 0 is no answer's
    logprobs_N    lq
    advantages_N  A
    mask_N        positions whose mean log-ratio is the sequence's (gspo)
    clip_low_N, clip_high_N  bounds of ρ; NaN: the loss's
    values_N      what lp is to be, the sampler's own score; NaN: lp as the trainer computes it
    reference_N   log-probabilities under the model without its adapter, for the KL divergence
    """

    segments_N: Tensor
    weights_N: Tensor
    logprobs_N: Tensor
    advantages_N: Tensor
    mask_N: Tensor
    clip_low_N: Tensor
    clip_high_N: Tensor
    values_N: Tensor
    reference_N: Tensor | None = None

    @classmethod
    def of(cls, datums: Sequence[Datum], device: torch.device, reference_N: Tensor | None = None) -> FlatDatums:
        """Join datums. Without weights each position has 1; without a mask the sequence is what has an advantage."""

        def joined(field: str, missing: float) -> Tensor:
            parts = [
                np.full(len(datum.target_ids), missing) if (given := getattr(datum, field)) is None else given
                for datum in datums
            ]
            return torch.from_numpy(np.concatenate(parts).astype(np.float64)).to(device)

        lengths_S = torch.tensor([len(datum.target_ids) for datum in datums], device=device)
        weights_N, advantages_N = joined("weights", 1.0), joined("advantages", 0.0)
        mask_N = joined("mask", math.nan)
        return cls(
            torch.repeat_interleave(torch.arange(len(datums), device=device), lengths_S),
            weights_N,
            joined("logprobs", 0.0),
            advantages_N,
            torch.where(mask_N.isnan(), weights_N * advantages_N, mask_N) != 0,
            joined("clip_low", math.nan),
            joined("clip_high", math.nan),
            joined("values", math.nan),
            reference_N,
        )


def token_losses(loss: TokenLoss, logprobs_N: Tensor, batch: FlatDatums) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of some datums, a scalar sum in fp64 that is divided by the loss's divisor, and what there is to
    tell of them, sums too.

    `logprobs_N` are the trainer's, with gradients. `tokens` counts positions that have a weight, `clipped` those of
    them whose ratio is beyond its bound, so that they teach nothing, or (cispo, importance_sampling) no more than at
    the bound; `kl` is the sum of the estimate k3 of the divergence from the reference.
    """
    counted_N = batch.weights_N != 0
    used_N = counted_N | batch.mask_N  # elsewhere stands anything, which must not become infinite times 0

    def taken(values_N: Tensor) -> Tensor:
        return torch.where(used_N, values_N.double(), 0.0)

    lp_N = taken(logprobs_N)
    lp_N = torch.where(batch.values_N.isnan(), lp_N, taken(batch.values_N) + (lp_N - lp_N.detach()))
    batch = batch._replace(logprobs_N=taken(batch.logprobs_N))
    losses_N, clipped_N = _LOSSES[loss.type](loss, lp_N, batch)
    told = {"tokens": counted_N.sum(), "clipped": (clipped_N & counted_N).sum()}
    if loss.kl and batch.reference_N is not None:
        k3_N = k3(lp_N, taken(batch.reference_N))
        losses_N = losses_N + loss.kl * k3_N
        told["kl"] = k3_N.detach()[counted_N].sum()
    return (losses_N * batch.weights_N).sum() / loss.divisor, told


def k3(lp_N: Tensor, reference_N: Tensor) -> Tensor:
    """Estimate KL(π ‖ reference) from samples of π: exp(lr − lp) − (lr − lp) − 1, which is unbiased and never negative
    (Schulman, "Approximating KL divergence", 2020).
    """
    log_ratios_N = reference_N - lp_N
    return torch.expm1(log_ratios_N) - log_ratios_N


_Losses = tuple[Tensor, Tensor]  # of each position, and whether its ratio was beyond a bound


def _cross_entropy(loss: TokenLoss, lp_N: Tensor, batch: FlatDatums) -> _Losses:
    """−lp; weights may have any sign."""
    return -lp_N, torch.zeros_like(batch.mask_N)


def _importance_sampling(loss: TokenLoss, lp_N: Tensor, batch: FlatDatums) -> _Losses:
    """−ρA. Where the ratio is capped, −(cap/sg(ρ))·ρA: the weight is truncated, and the gradient goes on (as V-trace
    does, Espeholt et al., 2018).
    """
    ratios_N = torch.exp(lp_N - batch.logprobs_N)
    if loss.ratio_cap is None:
        return -ratios_N * batch.advantages_N, torch.zeros_like(batch.mask_N)
    factors_N = (loss.ratio_cap / ratios_N.detach()).clamp(max=1.0)
    return -factors_N * ratios_N * batch.advantages_N, factors_N < 1


def _ppo(loss: TokenLoss, lp_N: Tensor, batch: FlatDatums) -> _Losses:
    """−min(ρA, clip(ρ)A)."""
    return _clipped(loss, torch.exp(lp_N - batch.logprobs_N), batch)


def _gspo(loss: TokenLoss, lp_N: Tensor, batch: FlatDatums) -> _Losses:
    """The same with the sequence's ratio s = exp(mean of lp − lq over its mask), whose gradient a token has through its
    own lp: s_t = sg(s)·exp(lp − sg(lp)) (the paper's GSPO-token, equation 14).
    """
    own_N = torch.where(batch.mask_N, lp_N.detach() - batch.logprobs_N, 0.0)
    num_segments = int(batch.segments_N[-1]) + 1 if len(own_N) else 0
    sums_S, lengths_S = own_N.new_zeros(2, num_segments).unbind()
    sums_S.index_add_(0, batch.segments_N, own_N)
    lengths_S.index_add_(0, batch.segments_N, batch.mask_N.double())
    means_N = (sums_S / lengths_S.clamp(min=1))[batch.segments_N]
    return _clipped(loss, torch.exp(means_N + lp_N - lp_N.detach()), batch)


def _cispo(loss: TokenLoss, lp_N: Tensor, batch: FlatDatums) -> _Losses:
    """−sg(clip(ρ))·A·lp."""
    ratios_N = torch.exp(lp_N.detach() - batch.logprobs_N)
    bounded_N = ratios_N.clamp(*_bounds(loss, batch))
    return -bounded_N * batch.advantages_N * lp_N, bounded_N != ratios_N


def _dro(loss: TokenLoss, lp_N: Tensor, batch: FlatDatums) -> _Losses:
    """−(A·lp − β/2·(lp − lq)²)."""
    assert loss.beta is not None, "TokenLoss asks for it"
    distances_N = (lp_N - batch.logprobs_N).square()
    return 0.5 * loss.beta * distances_N - batch.advantages_N * lp_N, torch.zeros_like(batch.mask_N)


def _clipped(loss: TokenLoss, ratios_N: Tensor, batch: FlatDatums) -> _Losses:
    own_N = ratios_N * batch.advantages_N
    bounded_N = ratios_N.clamp(*_bounds(loss, batch)) * batch.advantages_N
    # As everywhere: at the bound itself both are equal, and the gradient is the ratio's.
    return -torch.where(own_N <= bounded_N, own_N, bounded_N), own_N > bounded_N


def _bounds(loss: TokenLoss, batch: FlatDatums) -> tuple[Tensor, Tensor]:
    low_N, high_N = (
        torch.where(own_N.isnan(), float(of_loss or 0.0), own_N)
        for of_loss, own_N in ((loss.clip_low, batch.clip_low_N), (loss.clip_high, batch.clip_high_N))
    )
    return low_N, high_N


_LOSSES: Mapping[LossType, Callable[[TokenLoss, Tensor, FlatDatums], _Losses]] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "gspo": _gspo,
    "cispo": _cispo,
    "dro": _dro,
}
