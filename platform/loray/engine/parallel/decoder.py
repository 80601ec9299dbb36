"""One rank's part of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from loray.bases.checkpoint import read_tensors
from loray.bases.registry import BaseModel
from loray.engine.model.batch import Batch
from loray.engine.model.decoder import Decoder
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.linear import parallel_linears
from loray.engine.parallel.pool import FollowingPool
from loray.engine.parallel.rows import split_inputs
from loray.engine.parallel.shard import local_config, local_device, local_tensors
from loray.engine.parallel.wire import PassedChunk
from loray.engine.pool.pool import Pool
from loray.engine.pool.resident import ResidentAdapter
from loray.engine.scheduling.plan import Chunk
from loray.spec import ServeSpec
from loray_kernels import Decoding, InputShape, Ranks, backend


class ShardedDecoder(Decoder):
    def __init__(self, spec: ServeSpec, base: BaseModel, communicator: Communicator) -> None:
        shard, device = communicator.shard, local_device(spec, communicator.shard.rank)
        super().__init__(
            local_config(base.config, shard),
            local_tensors(read_tensors(base.path), base.config, shard),
            backend("auto", device),
            dtype=getattr(torch, spec.dtype),
            device=device,
            linears=parallel_linears(communicator),
        )
        self._communicator, self._vocab_size = communicator, base.config.vocab_size

    def passed(self, chunks: Sequence[PassedChunk], pool: FollowingPool) -> Batch:
        """The batch of another rank's chunks."""

        def resident(chunk: Chunk) -> ResidentAdapter | None:
            digest = cast("PassedChunk", chunk).adapter
            return None if digest is None else pool.adapters[digest]

        return self._eager(cast("Sequence[Chunk]", chunks), resident, pool)

    def _decoding(self, pool: Pool, num_seats: int, max_blocks: int) -> Decoding:
        ranks = Ranks(self._communicator.silent, self._communicator.agree, self._communicator.connect)
        return super()._decoding(pool, num_seats, max_blocks)._replace(ranks=ranks)

    def _inputs(self, pool: Pool) -> tuple[InputShape, ...]:
        return split_inputs(self.config, pool.layout.layer_share, self._communicator.shard)

    def _logits(self, x_RD: Tensor) -> Tensor:
        """On rank 0 as Decoder; on other ranks the logits of their part of the vocabulary."""
        logits_RV = super()._logits(x_RD)
        parts_NRV = self._communicator.gather(logits_RV) if logits_RV.shape[0] else None
        if parts_NRV is None:
            return logits_RV
        return torch.cat(tuple(parts_NRV.unbind()), dim=1)[:, : self._vocab_size]
