"""Linear modules that are spread over the ranks. LoRA and VeRA follow the base's split.

Of LoRA only the r-wide intermediate is sent between the ranks, in fp32: column-parallel modules gather each rank's part
of it, row-parallel modules sum it. The columns of B are split in both. For row-parallel modules, joining them costs
nothing: a rank adds its columns to its partial sums before the base's all-reduce. With N ranks, B tokens and rank r,
each rank sends 5(N−1)Br/N elements for q, k, v and o together, beside the base's 2(N−1)Bh/N.
Source: Sheng et al., *S-LoRA*, MLSys 2024, section 6.

Column-parallel modules compute VeRA's wide intermediate on every rank, since every rank has all of A; row-parallel
modules sum it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from loray.engine.model.layers import Linear, Linears, Step
from loray.engine.parallel.communicator import Communicator
from loray.engine.pool.resident import ResidentPair
from loray_kernels import LoraTable, Ops, Segments, VeraTable, alone


def parallel_linears(communicator: Communicator) -> Linears:
    return Linears(
        column=partial(ColumnParallelLinear, communicator, ExchangePlans(communicator.shard.world_size)),
        row=partial(RowParallelLinear, communicator, ExchangePlans(1)),
    )


class _ParallelLinear(Linear):
    def __init__(
        self,
        communicator: Communicator,
        plans: ExchangePlans,
        layer: int,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        ops: Ops,
    ) -> None:
        super().__init__(layer, weights, biases, ops)
        self._communicator, self._plans = communicator, plans

    def local_vera_table(self, table: VeraTable, width: int) -> VeraTable:
        """With the rank's rows of B. The rank's pool has only its part of d and b."""
        rank = self._communicator.shard.rank
        return replace(table, b_OR=table.b_OR.rows(rank * width, (rank + 1) * width))


class ColumnParallelLinear(_ParallelLinear):
    def exchange_h(self, h_TR: Tensor) -> Tensor:
        return self._communicator.all_gather(h_TR, "adapter")

    def exchange_lora(
        self, h: tuple[Tensor, ...], tables: tuple[LoraTable, ...], segments: Segments
    ) -> tuple[tuple[Tensor, ...], tuple[LoraTable, ...]]:
        """Gather h: each rank has computed it for its rows of A."""
        plans = [self._plans.prepare(table, segments) for table in tables]
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
        (module,), own_TO = self.modules, self.own_columns(y_TO)
        if step.batch.records is not None:
            self.add_recorded(x_TI, y_TO, (own_TO,), step.batch.records, step)
        else:
            self.add_lora(x_TI, {module: own_TO}, step)
            self.add_vera(x_TI, {module: own_TO}, step)
            self.scale_dora({module: y_TO}, step)  # the ranks' parts alike, which scales their sum
        self._communicator.all_reduce(y_TO, "base")
        return y_TO

    def own_columns(self, y_TO: Tensor) -> Tensor:
        return y_TO[:, self._communicator.shard.slice(y_TO.shape[1])]

    def exchange_h(self, h_TR: Tensor) -> Tensor:
        self._communicator.all_reduce(h_TR, "adapter")
        return alone(h_TR)

    def exchange_z(self, z_TR: Tensor) -> Tensor:
        self._communicator.all_reduce(z_TR, "adapter")
        return alone(z_TR)

    def exchange_lora(
        self, h: tuple[Tensor, ...], tables: tuple[LoraTable, ...], segments: Segments
    ) -> tuple[tuple[Tensor, ...], tuple[LoraTable, ...]]:
        """Sum h: each rank has computed a part of the sum over the input."""
        (table,), h_TR = tables, h[0].contiguous()
        filled_E = self._plans.prepare(table, segments).local_E
        filled = h_TR.view(-1)[filled_E]
        self._communicator.all_reduce(filled, "adapter")
        h_TR.view(-1)[filled_E] = filled
        return (h_TR,), tables

    def shrink_vera(self, x_TI: Tensor, pair: ResidentPair, step: Step) -> Tensor:
        rank, width = self._communicator.shard.rank, x_TI.shape[1]
        z_TR = step.ops.vera_shrink(x_TI, pair.a_RI.columns(rank * width, (rank + 1) * width))
        self._communicator.all_reduce(z_TR, "adapter")
        return z_TR


class ExchangePlan(NamedTuple):
    """Which elements of one table's h the ranks exchange: the E that adapters fill, without the padding.

    local_E   their positions in a rank's h, (T, the rank's part of the rows) flattened
    whole_NE  for each of N ranks, their positions in the h of all ranks, (T, all rows) flattened
    table     for `lora_expand`: each adapter has as many rows of B as all ranks together have of A
    """

    local_E: Tensor
    whole_NE: Tensor
    table: LoraTable


class ExchangePlans:
    """The plans of the current step: all layers of a step pass the same tables. One for all modules of a model.

    world_size  ranks between which the rows of A are divided
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._segments: Segments | None = None
        self._plans: dict[int, tuple[LoraTable, ExchangePlan]] = {}  # by id of the table, which it keeps alive

    def prepare(self, table: LoraTable, segments: Segments) -> ExchangePlan:
        """The plan for `table`, made when a step passes it for the first time. Other `segments` are another step."""
        if segments is not self._segments:
            self._segments, self._plans = segments, {}
        found = self._plans.get(id(table))
        if found is None:
            found = self._plans[id(table)] = table, _plan(table, segments, self._world_size)
        return found[1]


def _plan(table: LoraTable, segments: Segments, world_size: int) -> ExchangePlan:
    device = table.a.segments[0][2].device
    ranks, width = table.ranks, table.max_rank
    local, whole = [], []
    shares_N11 = torch.arange(world_size).view(-1, 1, 1)
    for start, stop, rank in zip(segments.start, segments.stop, ranks, strict=True):
        tokens_T1, columns_R = torch.arange(start, stop).unsqueeze(1), torch.arange(rank)
        local.append((tokens_T1 * width + columns_R).flatten())
        whole.append((tokens_T1 * width * world_size + shares_N11 * rank + columns_R).flatten(1))
    all_ranks = tuple(start * world_size for start in table.rank_start)
    return ExchangePlan(
        torch.cat(local).to(device),
        torch.cat(whole, dim=1).to(device),
        LoraTable(table.b, table.b, all_ranks, table.scale),
    )
