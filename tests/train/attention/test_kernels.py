"""Which kernel a device and the installed packages get, and that the installed torch takes what is passed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from loray.train import s2_attention
from loray.train.attention import attend
from loray.train.attention.attend import attend_cpu, attend_sdpa, attend_varlen
from tests.train.attention.functions import flash_attn_varlen_func, install_flash_attn, torch_varlen
from tests.train.attention.test_s2_attention import qkv, runs


def flash_attn_of_2023(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    raise AssertionError("it has no parameter that says whether its backward pass is deterministic")


def varlen_attn_of_2025(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
    scale: float | None = None,
) -> Tensor:
    raise AssertionError("it has neither windows nor heads that share keys")


NONE, OLD, NEW = None, flash_attn_of_2023, flash_attn_varlen_func


@pytest.mark.parametrize(
    ("device", "dtype", "width", "flash_attn", "has_new_torch", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, 128, NEW, True, 9, attend_varlen),
        ("cuda", torch.float32, 128, NEW, True, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 512, NEW, True, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 128, NONE, True, 9, attend_varlen),
        ("cuda", torch.bfloat16, 128, OLD, True, 9, attend_varlen),
        ("cuda", torch.bfloat16, 128, NEW, False, 9, attend_varlen),
        ("cuda", torch.bfloat16, 128, NONE, False, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 128, OLD, False, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 12, NEW, True, 9, attend_varlen),
        ("cuda", torch.bfloat16, 12, NONE, True, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 12, OLD, True, 9, attend_sdpa),
        ("cuda", torch.bfloat16, 128, NEW, True, 7, attend_sdpa),
        ("cpu", torch.bfloat16, 128, NEW, True, 9, attend_cpu),
        ("meta", torch.bfloat16, 128, NEW, True, 9, attend_sdpa),
    ],
)
def test_choice_of_a_kernel(
    device: str,
    dtype: torch.dtype,
    width: int,
    flash_attn: object,
    has_new_torch: bool,
    capability: int,
    expected: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_flash_attn(monkeypatch, flash_attn)
    if not has_new_torch:
        monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn_of_2025)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    choose = attend.select_backend.__wrapped__  # what an earlier case chose is kept
    assert choose(torch.device(device), dtype, width) is expected


def test_a_torch_without_attention_to_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash_attn(monkeypatch, None)
    monkeypatch.setitem(sys.modules, torch_varlen.__name__, None)
    assert attend._kernel() is None


@pytest.mark.parametrize("ids", [None, [runs((0, 11), (1, 12), (-1, 7))]], ids=["one document", "packed and padded"])
def test_the_function_of_the_installed_torch_takes_its_arguments(
    ids: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, without storage: the function itself runs, and its kernel says the shapes alone."""
    install_flash_attn(monkeypatch, None)
    monkeypatch.setattr(attend, "select_backend", lambda *_: attend_varlen)
    q, k, v = (x.detach().to("meta").requires_grad_() for x in qkv(1, 9, 3, 30, torch.bfloat16))
    out = s2_attention(q, k, v, group_size=8, document_ids_BT=None if ids is None else torch.tensor(ids))
    assert out.shape == q.shape
    out.sum().backward()
    assert [x.grad is not None and x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
