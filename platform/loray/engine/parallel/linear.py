"""Linear modules that are spread over the ranks, with LoRA, VeRA and DoRA. Adapters bring no collectives of their own.

Column-parallel modules have all of their input on every rank. Each rank computes h = A x with all of A, and of B h the
columns that it has of the base's output. Row-parallel modules have a part of their input on each rank. A rank's h is
then a part of a sum, and since B is linear, B h of the ranks' parts adds up to B h of the sum. So each rank adds it to
its part of the base's sum, and one all-reduce adds up both. The same holds for VeRA, whose d and b multiply elements,
and for DoRA, which scales the ranks' parts alike. vLLM splits LoRA in this way unless it is told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from loray.engine.model.layers import Linear, Linears, Step
from loray.engine.parallel.communicator import Communicator
from loray.engine.pool.resident import ResidentPair
from loray_kernels import Ops, VeraTable


def parallel_linears(communicator: Communicator) -> Linears:
    return Linears(
        column=partial(ColumnParallelLinear, communicator),
        row=partial(RowParallelLinear, communicator),
    )


class _ParallelLinear(Linear):
    def __init__(
        self,
        communicator: Communicator,
        layer: int,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        ops: Ops,
    ) -> None:
        super().__init__(layer, weights, biases, ops)
        self._communicator = communicator


class ColumnParallelLinear(_ParallelLinear):
    def local_vera_table(self, table: VeraTable, width: int) -> VeraTable:
        """With the rank's rows of B. The rank's pool has only its part of b."""
        rank = self._communicator.shard.rank
        return replace(table, b_OR=table.b_OR.rows(rank * width, (rank + 1) * width))


class RowParallelLinear(_ParallelLinear):
    def __call__(self, x_TI: Tensor, step: Step) -> Tensor:
        """(T, O), the same on every rank."""
        y_TO = super().__call__(x_TI, step)
        self._communicator.all_reduce(y_TO)
        return y_TO

    def shrink_vera(self, x_TI: Tensor, pair: ResidentPair, step: Step) -> Tensor:
        rank, width = self._communicator.shard.rank, x_TI.shape[1]
        return step.ops.vera_shrink(x_TI, pair.a_RI.columns(rank * width, (rank + 1) * width))
