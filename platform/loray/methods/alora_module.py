"""Where aLoRA is active in a batch, and the hooks that turn LoRA's modules off elsewhere.

Shapes: B rows, T positions of a row here, N of a whole row of which a rank may hold a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loray.methods.base import ADAPTER


class WholeRows(NamedTuple):
    """The rows of which a model is given the positions `span`. Neighbours with equal ids are of one document, and −1 is
    padding.
    """

    input_ids_BN: Tensor
    document_ids_BN: Tensor
    span: slice


_WHOLE: ContextVar[WholeRows | None] = ContextVar("loray_whole_rows", default=None)


@contextmanager
def part_of(rows: WholeRows) -> Iterator[None]:
    """Inside the block models are given a part of `rows`."""
    token = _WHOLE.set(rows)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def find_active(input_ids_BN: Tensor, document_ids_BN: Tensor, invocation: Sequence[int]) -> Tensor:
    """Mark the tokens (B, N) on which an adapter is active: in each document those from the start of its last
    `invocation` on, none in a document without. Document ids are those of WholeRows.
    """
    num_starts = input_ids_BN.shape[1] - len(invocation) + 1
    starts_BN = torch.zeros_like(input_ids_BN)
    if num_starts <= 0:
        return starts_BN.bool()
    new_BN = torch.zeros_like(starts_BN)
    new_BN[:, 1:] = document_ids_BN[:, 1:] != document_ids_BN[:, :-1]
    number_BN = new_BN.cumsum(1)  # of each document in its row: equal ids apart are different ones
    found_BN = (number_BN[:, :num_starts] == number_BN[:, len(invocation) - 1 :]) & (
        document_ids_BN[:, :num_starts] >= 0
    )
    for i, token in enumerate(invocation):
        found_BN = found_BN & (input_ids_BN[:, i : i + num_starts] == token)
    starts_BN[:, :num_starts] = found_BN
    # A token is active where its document has a start up to it and none after it.
    counts_BN = torch.zeros_like(starts_BN).scatter_add_(1, number_BN, starts_BN)
    left_BN = counts_BN.cumsum(1).gather(1, number_BN) - starts_BN.cumsum(1)
    return (left_BN == 0) & (counts_BN.gather(1, number_BN) > 0)


class Activation:
    """The tokens of a model's current batch on which its adapter is active."""

    def __init__(self, invocation: Sequence[int]) -> None:
        self._invocation = tuple(invocation)
        self._active_BT1: Tensor | None = None  # kept: layers may be computed again in the backward pass

    def put_into(self, model: Any) -> None:
        """Multiply A x of each LoRA module of a transformers model by 0 where the adapter is not active."""
        from peft.tuners.tuners_utils import BaseTunerLayer  # takes a second, and checkpoints are read without it

        model.base_model.register_forward_pre_hook(self._find, with_kwargs=True)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                lora_a: Any = module.lora_A
                lora_a[ADAPTER].register_forward_hook(self._mask)

    def _find(self, module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Take the inputs of a batch as training gives them, or of a step of generation with a cache, which goes on as
        its prompt ended.
        """
        ids_BT = args[0] if args else inputs["input_ids"]
        cache, before_BT1 = inputs.get("cache"), self._active_BT1
        if before_BT1 is not None and cache is not None and cache.get_seq_length():
            self._active_BT1 = before_BT1[:, -1:].expand(-1, ids_BT.shape[1], -1)
            return
        if (whole := _WHOLE.get()) is not None:
            active_BT = find_active(whole.input_ids_BN, whole.document_ids_BN, self._invocation)[:, whole.span]
        else:
            active_BT = find_active(ids_BT.cpu(), _documents(ids_BT, inputs), self._invocation)
        self._active_BT1 = active_BT.unsqueeze(2).to(ids_BT.device)

    def _mask(self, module: nn.Module, args: tuple[Any, ...], inner_BTR: Tensor) -> Tensor:
        assert self._active_BT1 is not None
        return inner_BTR * self._active_BT1


def _documents(ids_BT: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Document ids by positions that start anew, and by the mask; on the CPU, as attention finds them, too."""
    documents_BT = torch.zeros_like(ids_BT, device="cpu")
    if (positions_BT := inputs.get("position_ids")) is not None:
        documents_BT[:, 1:] = (torch.diff(positions_BT.cpu(), dim=1) != 1).cumsum(1)
    if (mask_BT := inputs.get("attention_mask")) is not None:
        documents_BT = documents_BT.masked_fill(mask_BT.cpu() == 0, -1)
    return documents_BT
