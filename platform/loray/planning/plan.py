"""`Plan`: what a run takes of a device, its problems, and the smallest change with which it fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from loray.planning.compute import (
    ExchangeVolume,
    Flops,
    StepEstimate,
    TrafficPlan,
    count_flops,
    estimate_time,
    exchanges,
    group_sizes,
    plan_traffic,
)
from loray.planning.devices import Device
from loray.planning.memory import (
    HostPlan,
    MemoryPlan,
    measuring_bytes,
    plan_host,
    plan_memory,
)
from loray.planning.run import RunShape
from loray.recipes.defaults import LARGE_BASE
from loray.recipes.resolve import quarter
from loray.spec import StrategyName


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """A reason against a run. With a refusal it cannot work; with a warning it works, at a cost."""

    severity: Literal["refusal", "warning"]
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`host` is the memory of a node beside its GPUs; None where there are none. `measuring` are the bytes of a worker
    that measures before publishing, 0 where nothing is measured.
    """

    run: RunShape
    device: Device
    memory: MemoryPlan
    measuring: int
    host: HostPlan | None
    traffic: TrafficPlan
    flops: Flops
    time: StepEstimate
    problems: tuple[PlanProblem, ...]

    @property
    def is_refused(self) -> bool:
        return any(problem.severity == "refusal" for problem in self.problems)

    @property
    def exchanges(self) -> list[list[ExchangeVolume]]:
        """Halo exchanges for other P and G; empty where attention is dense."""
        return exchanges(self.run, group_sizes(self.run)) if self.run.group_size else []

    def to_dict(self) -> dict[str, Any]:
        """Make a dictionary for JSON, in bytes, seconds, FLOPs and tokens."""
        run = self.run
        return {
            "model": run.model.to_json(),
            "parameters": {"base": run.base.total, "trained": run.trained.total} | asdict(run.trained),
            "run": {
                name: getattr(run, name)
                for name in (
                    "dtype",
                    "row_length",
                    "padded_length",
                    "num_rows",
                    "row_size",
                    "accumulation",
                    "group_size",
                    "context",
                    "checkpointing",
                    "num_workers",
                    "sequence",
                    "num_data_groups",
                    "strategy",
                    "tokens_per_worker",
                    "tokens_per_step",
                )
            },
            "device": self.device.model_dump() | {"usable_bytes": self.device.usable_bytes},
            "memory": self.memory.to_dict() | {"measuring_bytes": self.measuring},
            "host": None if self.host is None else self.host.to_dict(),
            "traffic": asdict(self.traffic),
            "dense_exchange": "ulysses" if run.shared_dense else None,
            "exchanges": [[asdict(exchange) for exchange in row] for row in self.exchanges],
            "flops": asdict(self.flops) | {"total": self.flops.total},
            "time": asdict(self.time) | {"step_s": self.time.step_s},
            "problems": [asdict(problem) for problem in self.problems],
            "is_refused": self.is_refused,
        }


def make_plan(run: RunShape, device: Device) -> Plan:
    """Plan a run, cut to fit where the recipe says so. Raises SpecError where rows cannot be split over the sequence
    groups.
    """
    run = cut_to_fit(run, device)
    memory, host, traffic = plan_memory(run, device), plan_host(run, device), plan_traffic(run)
    measuring = measuring_bytes(run, device)
    problems = (
        *_memory_problems(run, device, memory, measuring, host),
        *(PlanProblem("warning", *warning) for warning in _warnings(run, device, traffic)),
    )
    return Plan(
        run, device, memory, measuring, host, traffic, count_flops(run), estimate_time(run, device, traffic), problems
    )


