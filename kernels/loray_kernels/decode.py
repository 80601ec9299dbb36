"""Decode steps that a backend captures and replays. Shapes: S sequences of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import IntFlag
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray_kernels.descriptors import (
    DescriptorAllocator,
    DescriptorTable,
    InputShape,
    RowOverrides,
    StepVectors,
    VectorShape,
)
from loray_kernels.kv import AttentionMeta, KvLayout
from loray_kernels.sampling import TokenSlots

_NONE = np.array([], dtype=np.int64)


class Parts(IntFlag):
    """The kinds of rows that the adapters of a step have. SCALE: scales of outputs. OWN: norms, embedding rows, a
    RoPE.
    """

    NONE = 0
    LORA = 1
    VERA = 2
    SCALE = 4
    OWN = 8


class StepDescriptors(NamedTuple):
    """The adapters of a decode step, by descriptor.

    items_S3  (start of an adapter's descriptor of LoRA, first token, tokens); without tokens it is padding
    vectors   given if `parts` is more than LoRA
    """

    table: DescriptorTable
    items_S3: Tensor
    parts: Parts = Parts.LORA
    vectors: StepVectors | None = None


class DecodeStep(NamedTuple):
    """One token of each of S sequences, as numbers on the host. A sequence has a slot: a row of the block tables that
    stay on the device.

    token_ids  −1: the token that the step before has drawn for this slot
    items      flat: (start of a descriptor of LoRA, first token, tokens up to ITEM_TOKENS) for each; tokens without
               LoRA have none
    places     in the block tables, (slots, max_blocks) flat, whose `blocks` are new
    parts      with LoRA alone, what follows is empty
    vectors    where each sequence's descriptor of vectors begins; 0: none
    pairs      as `items`, of sequences that share a VeRA pair: (where its words are, first token, tokens)
    own_rows   offset of the embedding row that a sequence's adapter has for its token; −1: none. Empty: all have none
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    places: Sequence[int] = ()
    blocks: Sequence[int] = ()
    parts: Parts = Parts.NONE
    vectors: npt.NDArray[np.int64] = _NONE
    pairs: npt.NDArray[np.int64] = _NONE
    own_rows: npt.NDArray[np.int64] = _NONE


class CapturedStep(NamedTuple):
    """A decode step as the device's tensors.

    descriptors  None: all tokens are the base's
    own_rows     of embeddings; None without the part OWN
    """

    token_ids_S: Tensor
    positions_S: Tensor
    attention: AttentionMeta
    descriptors: StepDescriptors | None
    own_rows: RowOverrides | None = None


class CaptureBarrier(NamedTuple):
    """The calls with which ranks that compute a step together capture it together; the defaults are those of one rank.

    silent   while it is entered, a step of this rank waits for no other, and its result means nothing
    agree    whether a condition holds on every rank; each rank calls it equally often
    connect  calls the collectives that the last silent step would have called, as far as that has not been done: ranks
             connect to each other at the first call of a kind and size, which cannot be captured
    """

    silent: Callable[[], AbstractContextManager[None]] = nullcontext
    agree: Callable[[bool], bool] = bool
    connect: Callable[[], None] = lambda: None


class Decoding(NamedTuple):
    """The sizes that a backend needs to capture decode steps. `max_blocks`: the most of a sequence."""

    layout: KvLayout
    num_slots: int
    max_blocks: int
    inputs: tuple[InputShape, ...]
    device: torch.device
    ranks: CaptureBarrier = CaptureBarrier()


class CaptureLimits(NamedTuple):
    """Seconds after which no further capture begins; bytes of the device that all of them may take."""

    seconds: float
    num_bytes: int


class CaptureState(NamedTuple):
    """The progress of capturing: kinds of steps, seconds, and bytes of the device."""

    num_captured: int
    num_wanted: int
    seconds: float
    num_bytes: int


class CapturedDecoding(Protocol):
    """Decode steps of padded sizes. Steps name `descriptors`, whose vectors have the shape `vectors`, and have at most
    `max_rows` sequences.
    """

    descriptors: DescriptorAllocator
    vectors: VectorShape
    max_rows: int

    @property
    def slots(self) -> TokenSlots:
        """The slots of the last step's rows: the next step takes tokens from there."""
        ...

    def capture(self, limits: CaptureLimits, on_progress: Callable[[CaptureState], None]) -> CaptureState:
        """Capture steps, within `limits` of every rank: all have the same captures. Only before the first step."""
        ...

    def __call__(self, step: DecodeStep) -> Tensor:
        """Compute the result for each sequence, which the next call overwrites. Never captures: a step for which no
        capture serves is computed launch by launch.
        """
        ...
