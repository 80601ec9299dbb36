"""Bytes that a worker sends to others: the halo of S2-Attn, what dense attention exchanges, gradients and gathered
weights.

For comparison, an exchange also has the volumes of dense attention over the same rows with Ulysses (Jacobs et al.,
2023) and ring attention (Liu et al., 2023); `halo` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loray.errors import SpecError
from loray.planning.exchange.halo import HaloPlan, ring_elements, ulysses_elements
from loray.planning.run import Run, halo_plan
from loray.recipes.resolve import quarter


@dataclass(frozen=True, slots=True)
class Exchange:
    """One layer's forward pass over one micro-batch of rows of N = `num_tokens`, for P = `sequence`, G = `group_size`.

    halo_bytes  bytes that the rank sends that sends most; the backward pass sends as many back
    num_hops    distance to the furthest receiver: 1 for the next rank
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
    """Bytes that one worker sends in one optimizer step. `exchange` is None where rows are not split, or attention is
    dense.

    halo_bytes      keys and values in the forward pass and gradients in the backward pass, of all layers and
                    micro-batches
    dense_bytes     what dense attention exchanges over a sequence group, in both passes and in recomputation
    gradient_bytes  reduction of gradients over all workers, and where they are sharded the gather of the updated
                    parameters
    gather_bytes    weights, which are gathered for each use
    """

    exchange: Exchange | None
    halo_bytes: int
    dense_bytes: int
    gradient_bytes: int
    gather_bytes: int


def exchange(run: Run, sequence: int, group_size: int) -> Exchange:
    """The exchange for P = `sequence` and G = `group_size`. Raises SpecError where P does not divide N."""
    plan = halo_plan(run.model, run.padded_length, sequence, group_size)
    model, e = run.model, run.element_bytes * run.num_sequences
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
    """A list for each P = 2, 4, … up to `largest` that divides N, with an exchange for each group size."""
    rows = []
    for power in range(1, largest.bit_length()):
        try:
            rows.append([exchange(run, 1 << power, group_size) for group_size in group_sizes])
        except SpecError:
            break
    return rows


def group_sizes(run: Run) -> list[int]:
    """The G of the run, a quarter of the row, and at most 8192; without repetition."""
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
    gather_bytes = int((2 + run.has_reference) * share * weights * run.accumulation)
    return Traffic(mine, halo_bytes, _dense_bytes(run), int(gradient_bytes), gather_bytes)


def _dense_bytes(run: Run) -> int:
    """Of the rank that sends most."""
    if (plan := run.shared_dense) is None:
        return 0
    head_dim, forward_passes = run.model.head_dim, 1 + run.checkpointing
    most = max(
        forward_passes * plan.forward_elements(rank, head_dim) + plan.backward_elements(rank, head_dim)
        for rank in range(plan.num_ranks)
    )
    return most * run.element_bytes * run.num_sequences * run.model.num_layers * run.accumulation


def _both_ways(run: Run) -> int:
    """Bytes of one layer and micro-batch in both passes, of the rank that sends most. Recomputation uses kept halos."""
    plan, head_dim = run.halo, run.model.head_dim
    assert plan is not None, "there is a halo"
    most = max(plan.elements_sent(r, head_dim) + plan.elements_received(r, head_dim) for r in range(plan.num_ranks))
    return most * run.element_bytes * run.num_sequences


def _most_sent(plan: HaloPlan, head_dim: int) -> int:
    return max(plan.elements_sent(rank, head_dim) for rank in range(plan.num_ranks))
