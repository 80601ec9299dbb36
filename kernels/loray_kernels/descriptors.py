"""Adapter descriptors: where an adapter's rows are in the pool, as words in a table that kernels read.

A descriptor is written when its adapter is placed or moved and not step by step, and a decode step names descriptors
only. So the step's launches do not depend on which adapters it has, and can be captured.

LoRA's rows and an adapter's vectors (what it brings beside them) have descriptors of their own. One of LoRA begins with
where the block of each layer and input begins, see `descriptor_words`. One of vectors begins with a head, which has for
each layer, and then for what is outside of layers, where a block begins, from the descriptor's start; then where a
RoPE's numbers and a pair's words begin; 0: none; then what its scales of outputs scale: the outputs without the base's
bias (0, DoRA), with it (−1, IA³), or pairs of outputs that are so far apart (RoAd). A block has an offset for each
segment of each vector, or −1. The head of a token without a descriptor is zeros.

Shapes: S tokens of a step, L layers and one more for what is outside of them, W words of a block, h half of head_dim.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray_kernels.kv import to_device
from loray_kernels.prepare import Preparable

INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
ITEM_TOKENS = 4  # of one adapter, that share the reading of its rows
MAX_ROWS = 512  # of A, of all modules of one input; an adapter with more has no descriptor
MAX_PAIR_RANK = 1024  # of a VeRA pair; an adapter with more has no descriptor
_WORDS = 1 << 20  # of a table: 8 MB, the descriptors of 3,000 adapters of Llama-3-8B

Columns = tuple[tuple[int, int], ...]  # (first column, columns) of each segment of a row
Name = tuple[str, str]  # (module, role), as in the engine's tables
Offsets = Mapping[Name, Sequence[int]]  # of each segment


@dataclass(frozen=True, slots=True)
class RowTables(Preparable):
    """Rows of equal width: (column, width, int64 offsets of each row) for each segment."""

    segments: tuple[tuple[int, int, Tensor], ...]


@dataclass(frozen=True, slots=True)
class RowOverrides(Preparable):
    """A row of the pool for each of the tokens `tokens_N` of the step: used instead of the base's, or as scales.

    Captured steps name all tokens, and those without a row have the offset −1.
    """

    tokens_N: Tensor
    rows: RowTables


class LoraRows(NamedTuple):
    """One module's rows: for each segment of A's, and of B's, the offsets of all of them; alpha/r."""

    a: tuple[Sequence[int], ...]
    b: tuple[Sequence[int], ...]
    scale: float


