"""Tables of recorded launches with vectors of adapters. They are made once for all steps, and kept with the records."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loray_kernels.cuda.tables import Rows, upload
from loray_kernels.records import INPUTS, Columns, Records
from loray_kernels.vectors import StepVectors, TokenRows, VectorShape

TILE_COLUMNS = 64  # of VeRA's outputs
_SCALE_COLUMNS = 512


class OfInput(NamedTuple):
    """What launches need of one input; see vera.cu and rows.cu."""

    words_M: Tensor
    tiles: Tensor
    num_tiles: int
    scale_tiles: Tensor
    num_scale_tiles: int


def pack_vectors(records: Records, shape: VectorShape, number: int) -> OfInput:
    packed: OfInput | None = records.memo.get(("vectors", number))
    if packed is None:
        words: list[int] = []
        tiles: list[int] = []
        scale_tiles: list[int] = []
        column = scale_column = 0
        pair_rows = records.inputs[number].pair_rows
        for m, module in enumerate(INPUTS[number]):
            d, (b, segments) = shape.slots[module, "vera_d"].word, shape.slots[module, "vera_b"]
            row = pair_rows[m]  # of B, the first of this rank
            words.append(d)
            for s, (first, width) in enumerate(segments):
                for at in range(0, width, TILE_COLUMNS):
                    tiles += (d, b + s, at, row + first + at, column + first + at, min(TILE_COLUMNS, width - at))
            column += sum(width for _, width in segments)
            dora, segments = shape.slots[module, "dora"]
            for s, (first, width) in enumerate(segments):
                for at in range(0, width, _SCALE_COLUMNS):
                    scale_tiles += (dora + s, at, scale_column + first + at, min(_SCALE_COLUMNS, width - at))
            scale_column += sum(width for _, width in segments)
        uploaded = upload(records.words.device, words, tiles, scale_tiles)
        packed = OfInput(uploaded[0], uploaded[1], len(tiles) // 6, uploaded[2], len(scale_tiles) // 4)
        records.memo["vectors", number] = packed
    return packed


class RecordedVectors(StepVectors):
    """Its rows are packed already, so that a recording uploads nothing."""

    def __init__(self, records: Records, shape: VectorShape, starts_S: Tensor, items_S3: Tensor) -> None:
        super().__init__(shape, records.words, starts_S, items_S3)
        self._records = records
        self._index_LWS = torch.where(self.rows_LWS >= 0, self.tokens_S, -1)

    def token_rows(self, layer: int | None, module: str, role: str) -> TokenRows:
        word, columns = self.shape.slots[module, role]
        at = self.shape.num_layers if layer is None else layer
        own = super().token_rows(layer, module, role)
        own.rows.memo["cuda tokens"] = self._index_LWS[at, word]
        return self._packed(own, self.rows_LWS[at, word : word + len(columns)].view(-1), columns)

    def embedding_rows(self, offsets_S: Tensor) -> TokenRows:
        columns = self.shape.slots["norm", "norm"].columns
        return self._packed(super().embedding_rows(offsets_S), offsets_S, columns)

    def _packed(self, own: TokenRows, offsets: Tensor, columns: Columns) -> TokenRows:
        segments = self._records.memo.get(columns)
        if segments is None:
            numbers = [v for pair in columns for v in pair]
            segments = self._records.memo[columns] = upload(self.words.device, numbers)[0]
        width = sum(width for _, width in columns)
        own.rows.memo["cuda"] = Rows(offsets, segments, len(columns), self.tokens_S.shape[0], width)
        return own