def cut_to_fit(run: RunShape, device: Device) -> RunShape:
    """Cut the rows of a step into the fewest equal micro-batches that fit the device, where the recipe leaves that to
    the plan; into single rows where none fit.
    """
    if not run.is_cut_to_fit:
        return run
    for num_rows in range(run.num_rows, 0, -1):
        if run.num_rows % num_rows:
            continue
        cut = replace(run, num_rows=num_rows, accumulation=run.num_rows // num_rows, is_cut_to_fit=False)
        host = plan_host(cut, device)
        if most_bytes(cut, device) <= device.usable_bytes and (host is None or host.fits):
            break
    return cut


def advice_for_less(run: RunShape, device: Device) -> str:
    """Say the smallest change with which a run takes less memory than the plan says, or than the device has where that
    is less: for a run that did not fit.
    """
    least = min(device.usable_bytes, most_bytes(run, device) - 1)
    return _advice(smallest_fix(run, device.model_copy(update={"memory_bytes": least, "usable_share": 1.0})))


def _memory_problems(
    run: RunShape, device: Device, memory: MemoryPlan, measuring: int, host: HostPlan | None
) -> Iterator[PlanProblem]:
    if memory.peak_bytes > device.usable_bytes:
        yield PlanProblem(
            "refusal",
            f"needs {_gb(memory.peak_bytes)} a worker where {device.name} has {_gb(device.usable_bytes)} to use; "
            f"most of it is {memory.dominant.name} ({_gb(memory.dominant.nbytes)})",
            _advice(smallest_fix(run, device)),
        )
    elif measuring > device.usable_bytes:
        yield PlanProblem(
            "refusal",
            f"needs {_gb(measuring)} a worker to measure base and adapter before publishing (`evaluation`), where "
            f"{device.name} has {_gb(device.usable_bytes)} to use",
            f"{_advice(smallest_fix(run, device))}, or leave out what is measured",
        )
    elif host is not None and not host.fits:
        fix = smallest_fix(run, device)
        advice = "nothing in the recipe makes it fit: take nodes with more memory, or fewer workers on each"
        if fix is not None and fix.host_bytes is not None:
            advice = f"{' and '.join(fix.changes)} would take {_gb(fix.host_bytes)} of a node's memory"
        yield PlanProblem(
            "refusal",
            f"needs {_gb(host.peak_bytes)} of a node's own memory while {host.peak_moment}, where a node of "
            f"{host.num_workers} workers on {device.name} has {_gb(host.usable_bytes or 0)} to use; most of it is "
            f"{host.dominant.name} ({_gb(host.dominant.nbytes)})",
            advice,
        )


def _advice(fix: Fix | None) -> str:
    if fix is None:
        return "nothing in the recipe makes it fit: shorten data.max_length, or take a larger device"
    return f"{' and '.join(fix.changes)} would take {_gb(fix.peak_bytes)}"


def _warnings(run: RunShape, device: Device, traffic: TrafficPlan) -> Iterator[tuple[str, str]]:
    """Yield what costs time or quality, and what to change."""
    share = device.product_shares.get(run.dtype, 1.0)
    if device.is_host and run.dtype == "bfloat16" and device.training_dtype != "bfloat16":
        measured = f"which reach {share:.0%} of float32's here" if share < 1 else "so they are several times slower"
        yield f"this CPU has no bfloat16 products, {measured}", "dtype: float32, or leave it out"
    if device.is_host and run.base.total >= LARGE_BASE:
        yield (
            f"a base of {run.base.total / 1e9:.1f} billion parameters is trained on the CPU",
            "use_gpu: true, on a machine or a cluster with a GPU for each worker",
        )
    group, exchange = run.group_size, traffic.exchange
    if group is not None and group < run.usual_group:
        yield (
            f"group_size {group} is less than {run.usual_group}, a quarter of the context, which the paper finds to "
            "raise the loss",
            f"group_size: {run.usual_group}, or leave it out",
        )
    if group is not None and group >= run.row_length:
        yield (
            f"rows of {run.row_length} tokens lie inside one group of {group}: half of the heads attend densely",
            f"group_size: {quarter(run.row_length)}, or longer rows",
        )
    if run.padded_length != run.row_length:
        yield (
            f"rows of {run.row_length} tokens do not divide by {run.sequence} workers and are padded to "
            f"{run.padded_length}",
            f"data.max_length: {run.row_length // run.sequence * run.sequence}",
        )
    if exchange is not None and group is not None and exchange.num_hops > 1:
        yield (
            f"a rank holds {run.padded_length // run.sequence} tokens, less than half of a group of {group}: its halo "
            f"comes from up to {exchange.num_hops} ranks",
            f"parallel.sequence: {max(1, 2 * run.padded_length // group)}, where it comes from one, or a smaller group",
        )
    if run.strategy != "ddp" and run.num_workers == 1:
        yield f"{run.strategy} has one worker to shard over", "parallel.strategy: ddp, or more workers"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"


# -- what makes a run fit ---------------------------------------------------------------------------------------------

_MAX_WORKERS = 1024
# In the order of how much they shard. fsdp2 comes before zero3: it needs no further package.
_STRATEGIES: tuple[StrategyName, ...] = ("ddp", "zero2", "fsdp2", "zero3")


class Fix(NamedTuple):
    """`changes` are fields of the recipe with their new values, as YAML. `host_bytes` are a node's, beside its GPUs."""

    changes: tuple[str, ...]
    peak_bytes: int
    host_bytes: int | None


def smallest_fix(run: RunShape, device: Device) -> Fix | None:
    """Find the fewest changes with which the run fits; of equally many, in this order: checkpointing, smaller
    micro-batches, strategy, sequence parallelism. There are more workers only where these are not enough. None where
    nothing helps.
    """
    num_workers = run.num_workers
    while num_workers <= _MAX_WORKERS:
        for candidate in sorted(_variants(replace(run, num_workers=num_workers)), key=lambda c: len(_changes(run, c))):
            peak, host = most_bytes(candidate, device), plan_host(candidate, device)
            if peak <= device.usable_bytes and (host is None or host.fits):
                return Fix(_changes(run, candidate), peak, None if host is None else host.peak_bytes)
        if device.is_host:  # more workers would share the same memory
            return None
        num_workers *= 2
    return None


def most_bytes(run: RunShape, device: Device) -> int:
    """Compute the most that a worker takes of its device, in a step or while it measures."""
    return max(plan_memory(run, device).peak_bytes, measuring_bytes(run, device))


def _variants(run: RunShape) -> Iterator[RunShape]:
    strategies = _STRATEGIES[_STRATEGIES.index(run.strategy) :] if run.num_workers > 1 else (run.strategy,)
    sequences = [run.sequence]
    while run.num_workers % (2 * sequences[-1]) == 0 and 2 * sequences[-1] <= run.row_length:
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


def _changes(before: RunShape, after: RunShape) -> tuple[str, ...]:
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
