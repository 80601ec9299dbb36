"""Attention of other packages on a CPU: their functions with their own parameters, computed without their kernels."""

from __future__ import annotations

import sys
from functools import wraps
from importlib.machinery import ModuleSpec
from inspect import signature
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from loray.train.attention import attend


def flash_attn_varlen_func(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """flash-attn's function as its documentation has it, computed without its kernel."""
    assert causal
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == int(torch.diff(cu_seqlens_q).max())
    assert int(cu_seqlens_q[0]) == 0
    assert int(cu_seqlens_q[-1]) == len(q_NHD) == len(k_NKD) == len(v_NKD)
    outs = []
    for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (q_NHD, k_NKD, v_NKD))
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)[0])
    return torch.cat(outs, dim=1).transpose(0, 1)


varlen_attn = torch_varlen.varlen_attn  # that of the installed torch


@wraps(varlen_attn)
def varlen_attn_on_cpu(*arguments: Any, **options: Any) -> Tensor:
    """torch's function with its own parameters, computed without its kernel."""
    given = signature(varlen_attn).bind(*arguments, **options).arguments
    assert given["window_size"] == (-1, 0)
    assert given["enable_gqa"]
    fixed = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(*arguments, softmax_scale=given["scale"], causal=True, deterministic=fixed)


def install_flash_attn(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """A package flash-attn with this function; None: it is not installed."""
    package: Any = None
    if function is not None:
        package = ModuleType("flash_attn")
        package.__spec__ = ModuleSpec("flash_attn", None)
        package.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attend, "_kernel", attend._kernel.__wrapped__)  # what an earlier case found is kept
