"""`ShardedDecoder`: one rank's part of the model, with column- and row-parallel linears.

Column-parallel modules have all of their input on every rank. Each rank computes h = A x with all of A, and of B h the
columns that it has of the base's output. Row-parallel modules have a part of their input on each rank. A rank's h is
then a part of a sum, and since B is linear, B h of the ranks' parts adds up to B h of the sum. So each rank adds it to
its part of the base's sum, and one all-reduce adds up both. The same holds for VeRA, whose d and b multiply elements,
and for scales of outputs, by which every rank multiplies its part. vLLM splits LoRA in this way unless it is told
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.bases.weights import WeightSource
from loray.engine.model.decoder import Decoder
from loray.engine.model.layers import ForwardContext, Linear, Linears
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.shard import local_config, local_device, local_tensors, split_inputs
from loray.engine.pool.pool import Pool, ResidentProjection
from loray.spec import ServeSpec
from loray_kernels import CaptureBarrier, Decoding, InputShape, Ops, VeraTable, Weight, backend


def parallel_linears(communicator: Communicator) -> Linears:
    return Linears(
        column=partial(ColumnParallelLinear, communicator),
        row=partial(RowParallelLinear, communicator),
        add_up=communicator.all_reduce,
    )


class _ParallelLinear(Linear):
    def __init__(
        self,
        communicator: Communicator,
        layer: int,
        weights: Mapping[str, Weight],
        biases: Mapping[str, Tensor],
        ops: Ops,
    ) -> None:
        super().__init__(layer, weights, biases, ops)
        self._communicator = communicator


class ColumnParallelLinear(_ParallelLinear):
    def local_vera_table(self, table: VeraTable, width: int) -> VeraTable:
        """Take the rank's rows of B. The rank's pool has only its part of b."""
        rank = self._communicator.shard.rank
        return replace(table, b_OR=table.b_OR.rows(rank * width, (rank + 1) * width))


class RowParallelLinear(_ParallelLinear):
    def __call__(self, x_TI: Tensor, step: ForwardContext) -> Tensor:
        """Compute (T, O), the same on every rank."""
        y_TO = super().__call__(x_TI, step)
        self._communicator.all_reduce(y_TO)
        return y_TO

    def shrink_vera(self, x_TI: Tensor, pair: ResidentProjection, step: ForwardContext) -> Tensor:
        rank, width = self._communicator.shard.rank, x_TI.shape[1]
        return step.ops.vera_shrink(x_TI, pair.a_RI.columns(rank * width, (rank + 1) * width))


class ShardedDecoder(Decoder):
    def __init__(self, spec: ServeSpec, base: BaseModel, communicator: Communicator) -> None:
        shard, device = communicator.shard, local_device(spec, communicator.shard.rank)
        super().__init__(
            local_config(base.config, shard),
            local_tensors(WeightSource(base.path, base.config), base.config, shard),
            backend("auto", device),
            dtype=getattr(torch, spec.dtype),
            device=device,
            linears=parallel_linears(communicator),
        )
        self._communicator, self._vocab_size = communicator, base.config.vocab_size

    @property
    def is_batch_invariant(self) -> bool:
        """An all-reduce of more than two ranks adds them up in an order that depends on the place in the batch."""
        return super().is_batch_invariant and self._communicator.shard.world_size <= 2

    def _decoding(self, pool: Pool, num_slots: int, max_blocks: int) -> Decoding:
        ranks = CaptureBarrier(self._communicator.silent, self._communicator.agree, self._communicator.connect)
        return super()._decoding(pool, num_slots, max_blocks)._replace(ranks=ranks)

    def _inputs(self, pool: Pool) -> tuple[InputShape, ...]:
        return split_inputs(self.config, pool.layout.layer_share, self._communicator.shard)

    def _logits(self, x_RD: Tensor) -> Tensor:
        """Compute all logits on rank 0, and on other ranks those of their part of the vocabulary."""
        logits_RV = super()._logits(x_RD)
        parts_NRV = self._communicator.gather(logits_RV) if logits_RV.shape[0] else None
        if parts_NRV is None:
            return logits_RV
        return torch.cat(tuple(parts_NRV.unbind()), dim=1)[:, : self._vocab_size]
