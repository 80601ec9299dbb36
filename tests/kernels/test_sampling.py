"""Tokens of each backend against the distribution in fp64, and the same token in any company."""

from __future__ import annotations

import math
import random
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loray_kernels import Draws, Ops
from loray_kernels.cuda.ops import CudaOps
from tests.fixtures.shim import ShimLauncher, or_skip
from tests.kernels.backends import BACKENDS as NATIVE
from tests.kernels.backends import make_ops as make_native

VOCABS = [7, 512, 1000, 49152]
BACKENDS = [*NATIVE, "cuda shim"]


def make_ops(name: str) -> Ops:
    if name != "cuda shim":
        return make_native(name)
    return or_skip(lambda: CudaOps(ShimLauncher(), cast(Any, None)))


def words_of(allowed_MV: Tensor) -> Tensor:
    num_masks, vocab = allowed_MV.shape
    padded = torch.zeros(num_masks, 32 * -(-vocab // 32), dtype=torch.int64)
    padded[:, :vocab] = allowed_MV
    words = (padded.view(num_masks, -1, 32) << torch.arange(32)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def masks_of(vocab: int, generator: torch.Generator) -> Tensor:
    """All tokens, about half of each word, few tokens, whole words, one token."""
    rows = torch.zeros(5, vocab, dtype=torch.bool)
    rows[0] = True
    rows[1] = torch.rand(vocab, generator=generator) < 0.5
    rows[2] = torch.rand(vocab, generator=generator) < 3 / vocab
    rows[3, 32:96] = True
    rows[3, -1] = True
    rows[4, vocab // 3] = True
    rows[2, vocab // 2] = True
    return rows


def weights(x_V: Tensor, temperature: float, min_p: float) -> Tensor:
    """In fp64."""
    p = ((x_V.double() - x_V.max()) / temperature).exp()
    return torch.where(p < min_p, 0, p)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_invert_the_cumulative_distribution(name: str, vocab: int) -> None:
    ops, generator, rng = make_ops(name), torch.Generator().manual_seed(vocab), random.Random(vocab)
    logits_SV = 4 * torch.randn(6, vocab, generator=generator)
    allowed_MV = masks_of(vocab, generator)
    num = 60
    draws = Draws(
        [rng.randrange(6) for _ in range(num)],
        [rng.choice([0.0, 0.2, 1.0, 1.7]) for _ in range(num)],
        [rng.choice([0.0, 0.0, 0.05]) for _ in range(num)],
        [rng.choice([0.0, rng.random(), 1 - 2**-52]) for _ in range(num)],
        [rng.randrange(-1, 5) for _ in range(num)],
        words_of(allowed_MV),
    )
    tokens, best = ops.sample(logits_SV, draws)()
    for i in range(num):
        x_V = logits_SV[draws.rows[i]].clone()
        if draws.masks[i] >= 0:
            x_V[~allowed_MV[draws.masks[i]]] = -math.inf
        assert best[i] == x_V.max()
        if not draws.temperature[i]:
            assert tokens[i] == x_V.argmax()
            continue
        p_V = weights(x_V, draws.temperature[i], draws.min_p[i])
        assert p_V[tokens[i]] > 0
        mass_V = p_V.cumsum(0) / p_V.sum()
        before = float(mass_V[tokens[i]] - p_V[tokens[i]] / p_V.sum())
        assert before - 1e-5 <= draws.uniform[i] <= float(mass_V[tokens[i]]) + 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_a_token_is_the_same_alone_and_among_others(name: str) -> None:
    ops = make_ops(name)
    logits_SV = torch.randn(9, 5000, generator=torch.Generator().manual_seed(0))
    together = Draws(range(9), [1.0] * 9, [0.0] * 9, [i / 9 for i in range(9)], [-1] * 9)
    tokens, _ = ops.sample(logits_SV, together)()
    for i in range(9):
        assert ops.sample(logits_SV, Draws([i], [1.0], [0.0], [i / 9], [-1]))()[0] == [tokens[i]]
        assert ops.sample(logits_SV[i:], Draws([0], [1.0], [0.0], [i / 9], [-1]))()[0] == [tokens[i]]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_maximum_is_told(name: str, temperature: float) -> None:
    ops = make_ops(name)
    logits_SV = torch.randn(5, 600, generator=torch.Generator().manual_seed(0))
    logits_SV[1, 599] = math.nan
    logits_SV[2, 3] = math.inf
    logits_SV[3] = -math.inf
    nothing = torch.zeros(1, 600, dtype=torch.bool)
    draws = Draws(range(5), [temperature] * 5, [0.0] * 5, [0.5] * 5, [-1, -1, -1, -1, 0], words_of(nothing))
    _, best = ops.sample(logits_SV, draws)()
    assert [math.isfinite(b) for b in best] == [True, False, False, False, False]


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_tokens_are_those_of_the_reference(name: str) -> None:
    """But where a uniform number falls on the edge of a token, to rounding."""
    generator, num, vocab = torch.Generator().manual_seed(3), 64, 3000
    logits_SV = 3 * torch.randn(num, vocab, generator=generator)
    uniform = torch.rand(num, generator=generator, dtype=torch.float64).tolist()
    draws = Draws(range(num), [(0.0, 0.7, 1.3)[i % 3] for i in range(num)], [0.01] * num, uniform, [-1] * num)
    got, best = make_ops(name).sample(logits_SV, draws)()
    want, largest = make_ops("reference").sample(logits_SV, draws)()
    assert best == largest
    assert sum(a != b for a, b in zip(got, want, strict=True)) <= 1
