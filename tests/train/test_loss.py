"""The chunked loss against torch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loray.train import objectives as loss_module
from loray.train.objectives import summed_cross_entropy


def draw(
    num: int, width: int = 16, vocab: int = 50, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num)
    hidden_ND = torch.randn(num, width, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, width, generator=generator).to(dtype)
    return hidden_ND, weight_VD, torch.randint(0, vocab, (num,), generator=generator)


@pytest.mark.parametrize("num", [0, 1, 7, 40])
@pytest.mark.parametrize("chunk_elements", [1, 350, 1 << 20])
def test_equal_to_torch(num: int, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOSS_CHUNK_ON_CPU", chunk_elements)
    hidden_ND, weight_VD, labels_N = draw(num)
    total = summed_cross_entropy(hidden_ND, weight_VD, labels_N)
    (grad,) = torch.autograd.grad(total / 3, hidden_ND)
    expected = F.cross_entropy(hidden_ND @ weight_VD.T, labels_N, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected / 3, hidden_ND)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_summed_in_fp32() -> None:
    hidden_ND, weight_VD, labels_N = draw(512, dtype=torch.bfloat16)
    total = summed_cross_entropy(hidden_ND, weight_VD, labels_N)
    assert total.dtype == torch.float32
    expected = F.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    total.backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.dtype == torch.bfloat16


def test_gradient_by_finite_differences() -> None:
    hidden_ND, weight_VD, labels_N = draw(5, width=4, vocab=9, dtype=torch.float64)
    total = summed_cross_entropy(hidden_ND, weight_VD, labels_N)
    (grad,) = torch.autograd.grad(total, hidden_ND)
    direction = torch.randn(hidden_ND.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = F.cross_entropy
    step = 1e-5
    ahead = reference((hidden_ND + step * direction) @ weight_VD.T, labels_N, reduction="sum")
    behind = reference((hidden_ND - step * direction) @ weight_VD.T, labels_N, reduction="sum")
    torch.testing.assert_close((grad * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_without_gradients() -> None:
    hidden_ND, weight_VD, labels_N = draw(4)
    with torch.no_grad():
        assert not summed_cross_entropy(hidden_ND, weight_VD, labels_N).requires_grad


def test_a_trained_head_is_refused() -> None:
    hidden_ND, weight_VD, labels_N = draw(4)
    with pytest.raises(ValueError, match="output head"):
        summed_cross_entropy(hidden_ND, weight_VD.requires_grad_(), labels_N)
