"""The chunked divergence from a teacher against autograd on the formula over all logits, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loray.planning import devices
from loray.train.divergence import LEAST_REST, divergence

N, D, V, K = 13, 8, 40, 5


def drawn(num: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num)
    hidden_ND = torch.randn(num, D, generator=generator, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=dtype)
    labels_N = torch.randint(0, V, (num,), generator=generator)
    teacher_NV = 2 * torch.randn(num, V, generator=generator, dtype=dtype)
    best = teacher_NV.log_softmax(1).topk(K)
    return hidden_ND, weight_VD, labels_N, best.indices, best.values


def by_formula(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    ids_NK: Tensor,
    log_p_NK: Tensor,
    is_reverse: bool,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """The divergences and cross-entropies as their definitions say them."""
    logits_NV = hidden_ND @ weight_VD.T
    log_q_NV = (logits_NV if soft_cap is None else soft_cap * (logits_NV / soft_cap).tanh()).log_softmax(1)
    is_rest_NV = torch.ones_like(log_q_NV).scatter(1, ids_NK, 0.0)
    rest_q_N1 = (log_q_NV.exp() * is_rest_NV).sum(1, keepdim=True)
    rest_p_N1 = (1 - log_p_NK.exp().sum(1, keepdim=True)).clamp(min=LEAST_REST)
    log_q_NJ = torch.cat([log_q_NV.gather(1, ids_NK), rest_q_N1.log()], 1)
    log_p_NJ = torch.cat([log_p_NK, rest_p_N1.log()], 1)
    from_, to = (log_q_NJ, log_p_NJ) if is_reverse else (log_p_NJ, log_q_NJ)
    return (from_.exp() * (from_ - to)).sum(1), F.nll_loss(log_q_NV, labels_N, reduction="none")


@pytest.mark.parametrize("is_reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("chunk_elements", [1, 3 * V, 1 << 20])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_values_and_gradients_are_those_of_the_formula(
    is_reverse: bool, weight: float, chunk_elements: int, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "LOSS_CHUNK_ON_CPU", chunk_elements)
    given = drawn()
    found = divergence(*given, weight=weight, is_reverse=is_reverse, soft_cap=soft_cap)
    weights_N = torch.linspace(0.5, 2, N, dtype=torch.float64)
    (grad,) = torch.autograd.grad((weights_N * found.losses_N).sum(), given[0])
    kl_N, ce_N = by_formula(*given, is_reverse, soft_cap)
    losses_N = weight * kl_N + (1 - weight) * ce_N
    (expected,) = torch.autograd.grad((weights_N * losses_N).sum(), given[0])
    pairs = (found.losses_N, losses_N), (found.divergences_N, kl_N), (found.cross_entropies_N, ce_N), (grad, expected)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (found.divergences_N > 0).all()


@pytest.mark.parametrize("is_reverse", [False, True], ids=["forward", "reverse"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(is_reverse: bool) -> None:
    hidden_ND, weight_VD, labels_N, *_ = drawn()
    best = (hidden_ND.detach() @ weight_VD.T).log_softmax(1).topk(K)
    found = divergence(hidden_ND, weight_VD, labels_N, best.indices, best.values, weight=1.0, is_reverse=is_reverse)
    (grad,) = torch.autograd.grad(found.losses_N.sum(), hidden_ND)
    assert found.divergences_N.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("is_reverse", [False, True], ids=["forward", "reverse"])
def test_a_certain_teacher_and_a_certain_student_stay_finite(is_reverse: bool) -> None:
    hidden_ND, weight_VD, labels_N, ids_NK, _ = drawn(dtype=torch.float32)
    certain_NK = torch.tensor([0.0, -40.0, -50.0, -60.0, -200.0]).expand(N, K)  # sums to a little more than 1
    sharp_ND = (40 * hidden_ND.detach()).requires_grad_()
    found = divergence(sharp_ND, weight_VD, labels_N, ids_NK, certain_NK, weight=0.5, is_reverse=is_reverse)
    (grad,) = torch.autograd.grad(found.losses_N.sum(), sharp_ND)
    assert found.losses_N.isfinite().all()
    assert grad.isfinite().all()


def test_without_gradients_or_labels() -> None:
    with torch.no_grad():
        assert not divergence(*drawn(), weight=0.5, is_reverse=False).losses_N.requires_grad
    hidden_ND, *others = drawn(0)
    found = divergence(hidden_ND, *others, weight=0.5, is_reverse=True)
    found.losses_N.sum().backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.shape == (0, D)
