"""Vectors: what an adapter brings to recorded steps beside LoRA. VeRA's d and b and its pair, DoRA's scales, weights of
norms, a RoPE.

A record of vectors is words in a directory, as LoRA's records are. Its head has for each layer, and then for what is
outside of layers, where a block begins, from the record's start; then where a RoPE's numbers and a pair's words begin;
0: none. A block has an offset for each segment of each vector, or −1. The head of a token without a record is zeros.

Shapes: S tokens of a step, L layers and one more for what is outside of them, W words of a block, h half of head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray_kernels.records import INPUTS, Columns, InputShape, RowTables

MAX_PAIR_RANK = 1024  # of a VeRA pair; an adapter with more has no record

Name = tuple[str, str]  # (module, role), as in the engine's tables
Offsets = Mapping[Name, Sequence[int]]  # of each segment


@dataclass(frozen=True, slots=True)
class TokenRows:
    """For each of the tokens `tokens_N` of the step a row of the pool: used instead of the base's, or DoRA's scale.

    Recorded steps name all tokens, and those without a row have the offset −1.
    """

    tokens_N: Tensor
    rows: RowTables


class Slot(NamedTuple):
    """A vector's first word in a block, and its segments. Those of vera_d depend on the adapter: it has one."""

    word: int
    columns: Columns


class Pair(NamedTuple):
    """Where A (rank, width) and B (any, rank) begin in the pool. These are a record's words of its pair."""

    a: int
    b: int
    rank: int
    width: int


@dataclass(frozen=True, slots=True)
class VectorShape:
    """The blocks of a base, equal for all its adapters."""

    num_layers: int
    slots: Mapping[Name, Slot]
    num_words: int

    @classmethod
    def of(cls, inputs: Sequence[InputShape], num_layers: int, head_dim: int) -> VectorShape:
        hidden = inputs[0].a if inputs else ()
        columns: dict[Name, Columns] = {
            ("input_layernorm", "norm"): hidden,
            ("post_attention_layernorm", "norm"): hidden,
            ("self_attn.q_norm", "norm"): ((0, head_dim),),
            ("self_attn.k_norm", "norm"): ((0, head_dim),),
            ("norm", "norm"): ((0, sum(width for _, width in hidden)),),
        }
        for modules, shape in zip(INPUTS, inputs, strict=False):
            for module, own in zip(modules, shape.b, strict=True):
                columns |= {(module, "dora"): own, (module, "vera_d"): ((0, 0),), (module, "vera_b"): own}
        starts = accumulate(map(len, columns.values()), initial=0)
        slots = {name: Slot(word, own) for word, (name, own) in zip(starts, columns.items(), strict=False)}
        return cls(num_layers, slots, sum(map(len, columns.values())))

    @property
    def rope_word(self) -> int:
        return self.num_layers + 1

    @property
    def pair_word(self) -> int:
        return self.num_layers + 2

    @property
    def head(self) -> int:
        """Words of a head."""
        return self.num_layers + 3


def vector_words(
    shape: VectorShape,
    groups: Sequence[Offsets],
    layer_group: Sequence[int],
    flat: Offsets,
    rope_h1: npt.NDArray[np.float32] | None,
    pair: Pair | None,
) -> npt.NDArray[np.int64]:
    """A record, as the module describes it. Layers of one group share a block.

    layer_group  the group of each layer; −1 for a layer without vectors
    rope_h1      inverse frequencies, and the factor of cos and sin
    """
    blocks = [_block(shape, own) if own else [] for own in (*groups, flat)]
    rope = [] if rope_h1 is None else rope_h1.view(np.int32).tolist()
    parts = [*blocks, rope, [] if pair is None else [*pair]]
    firsts = accumulate(map(len, parts), initial=shape.head)
    starts = [first if part else 0 for first, part in zip(firsts, parts, strict=False)]
    of_layers = [starts[g] if g >= 0 else 0 for g in layer_group]
    return np.array([*of_layers, *starts[len(groups) :], *(word for part in parts for word in part)], dtype=np.int64)


def _block(shape: VectorShape, own: Offsets) -> list[int]:
    block = [-1] * shape.num_words
    for name, offsets in own.items():
        slot = shape.slots[name]
        assert len(offsets) == len(slot.columns)
        block[slot.word : slot.word + len(offsets)] = offsets
    return block


class StepVectors:
    """The vectors of a recorded step's tokens, found on the device from where their records begin.

    rows_LWS   offsets of segments, for layer 0; −1: the token has none
    items_S3   (where the words of a pair are, first token, tokens up to RECORD_TOKENS that share it); without tokens it
               is padding
    """

    def __init__(self, shape: VectorShape, words: Tensor, starts_S: Tensor, items_S3: Tensor) -> None:
        self.shape, self.words, self.items_S3 = shape, words, items_S3
        self._starts_S = starts_S
        device = words.device
        self.tokens_S = torch.arange(starts_S.shape[0], device=device)
        at_LS = words[starts_S + torch.arange(shape.num_layers + 1, device=device).unsqueeze(1)]
        blocks_LS = torch.where(at_LS > 0, starts_S + at_LS, 0)
        found_LWS = words[blocks_LS.unsqueeze(1) + torch.arange(shape.num_words, device=device).unsqueeze(1)]
        self.rows_LWS = torch.where((at_LS > 0).unsqueeze(1), found_LWS, -1)

    def token_rows(self, layer: int | None, module: str, role: str) -> TokenRows:
        """A vector of each token; layer None: outside of layers."""
        slot = self.shape.slots[module, role]
        own_WS = self.rows_LWS[self.shape.num_layers if layer is None else layer]
        rows = RowTables(tuple((c, w, own_WS[slot.word + i]) for i, (c, w) in enumerate(slot.columns)))
        return TokenRows(self.tokens_S, rows)

    def embedding_rows(self, offsets_S: Tensor) -> TokenRows:
        """Rows of hidden size outside of layers."""
        ((column, width),) = self.shape.slots["norm", "norm"].columns
        return TokenRows(self.tokens_S[: offsets_S.shape[0]], RowTables(((column, width, offsets_S),)))

    def modules(self, field: int, role: str) -> list[tuple[str, int, slice]]:
        """(module, layer, columns of its vector among those of all modules) of a field, which is layer × inputs + the
        input.
        """
        layer, number = divmod(field, len(INPUTS))
        widths = [sum(w for _, w in self.shape.slots[m, role].columns) for m in INPUTS[number]]
        firsts = accumulate(widths, initial=0)
        return [(m, layer, slice(at, at + w)) for m, at, w in zip(INPUTS[number], firsts, widths, strict=False)]

    def rope(self, inverse_h: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Inverse frequencies (S, h) and factors (S,): those of the token's record, or the given ones."""
        at_S = self.words[self._starts_S + self.shape.rope_word]
        numbers = torch.arange(inverse_h.shape[0] + 1, device=inverse_h.device)
        bits_Sh1 = self.words[torch.where(at_S > 0, self._starts_S + at_S, 0).unsqueeze(1) + numbers]
        own_Sh1 = bits_Sh1.to(torch.int32).view(torch.float32)
        inverse_Sh = torch.where((at_S > 0).unsqueeze(1), own_Sh1[:, :-1], inverse_h)
        return inverse_Sh, torch.where(at_S > 0, own_Sh1[:, -1], factor)
