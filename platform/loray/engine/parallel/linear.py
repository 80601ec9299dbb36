"""Linear modules spread over the ranks, with LoRA and VeRA following the base's split.

What LoRA adds travels between the ranks only in its r-wide intermediate, in fp32: column-parallel modules gather each
rank's part of it, row-parallel ones sum it. The columns of B are split in both, and for row-parallel modules bringing
them together costs nothing: a rank adds its own columns to its partial sums before the base's all-reduce. With N ranks,
B tokens and rank r, q, k, v and o together send 5(N−1)Br/N elements from each rank, beside the base's 2(N−1)Bh/N.
Source: Sheng et al., *S-LoRA*, MLSys 2024, section 6.

VeRA computes its wide intermediate on every rank for column-parallel modules, since A is there as a whole, and sums it
for row-parallel ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from loray.engine.model.layers import Linear, Linears, Step
from loray.engine.parallel.communicator import Communicator
from loray.engine.pool.resident import ResidentPair
from loray_kernels import LoraTable, Ops, Segments, VeraTable


def parallel_linears(communicator: Communicator) -> Linears:
    return Linears(column=partial(ColumnParallelLinear, communicator), row=partial(RowParallelLinear, communicator))


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

    def _vera_table(self, table: VeraTable, width: int) -> VeraTable:
        """Own rows of B; those of d and b are own ones in the pool."""
        rank = self._communicator.shard.rank
        return replace(table, b_OR=table.b_OR.rows(rank * width, (rank + 1) * width))


class ColumnParallelLinear(_ParallelLinear):
    def _lora_intermediate(
        self, h: tuple[Tensor, ...], tables: tuple[LoraTable, ...], segments: Segments
    ) -> tuple[tuple[Tensor, ...], tuple[LoraTable, ...]]:
        """Each rank has computed its own rows of A. Only what adapters fill of `h` travels, not the padding."""
        plans = [_plan(table, segments, self._communicator.shard.world_size) for table in tables]
        own = torch.cat([h_TR.reshape(-1)[plan.local_E] for h_TR, plan in zip(h, plans, strict=True)])
        gathered_NE = self._communicator.all_gather(own, "adapter")
        whole = []
        parts = torch.split(gathered_NE, [plan.local_E.shape[0] for plan in plans], dim=1)
        for h_TR, part_NE, plan in zip(h, parts, plans, strict=True):
            whole_TR = h_TR.new_zeros(h_TR.shape[0], h_TR.shape[1] * gathered_NE.shape[0])
            whole_TR.view(-1)[plan.whole_NE] = part_NE
            whole.append(whole_TR)
        return tuple(whole), tuple(plan.table for plan in plans)


class RowParallelLinear(_ParallelLinear):
    def __call__(self, x_TI: Tensor, step: Step) -> Tensor:
        """(T, O), the same on every rank."""
        y_TO = step.ops.linear(x_TI, self.weights)
        (module,) = self._modules
        outputs = {module: y_TO[:, self._communicator.shard.slice(y_TO.shape[1])]}
        self._add_lora(x_TI, outputs, step)
        self._add_vera(x_TI, outputs, step)
        self._communicator.all_reduce(y_TO, "base")
        return y_TO

    def _lora_intermediate(
        self, h: tuple[Tensor, ...], tables: tuple[LoraTable, ...], segments: Segments
    ) -> tuple[tuple[Tensor, ...], tuple[LoraTable, ...]]:
        """Each rank has computed a part of the sum over the input."""
        (table,), h_TR = tables, h[0].contiguous()
        filled_E = _plan(table, segments, 1).local_E
        filled = h_TR.view(-1)[filled_E]
        self._communicator.all_reduce(filled, "adapter")
        h_TR.view(-1)[filled_E] = filled
        return (h_TR,), tables

    def _vera_shrink(self, x_TI: Tensor, pair: ResidentPair, step: Step) -> Tensor:
        rank, width = self._communicator.shard.rank, x_TI.shape[1]
        z_TR = step.ops.vera_shrink(x_TI, pair.a_RI.columns(rank * width, (rank + 1) * width))
        self._communicator.all_reduce(z_TR, "adapter")
        return z_TR


class _Plan(NamedTuple):
    """Of one table: where the elements that adapters fill stand in (T, own ranks), and in (T, all ranks) by rank.

    `table` is for expanding: each adapter has as many rows of B as all ranks together have of A.
    """

    local_E: Tensor
    whole_NE: Tensor
    table: LoraTable


def _plan(table: LoraTable, segments: Segments, world_size: int) -> _Plan:
    """Made once a step: every layer passes the same tables."""
    plan: _Plan | None = table.memo.get("parallel")
    if plan is None:
        device = table.a.segments[0][2].device
        ranks = [stop - start for start, stop in pairwise(table.rank_start)]
        width = max(ranks)
        local, whole = [], []
        shares_N11 = torch.arange(world_size).view(-1, 1, 1)
        for start, stop, rank in zip(segments.start, segments.stop, ranks, strict=True):
            tokens_T1, columns_R = torch.arange(start, stop).unsqueeze(1), torch.arange(rank)
            local.append((tokens_T1 * width + columns_R).flatten())
            whole.append((tokens_T1 * width * world_size + shares_N11 * rank + columns_R).flatten(1))
        all_ranks = tuple(start * world_size for start in table.rank_start)
        plan = table.memo["parallel"] = _Plan(
            torch.cat(local).to(device),
            torch.cat(whole, dim=1).to(device),
            LoraTable(table.b, table.b, all_ranks, table.scale),
        )
    return plan
