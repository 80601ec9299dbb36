"""Attention of prompts by FlashInfer, where it is installed, over the pool as it is.

A block has, for each layer, K then V, each (tokens, KV heads, d): FlashInfer's layout NHD with a page stride of its
own, equal for K and V. It has not run on a GPU yet; what is passed to it is tested against what its documentation says.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loray_kernels.kv import AttentionMeta, KvLayout

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
WORKSPACE_BYTES = 128 << 20  # bytes; what its documentation advises

_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, OSError, subprocess.SubprocessError)

_log = logging.getLogger("loray.kernels")


class Prompts(NamedTuple):
    """The sequences of a step with several queries, as FlashInfer's plan takes them: int32, `indices` on the device.

    tokens  of the step that are their queries; None: all
    """

    tokens: Tensor | None
    qo_indptr: Tensor
    kv_indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


def prompts_of(meta: AttentionMeta, block_tokens: int) -> Prompts:
    spans = [*pairwise(meta.query_start)]
    own = [i for i, (start, stop) in enumerate(spans) if stop - start > 1]
    pages = [-(-meta.context_len[i] // block_tokens) for i in own]
    device = meta.slot_mapping_T.device
    tokens = None
    if len(own) < len(spans):
        tokens = torch.tensor([t for i in own for t in range(*spans[i])], device=device)

    def host(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return Prompts(
        tokens,
        host([*accumulate((spans[i][1] - spans[i][0] for i in own), initial=0)]),
        host([*accumulate(pages, initial=0)]),
        torch.cat([meta.block_table[i][:num] for i, num in zip(own, pages, strict=True)]).int(),
        host([meta.context_len[i] - (num - 1) * block_tokens for i, num in zip(own, pages, strict=True)]),
    )


def keys_and_values(pool: Tensor, layout: KvLayout, layer: int) -> tuple[Tensor, Tensor]:
    """Give views (blocks, tokens, KV heads, d) of the whole pool."""
    shape = (-1, layout.num_layers, 2, layout.block_tokens, layout.num_kv_heads, layout.head_dim)
    own = pool.view(shape)[:, layer]
    return own[:, 0], own[:, 1]


class FlashPrompts:
    """Planned once for each step, and again where a layer scales otherwise.

    make  a BatchPrefillWithPagedKVCacheWrapper of a workspace and a layout's name
    """

    def __init__(self, make: Callable[[Tensor, str], Any], device: torch.device) -> None:
        self._wrapper = make(torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device), "NHD")
        self._planned: AttentionMeta | None = None
        self._scale = 0.0  # that it was planned with
        self._prompts: Prompts | None = None
        self._broken = False

    def __call__(
        self,
        q_THd: Tensor,
        out_THd: Tensor,
        pool: Tensor,
        layout: KvLayout,
        layer: int,
        meta: AttentionMeta,
        scale: float,
    ) -> bool:
        """Write the outputs of sequences with several queries. False if that cannot be done: their shape or dtype is
        another's, or FlashInfer has failed, which is logged once; it compiles at first use, before the first request.
        """
        if self._broken or q_THd.dtype not in DTYPES or layout.head_dim not in HEAD_DIMS:
            return False
        try:
            if self._planned is not meta or self._prompts is None or self._scale != scale:
                self._planned, self._prompts, self._scale = meta, prompts_of(meta, layout.block_tokens), scale
                self._wrapper.plan(
                    self._prompts.qo_indptr,
                    self._prompts.kv_indptr,
                    self._prompts.indices,
                    self._prompts.last_page_len,
                    num_qo_heads=q_THd.shape[1],
                    num_kv_heads=layout.num_kv_heads,
                    head_dim_qk=layout.head_dim,
                    page_size=layout.block_tokens,
                    causal=True,
                    sm_scale=scale,
                    q_data_type=q_THd.dtype,
                    kv_data_type=pool.dtype,
                    disable_split_kv=True,  # else the cuts depend on the other prompts of the step
                )
            tokens, kv = self._prompts.tokens, keys_and_values(pool, layout, layer)
            if tokens is None:
                self._wrapper.run(q_THd.contiguous(), kv, out=out_THd)
            else:
                out_THd[tokens] = self._wrapper.run(q_THd[tokens], kv)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as e:  # a compiler that is missing, a card that it does not know, another version
            self._broken = True
            _log.warning("FlashInfer does not work here; prompts' attention is by our own kernels: %s", e)
            return False
        return True


def flash_prompts(device: torch.device) -> FlashPrompts | None:
    """Make the attention of prompts on `device`; None where FlashInfer cannot be imported."""
    try:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper
    except ImportError:
        return None
    return FlashPrompts(BatchPrefillWithPagedKVCacheWrapper, device)
