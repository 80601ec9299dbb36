"""What workers send each other: the halo of S2-Attn beside what dense attention would take, gradients, gathers.

Bytes that one worker sends. Volumes of Ulysses (Jacobs et al., 2023) and ring attention (Liu et al., 2023) are those of
dense attention over the same rows; `halo` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loray.errors import SpecError
from loray.planning.halo import HaloPlan, ring_elements, ulysses_elements
from loray.planning.run import Run, halo_plan
from loray.recipes.resolve import quarter


@dataclass(frozen=True, slots=True)
class Exchange:
    """One layer's forward pass over one micro-batch of rows of N = `num_tokens`, for P = `sequence`, G = `group_size`.

    halo_bytes  what the rank that sends most sends; the backward pass returns as much
    num_hops    how far it goes: 1 is the next rank alone
    """

    num_tokens: int
    sequence: int
    group_size: int
    num_hops: int
    halo_bytes: int
    ulysses_bytes: int
    ring_bytes: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one worker in one optimizer step. `exchange` is None where rows are not split.

    halo_bytes      all layers and micro-batches: keys and values forward, gradients of those received backward
    gradient_bytes  their sum over all workers, and where they are sharded the updated parameters on their way back
    gather_bytes    weights that are gathered for each use
    """

    exchange: Exchange | None
    halo_bytes: int
    gradient_bytes: int
    gather_bytes: int


def exchange(run: Run, sequence: int, group_size: int) -> Exchange:
    """Raises SpecError where rows of N tokens do not divide by P = `sequence`."""
    plan = halo_plan(run.model, run.padded_length, sequence, group_size)
    model, e = run.model, run.element_bytes * run.num_rows
    shape = (plan.num_tokens, sequence)
    return Exchange(
        num_tokens=plan.num_tokens,
        sequence=sequence,
        group_size=group_size,
        num_hops=plan.num_hops,
        halo_bytes=_most_sent(plan, model.head_dim) * e,
        ulysses_bytes=ulysses_elements(*shape, model.num_heads, model.num_kv_heads, model.head_dim) * e,
        ring_bytes=ring_elements(*shape, model.num_kv_heads, model.head_dim) * e,
    )


def exchanges(run: Run, group_sizes: Sequence[int], largest: int = 32) -> list[list[Exchange]]:
    """A row for each P = 2, 4, … up to `largest` that divides N, with an exchange for each group size."""
    rows = []
    for power in range(1, largest.bit_length()):
        try:
            rows.append([exchange(run, 1 << power, group_size) for group_size in group_sizes])
        except SpecError:
            break
    return rows


def group_sizes(run: Run) -> list[int]:
    """G as the recipe has it, a quarter of the row, and one that does not grow with it; without repetition."""
    fixed = min(8192, quarter(run.row_length))
    return list(dict.fromkeys([run.group_size or fixed, quarter(run.row_length), fixed]))


def plan_traffic(run: Run) -> Traffic:
    trained, e = run.trained.total, run.element_bytes
    share = (run.num_workers - 1) / run.num_workers
    mine = exchange(run, run.sequence, run.group_size) if run.sequence > 1 and run.group_size else None
    halo_bytes = _both_ways(run) * run.model.num_layers * run.accumulation if mine else 0
    weights = e * (run.base.total + trained) if run.weight_shards > 1 else 0
    match run.strategy:
        case "ddp":
            gradient_bytes = 2 * share * 4 * trained
        case "zero2":
            gradient_bytes = share * (4 + e) * trained
        case _:
            gradient_bytes = share * 4 * trained
    return Traffic(mine, halo_bytes, int(gradient_bytes), int(2 * share * weights * run.accumulation))


def _both_ways(run: Run) -> int:
    """Of the rank that sends most, one layer and micro-batch. Recomputation finds the halos in memory."""
    plan, head_dim = run.halo, run.model.head_dim
    assert plan is not None, "there is a halo"
    most = max(plan.elements_sent(r, head_dim) + plan.elements_received(r, head_dim) for r in range(plan.num_ranks))
    return most * run.element_bytes * run.num_rows


def _most_sent(plan: HaloPlan, head_dim: int) -> int:
    return max(plan.elements_sent(rank, head_dim) for rank in range(plan.num_ranks))