class InputShape(NamedTuple):
    """Segments of rows of A, and of B for each module of INPUTS. Equal for all adapters of a base.

    pair_column  of A of a VeRA pair, the column that meets the input's first: a rank of several may have a part of it
    pair_rows    of B of a VeRA pair, for each module the row of this rank's first output
    """

    a: Columns
    b: tuple[Columns, ...]
    pair_column: int = 0
    pair_rows: tuple[int, ...] = (0, 0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class DescriptorTable(Preparable):
    """Descriptors in the device's memory, (words,) of int64, and the shape of the rows that they describe, by input."""

    words: Tensor
    inputs: tuple[InputShape, ...]


class DescriptorAllocator:
    """Gives descriptors their places in the table and writes them. For the engine's thread.

    The first `reserved` words stay zero.
    """

    def __init__(
        self, inputs: Sequence[InputShape], device: torch.device, num_words: int = _WORDS, *, reserved: int = 0
    ) -> None:
        self.table = DescriptorTable(torch.zeros(num_words, dtype=torch.int64, device=device), tuple(inputs))
        self._free = [(reserved, num_words - reserved)]  # (start, words), by start

    def add(self, words: npt.NDArray[np.int64]) -> int | None:
        """Write a new descriptor; returns its start, or None if there is no place for it."""
        size = len(words)
        for i, (start, free) in enumerate(self._free):
            if free >= size:
                self._free[i : i + 1] = [(start + size, free - size)] if free > size else []
                self.write(start, words)
                return start
        return None

    def write(self, start: int, words: npt.NDArray[np.int64]) -> None:
        """Replace a descriptor. Steps that are queued already read the old words."""
        own = self.table.words[start : start + len(words)]
        own.copy_(to_device(torch.from_numpy(words), own.device))

    def remove(self, start: int, size: int) -> None:
        insort(self._free, (start, size))
        joined: list[tuple[int, int]] = []
        for first, free in self._free:
            if joined and sum(joined[-1]) == first:
                joined[-1] = (joined[-1][0], joined[-1][1] + free)
            else:
                joined.append((first, free))
        self._free = joined


def descriptor_words(
    groups: Sequence[Mapping[str, LoraRows]], layer_group: Sequence[int], inputs: Sequence[InputShape]
) -> npt.NDArray[np.int64] | None:
    """A descriptor of LoRA: for each layer and input where its block begins, or 0; then the blocks, which layers of one
    group share. csrc/lora.cu describes a block. None if an input has more than MAX_ROWS rows.

    layer_group  the group of each layer; −1 for a layer without LoRA
    """
    blocks: list[list[int]] = []
    numbers: list[list[int]] = []  # of each group's blocks, by input; −1: none
    for rows in groups:
        numbers.append([])
        for modules, shape in zip(INPUTS, inputs, strict=True):
            block = _lora_block([rows.get(m) for m in modules], shape)
            numbers[-1].append(len(blocks) if block else -1)
            blocks += [block] if block else []
            if block and sum(block[: len(modules)]) > MAX_ROWS:
                return None
    head = len(layer_group) * len(INPUTS)
    starts = [*accumulate(map(len, blocks), initial=head)]
    none = [-1] * len(INPUTS)
    words = [starts[n] if n >= 0 else 0 for g in layer_group for n in (numbers[g] if g >= 0 else none)]
    return np.array([*words, *(word for block in blocks for word in block)], dtype=np.int64)


def _lora_block(modules: Sequence[LoraRows | None], shape: InputShape) -> list[int]:
    found = [rows for rows in modules if rows is not None]
    if not found:
        return []
    words = [0 if rows is None else len(rows.a[0]) for rows in modules]
    scales = np.array([0.0 if rows is None else rows.scale for rows in modules], dtype=np.float32)
    words += scales.view(np.uint32).tolist()
    for segment in range(len(shape.a)):
        words += [offset for rows in found for offset in rows.a[segment]]
    for rows in found:
        words += [offset for offsets in rows.b for offset in offsets]
    return words


def read_descriptor(words: Tensor, start: int, field: int, shape: InputShape) -> list[LoraRows | None]:
    """The modules of one input as `descriptor_words` wrote them, for the descriptor from `start` on."""
    at = int(words[start + field])
    if not at:
        return []
    num = len(shape.b)
    taken = start + at + 2 * num

    def take(count: int) -> list[int]:
        nonlocal taken
        taken += count
        return [int(word) for word in words[taken - count : taken]]

    ranks = [int(rank) for rank in words[start + at : start + at + num]]
    bits = words[start + at + num : taken].cpu().numpy().astype(np.uint32)
    a = [take(sum(ranks)) for _ in shape.a]
    firsts = [*accumulate(ranks, initial=0)]
    rows: list[LoraRows | None] = []
    for rank, first, scale, columns in zip(ranks, firsts, bits.view(np.float32), shape.b, strict=False):
        b = tuple(take(rank) for _ in columns)
        rows.append(LoraRows(tuple(s[first : first + rank] for s in a), b, float(scale)) if rank else None)
    return rows


# -- vectors -----------------------------------------------------------------------------------------------------------


class VectorEntry(NamedTuple):
    """A vector's first word in a block, and its segments. Those of vera_d depend on the adapter: it has one."""

    word: int
    columns: Columns


class Pair(NamedTuple):
    """A descriptor's words of its pair: where A (rank, width) and B (any, rank) begin in the pool."""

    a: int
    b: int
    rank: int
    width: int


@dataclass(frozen=True, slots=True)
class VectorShape:
    """The blocks of a base, equal for all its adapters."""

    num_layers: int
    slots: Mapping[Name, VectorEntry]
    num_words: int

    @classmethod
    def of(cls, inputs: Sequence[InputShape], num_layers: int, head_dim: int) -> VectorShape:
        hidden = inputs[0].a if inputs else ()
        columns: dict[Name, Columns] = {
            ("input_layernorm", "norm"): hidden,
            ("post_attention_layernorm", "norm"): hidden,
            ("pre_feedforward_layernorm", "norm"): hidden,
            ("post_feedforward_layernorm", "norm"): hidden,
            ("self_attn.q_norm", "norm"): ((0, head_dim),),
            ("self_attn.k_norm", "norm"): ((0, head_dim),),
            ("norm", "norm"): ((0, sum(width for _, width in hidden)),),
        }
        for modules, shape in zip(INPUTS, inputs, strict=False):
            for module, own in zip(modules, shape.b, strict=True):
                columns |= {(module, "scale"): own, (module, "turn"): own}
                columns |= {(module, "vera_d"): ((0, 0),), (module, "vera_b"): own}
        starts = accumulate(map(len, columns.values()), initial=0)
        slots = {name: VectorEntry(word, own) for word, (name, own) in zip(starts, columns.items(), strict=False)}
        return cls(num_layers, slots, sum(map(len, columns.values())))

    @property
    def rope_word(self) -> int:
        return self.num_layers + 1

    @property
    def pair_word(self) -> int:
        return self.num_layers + 2

    @property
    def scaling_word(self) -> int:
        return self.num_layers + 3

    @property
    def head(self) -> int:
        """Words of a head."""
        return self.num_layers + 4


def vector_words(
    shape: VectorShape,
    groups: Sequence[Offsets],
    layer_group: Sequence[int],
    flat: Offsets,
    rope_h1: npt.NDArray[np.float32] | None,
    pair: Pair | None,
    scaling: int = 0,
) -> npt.NDArray[np.int64]:
    """A descriptor of vectors, as the module describes it. Layers of one group share a block.

    layer_group  the group of each layer; −1 for a layer without vectors
    rope_h1      inverse frequencies, and the factor of cos and sin
    scaling      what the scales of outputs scale, the head's last word
    """
    blocks = [_vector_block(shape, own) if own else [] for own in (*groups, flat)]
    rope = [] if rope_h1 is None else rope_h1.view(np.int32).tolist()
    parts = [*blocks, rope, [] if pair is None else [*pair]]
    firsts = accumulate(map(len, parts), initial=shape.head)
    starts = [first if part else 0 for first, part in zip(firsts, parts, strict=False)]
    of_layers = [starts[g] if g >= 0 else 0 for g in layer_group]
    head = [*of_layers, *starts[len(groups) :], scaling]
    return np.array([*head, *(word for part in parts for word in part)], dtype=np.int64)


def _vector_block(shape: VectorShape, own: Offsets) -> list[int]:
    block = [-1] * shape.num_words
    for name, offsets in own.items():
        slot = shape.slots[name]
        assert len(offsets) == len(slot.columns)
        block[slot.word : slot.word + len(offsets)] = offsets
    return block


class StepVectors:
    """The vectors of a captured step's tokens, found on the device from where their descriptors begin.

    rows_LWS   offsets of segments, for layer 0; −1: the token has none
    items_S3   (where the words of a pair are, first token, tokens up to ITEM_TOKENS that share it); without tokens it
               is padding
    """

    def __init__(self, shape: VectorShape, words: Tensor, starts_S: Tensor, items_S3: Tensor) -> None:
        self.shape, self.words, self.items_S3 = shape, words, items_S3
        self.starts_S = starts_S
        device = words.device
        self.tokens_S = torch.arange(starts_S.shape[0], device=device)
        at_LS = words[starts_S + torch.arange(shape.num_layers + 1, device=device).unsqueeze(1)]
        blocks_LS = torch.where(at_LS > 0, starts_S + at_LS, 0)
        found_LWS = words[blocks_LS.unsqueeze(1) + torch.arange(shape.num_words, device=device).unsqueeze(1)]
        self.rows_LWS = torch.where((at_LS > 0).unsqueeze(1), found_LWS, -1)

    def token_rows(self, layer: int | None, module: str, role: str) -> RowOverrides:
        """Give a vector of each token; layer None: outside of layers."""
        slot = self.shape.slots[module, role]
        own_WS = self.rows_LWS[self.shape.num_layers if layer is None else layer]
        rows = RowTables(tuple((c, w, own_WS[slot.word + i]) for i, (c, w) in enumerate(slot.columns)))
        return RowOverrides(self.tokens_S, rows)

    def embedding_rows(self, offsets_S: Tensor) -> RowOverrides:
        """Give rows of hidden size outside of layers."""
        ((column, width),) = self.shape.slots["norm", "norm"].columns
        return RowOverrides(self.tokens_S[: offsets_S.shape[0]], RowTables(((column, width, offsets_S),)))

    def modules(self, field: int, role: str) -> list[tuple[str, int, slice]]:
        """(module, layer, columns of its vector among those of all modules) of a field, which is layer × inputs + the
        input.
        """
        layer, number = divmod(field, len(INPUTS))
        widths = [sum(w for _, w in self.shape.slots[m, role].columns) for m in INPUTS[number]]
        firsts = accumulate(widths, initial=0)
        return [(m, layer, slice(at, at + w)) for m, at, w in zip(INPUTS[number], firsts, widths, strict=False)]

    def rope(self, inverse_h: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Inverse frequencies (S, h) and factors (S,): those of the token's descriptor, or the given ones."""
        at_S = self.words[self.starts_S + self.shape.rope_word]
        numbers = torch.arange(inverse_h.shape[0] + 1, device=inverse_h.device)
        bits_Sh1 = self.words[torch.where(at_S > 0, self.starts_S + at_S, 0).unsqueeze(1) + numbers]
        own_Sh1 = bits_Sh1.to(torch.int32).view(torch.float32)
        inverse_Sh = torch.where((at_S > 0).unsqueeze(1), own_Sh1[:, :-1], inverse_h)
        return inverse_Sh, torch.where(at_S > 0, own_Sh1[:, -1], factor)


# -- checks before compiled kernels are called -------------------------------------------------------------------------


def token_rows(x: Tensor) -> Tensor:
    """Give `x`, or a copy if the elements of a token are not contiguous. Tokens may be any stride apart."""
    if x.is_contiguous() or (x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])):
        return x
    return x.contiguous()


def row_size(rows: RowTables) -> tuple[int, int]:
    """(number of rows, columns). AssertionError unless the segments follow each other and have equally many rows."""
    num, width = rows.segments[0][2].shape[0], 0
    for column, columns, offsets_R in rows.segments:
        assert column == width
        assert offsets_R.shape[0] == num
        width += columns
    return num, width


def side_by_side(h: Sequence[Tensor]) -> Tensor:
    """Give the modules' intermediates as columns of one matrix: that of `lora_shrink` if they are still its parts, else
    a copy.
    """
    first, width = h[0], sum(t.shape[1] for t in h)
    at, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for h_TR in h:
        if (
            h_TR.untyped_storage().data_ptr() != storage
            or h_TR.data_ptr() != at
            or h_TR.stride() != (first.stride(0), 1)
            or h_TR.dtype is not torch.float32
        ):
            return torch.cat([t.float() for t in h], dim=1)
        at += h_TR.shape[1] * h_TR.element_size()
    return first.as_strided((first.shape[0], width), first.stride())
