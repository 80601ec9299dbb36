"""Decode steps that a backend records once and replays: one token of each of S sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray_kernels.kv import AttentionMeta, KvLayout
from loray_kernels.records import Directory, InputShape, StepRecords


class DecodeStep(NamedTuple):
    """One token of each of S sequences, as numbers on the host. A sequence has a seat: a row of the block tables that
    stay on the device.

    items   flat: (start of a record, first token, tokens up to RECORD_TOKENS) for each; tokens of the base have none
    places  in the block tables, (seats, max_blocks) flat, whose `blocks` are new
    """

    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    seats: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    places: Sequence[int] = ()
    blocks: Sequence[int] = ()


class RecordedStep(NamedTuple):
    """A decode step as the device's tensors. `records` None: all tokens are the base's."""

    token_ids_S: Tensor
    positions_S: Tensor
    attention: AttentionMeta
    records: StepRecords | None


class Decoding(NamedTuple):
    """What a backend needs to record decode steps. `max_blocks`: the most of a sequence."""

    layout: KvLayout
    num_seats: int
    max_blocks: int
    inputs: tuple[InputShape, ...]
    device: torch.device


class RecordedDecoding(Protocol):
    """`directory` has the records of adapters that steps may name. Steps have at most `max_rows` sequences."""

    directory: Directory
    max_rows: int

    def __call__(self, step: DecodeStep) -> Tensor:
        """The result for each sequence, which the next call overwrites."""
        ...
