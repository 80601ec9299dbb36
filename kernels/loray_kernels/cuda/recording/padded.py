"""A decode step of a padded size: what goes up for it in one copy, and the step that the device makes of that.

Whatever changes from step to step stands in tensors that stay in place, since a recorded step contains their addresses.
Padding has no context, and its keys and values are not written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loray_kernels.cuda.tables import Attention, Items, num_splits, upload
from loray_kernels.cuda.vectors import RecordedVectors
from loray_kernels.decoding import DecodeStep, Decoding, Parts, RecordedStep, StepRecords
from loray_kernels.kv import AttentionMeta
from loray_kernels.records import Records
from loray_kernels.sampling.draws import TokenSeats
from loray_kernels.vectors import VectorShape

_MORE_BLOCKS = 1024  # that go up with a step beside one for each of its sequences; more are a copy of their own


class StepWords:
    """The numbers of a step on the device: token ids (−1: the one drawn before), positions, seats, items of adapters;
    with `vectors` their starts, pairs and own embedding rows; then places and blocks of a new block for each sequence,
    which the step itself writes to the tables; then those of more, which are written before it.

    They go up from two pinned copies by turns: what was computed from one has been read before it is written again.

    blocks  the tables of all seats, and an element that nobody reads, for what is no new block
    """

    def __init__(self, size: int, blocks: Tensor, *, vectors: bool = False) -> None:
        self._size, self._vectors, self._num = size, vectors, (11 if vectors else 6) * size
        self._blocks, self._nowhere = blocks, len(blocks) - 1
        words, pinned = self._num + 2 * size + 2 * _MORE_BLOCKS, blocks.is_cuda
        self.words = torch.zeros(words, dtype=torch.int64, device=blocks.device)
        self.words[size : 2 * size] = -1  # the run before a recording writes no keys,
        self.words[self._num : self._num + size] = self._nowhere  # and no tables
        self._staged = [torch.zeros(words, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._views = [staged.numpy() for staged in self._staged]
        self._turn = 0

    def fill(self, step: DecodeStep) -> None:
        """At most `size` sequences; the rest is padding."""
        size, num, new = self._size, len(step.token_ids), len(step.places)
        self._turn ^= 1
        view = self._views[self._turn]
        view[:num] = step.token_ids
        view[size : size + num] = step.positions
        view[size + num : 2 * size] = -1
        view[2 * size : 2 * size + num] = step.seats
        view[3 * size : 3 * size + len(step.items)] = step.items
        view[3 * size + len(step.items) : self._num] = 0
        if self._vectors:
            view[6 * size : 10 * size] = 0
            view[6 * size : 6 * size + len(step.vectors)] = step.vectors
            view[7 * size : 7 * size + len(step.pairs)] = step.pairs
            view[10 * size : 10 * size + len(step.own_rows)] = step.own_rows
            view[10 * size + len(step.own_rows) : self._num] = -1
        first, used = self._num, self._num + 2 * size
        view[first : first + size] = self._nowhere
        if new <= size:
            view[first : first + new] = step.places
            view[first + size : first + size + new] = step.blocks
        elif new <= _MORE_BLOCKS:
            view[used : used + new] = step.places
            view[used + new : used + 2 * new] = step.blocks
            self.send(self._staged[self._turn][: used + 2 * new])
            self._blocks.index_copy_(0, self.words[used : used + new], self.words[used + new : used + 2 * new])
            return
        else:
            self._blocks.index_copy_(0, *upload(self._blocks.device, step.places, step.blocks))
        self.send(self._staged[self._turn][:used])

    def write_blocks(self) -> None:
        """Those of the step, to the tables."""
        places_S, blocks_S = self.words[self._num : self._num + 2 * self._size].view(2, self._size)
        self._blocks.index_copy_(0, places_S, blocks_S)

    def send(self, staged: Tensor) -> None:
        """The one copy to the device of a step. It waits for nothing."""
        self.words[: staged.shape[0]].copy_(staged, non_blocking=True)


class PaddedStep:
    """A step of `size` sequences, computed on the device from its words and the seats' block tables."""

    def __init__(
        self,
        size: int,
        blocks: Tensor,
        tokens: Tensor,
        decoding: Decoding,
        parts: Parts = Parts.NONE,
        records: Records | None = None,
        shape: VectorShape | None = None,
    ) -> None:
        device = blocks.device
        self._parts, self._shape = parts, shape
        self._has_vectors = bool(parts & ~Parts.LORA)
        self.words = StepWords(size, blocks, vectors=self._has_vectors)
        self._size, self._blocks, self._records, self._decoding = size, blocks, records, decoding
        self._tokens = tokens  # by seat, that the step before has drawn
        self._numbers = torch.arange(size + 1, device=device)
        self._decoded = Items(self._numbers[:size].repeat_interleave(2).contiguous(), size)
        self._prefilled = Items(torch.zeros(0, dtype=torch.int64, device=device), 0)

    def seats(self, num: int) -> TokenSeats:
        """Of the first `num` rows, where their tokens are drawn to."""
        return TokenSeats(self.words.words[2 * self._size : 2 * self._size + num], self._tokens)

    def step(self) -> RecordedStep:
        size, block_tokens = self._size, self._decoding.layout.block_tokens
        self.words.write_blocks()
        words = self.words.words
        known_S, positions_S, seats_S = words[: 3 * size].view(3, size)
        token_ids_S = torch.where(known_S < 0, self._tokens[seats_S], known_S)
        at_S, start_S = positions_S.clamp(min=0), seats_S * self._decoding.max_blocks
        block_S = self._blocks[start_S + at_S // block_tokens]
        slots_S = torch.where(positions_S < 0, -1, block_S * block_tokens + at_S % block_tokens)
        meta = AttentionMeta(tuple(range(size + 1)), (0,) * size, (), slots_S)
        meta.memo["cuda"] = Attention(
            query_start=self._numbers,
            context_len=positions_S + 1,
            table_start=start_S,
            blocks=self._blocks,
            decoded=self._decoded,
            prefilled=self._prefilled,
            max_splits=num_splits(self._decoding.max_blocks * block_tokens),
        )
        if not self._parts or self._records is None:
            return RecordedStep(token_ids_S, at_S, meta, None)
        items_S3, vectors = words[3 * size : 6 * size].view(size, 3), None
        if self._has_vectors and self._shape is not None:
            pairs_S3 = words[7 * size : 10 * size].view(size, 3)
            vectors = RecordedVectors(self._records, self._shape, words[6 * size : 7 * size], pairs_S3)
        records = StepRecords(self._records, items_S3, self._parts, vectors)
        own_rows = None
        if vectors is not None and Parts.OWN in self._parts:
            own_rows = vectors.embedding_rows(words[10 * size : 11 * size])
        return RecordedStep(token_ids_S, at_S, meta, records, own_rows)
