"""The smallest change to a recipe that makes it fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from loray.planning.devices import Device
from loray.planning.host import plan_host
from loray.planning.measuring import measuring_bytes
from loray.planning.memory import plan_memory
from loray.planning.run import Run
from loray.spec import StrategyName

_MAX_WORKERS = 1024
# In the order of how much they shard. fsdp2 comes before zero3: it needs no further package.
_STRATEGIES: tuple[StrategyName, ...] = ("ddp", "zero2", "fsdp2", "zero3")


class Remedy(NamedTuple):
    """`changes` are fields of the recipe with their new values, as YAML. `host_bytes` are a node's, beside its GPUs."""

    changes: tuple[str, ...]
    peak_bytes: int
    host_bytes: int | None


def smallest_remedy(run: Run, device: Device) -> Remedy | None:
    """The fewest changes with which the run fits; of equally many, in this order: checkpointing, smaller micro-batches,
    strategy, sequence parallelism. More workers only where these are not enough. None where nothing helps.
    """
    num_workers = run.num_workers
    while num_workers <= _MAX_WORKERS:
        for candidate in sorted(_variants(replace(run, num_workers=num_workers)), key=lambda c: len(_changes(run, c))):
            peak, host = most_bytes(candidate, device), plan_host(candidate, device)
            if peak <= device.usable_bytes and (host is None or host.fits):
                return Remedy(_changes(run, candidate), peak, None if host is None else host.peak_bytes)
        if device.is_host:  # more workers would share the same memory
            return None
        num_workers *= 2
    return None


def most_bytes(run: Run, device: Device) -> int:
    """The most that a worker takes of its device, in a step or while it measures."""
    return max(plan_memory(run, device).peak_bytes, measuring_bytes(run, device))


def _variants(run: Run) -> Iterator[Run]:
    strategies = _STRATEGIES[_STRATEGIES.index(run.strategy) :] if run.num_workers > 1 else (run.strategy,)
    sequences = [run.sequence]
    while not run.has_reference and run.num_workers % (2 * sequences[-1]) == 0 and 2 * sequences[-1] <= run.row_length:
        sequences.append(2 * sequences[-1])
    for sequence, strategy, num_rows, checkpointing in itertools.product(
        sequences, strategies, sorted({run.num_rows, 1}, reverse=True), sorted({run.checkpointing, True})
    ):
        yield replace(
            run,
            sequence=sequence,
            strategy=strategy,
            num_rows=num_rows,
            accumulation=run.accumulation * run.num_rows // num_rows,
            checkpointing=checkpointing,
        )


def _changes(before: Run, after: Run) -> tuple[str, ...]:
    changes = []
    if after.checkpointing != before.checkpointing:
        changes.append("gradient_checkpointing: true")
    if after.num_rows != before.num_rows:
        changes.append(f"batch: {{rows: {after.num_rows}, accumulation: {after.accumulation}}}")
    if after.strategy != before.strategy:
        changes.append(f"parallel.strategy: {after.strategy}")
    if after.sequence != before.sequence:
        changes.append(f"parallel.sequence: {after.sequence}")
    if after.num_workers != before.num_workers:
        changes.append(f"num_workers: {after.num_workers}")
    return tuple(changes)
