"""What the model says of rows before the first step: the reference that preferences are compared with.

One pass computes the log-probability of each row that a run meets, by the run's own workers and strategy, and keeps it
in blocks (`loray.train.data.kept`).

Rows are computed in the micro-batches that they are first trained in, whose shapes decide on last bits: before the
first step the policy says the same, bit for bit.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from loray.errors import TrainingError
from loray.train.data.batches import MicroBatch, RowSource, TrainBatch, collate_pairs
from loray.train.data.kept import Block, blocks_of, key_of, rows_of
from loray.train.data.shards import FolderCache
from loray.train.mesh import Mesh
from loray.train.objectives import Score

LogProbs = NDArray[np.float32]


class Reference:
    """Log-probabilities of the rows of pairs that `planned` holds.

    planned  micro-batches as they are trained or measured; a row counts where it comes first
    named    all that the log-probabilities depend on beside the rows, as JSON

    Every rank makes one, and calls its methods, at the same time. `missing` are blocks that no run has computed.
    """

    def __init__(
        self,
        rows: RowSource,
        planned: Iterable[MicroBatch],
        named: Sequence[object],
        cache: FolderCache,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self._rows, self._named, self._cache, self._mesh, self._device = rows, named, cache, mesh, device
        self._log_probs_R: LogProbs = np.full(len(rows.lengths), np.nan, np.float32)
        blocks = blocks_of(planned, len(rows.lengths) // 2)
        kept = [self._kept(block) if mesh.world.rank == 0 else None for block in blocks]
        are_kept = mesh.world.sum(*(float(found is not None) for found in kept), device=device) if blocks else []
        self.missing = [block for block, is_kept in zip(blocks, are_kept, strict=True) if not is_kept]
        for block, found, is_kept in zip(blocks, kept, are_kept, strict=True):
            if is_kept:
                self._share(block, found)

    def joined(self, batch: TrainBatch) -> TrainBatch:
        """Give a batch of these rows its reference."""
        return batch._replace(reference_B=torch.from_numpy(self._log_probs_R[rows_of(batch.rows)]))

    def compute(self, score: Score) -> Iterator[int]:
        """Compute what is missing with `score`, which gives the log-probabilities of a batch's rows. Yields the number
        of pairs of each block when it is kept.

        Raises TrainingError where one is not finite.
        """
        mesh = self._mesh
        while self.missing:
            block, values = self.missing[0], list[float]()
            for first in range(0, len(block), mesh.data_size):
                mine = first + mesh.data_rank
                batch = collate_pairs(self._rows, block[min(mine, len(block) - 1)])
                found: list[float] = score(batch).tolist()
                for other in range(first, min(first + mesh.data_size, len(block))):
                    is_ours = other == mine and mesh.sequence.rank == 0
                    values += found if is_ours else [0.0] * (2 * len(block[other]))
            log_probs = self._share(block, np.array(values, np.float32))
            if not np.isfinite(log_probs).all():
                raise TrainingError(
                    "the log-probability of an answer is not finite before any training; check the base model and the "
                    "data, or train in float32"
                )
            if mesh.world.rank == 0:
                file = io.BytesIO()
                np.save(file, log_probs, allow_pickle=False)
                self._cache.keep(self._key(block), file.getvalue())
            yield sum(map(len, self.missing.pop(0)))

    def _share(self, block: Block, ours: LogProbs | None) -> LogProbs:
        """Give every rank what the ranks have, each a part of it with zeros elsewhere, or none."""
        rows = np.array(_sequences(block))
        parts = [0.0] * len(rows) if ours is None else ours.tolist()
        log_probs = np.array(self._mesh.world.sum(*parts, device=self._device), np.float32)
        # Of a row that comes twice, the first one is kept: written last.
        new = np.flatnonzero(np.isnan(self._log_probs_R[rows]))[::-1]
        self._log_probs_R[rows[new]] = log_probs[new]
        return log_probs

    def _kept(self, block: Block) -> LogProbs | None:
        with suppress(ValueError, EOFError):
            found: LogProbs = np.load(io.BytesIO(self._cache.note(self._key(block)) or b""), allow_pickle=False)
            return found if found.shape == (len(_sequences(block)),) else None
        return None

    def _key(self, block: Block) -> str:
        return key_of(block, map(self._rows.row, _sequences(block)), self._named)


def _sequences(block: Block) -> list[int]:
    """Rows of tokens in the order of the batches' tensors."""
    return [2 * row + side for batch in block for side in (0, 1) for row in rows_of(batch)]
