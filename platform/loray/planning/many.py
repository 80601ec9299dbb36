"""Memory and time of many adapters that are trained in one process, and how workers share them.

A pass has rows of several adapters, and the base's activations are those of its tokens, whose they may be. An adapter
adds 18 bytes for each of its P elements in bf16: 2 that passes read, and in fp32 4 of the master, 4 of the gradient and
8 of AdamW's moments; 16 in fp32, where a master is what passes read.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from loray.errors import SpecError
from loray.methods import method_of
from loray.methods.base import SavedTensors, input_of, shapes
from loray.planning.compute import estimate_time, plan_traffic
from loray.planning.devices import Device
from loray.planning.memory import Item, MemoryPlan, passing_items, with_overheads
from loray.planning.run import RunShape
from loray.spec import DTYPE_BYTES, AdapterSpec

TOKENS_PER_PASS_ON_CPU = 4096  # more tokens at once do not make products faster there
_FP32 = DTYPE_BYTES["float32"]
_PADDED = 1.25  # at most, as a multiple of the tokens that passes join
_PRODUCT_S = 6e-6  # that a small product takes on a CPU beside its arithmetic
_ADAPTERS = "adapters: weights, masters, gradients, moments"
_BEST = "the best weights so far"


class Load(NamedTuple):
    """The work of one adapter: its run alone, the steps that it has, and the tokens of one, without padding."""

    shape: RunShape
    num_steps: int
    tokens_per_step: float


@dataclass(frozen=True, slots=True)
class ManyPlan:
    """What adapters take of workers that share them.

    shares           names of the adapters of each worker, or of each sequence group
    tokens_per_pass  of all adapters of a worker, padding included
    seconds          of a step of each adapter, by name
    memory           of the worker that has most
    """

    device: Device
    shares: tuple[tuple[str, ...], ...]
    tokens_per_pass: int
    memory: MemoryPlan
    seconds: Mapping[str, float]
    total_s: float

    @property
    def round_s(self) -> float:
        """Seconds of a step of all adapters."""
        return max(sum(self.seconds[name] for name in share) for share in self.shares)

    def memory_line(self) -> str:
        parts = ", ".join(f"{name} {_gb(nbytes)}" for name, nbytes in _parts(self.memory))
        return (
            f"{self.memory.peak_bytes / 1e9:.1f} of {_gb(self.device.usable_bytes)} a worker: {parts}; passes of up to "
            f"{self.tokens_per_pass:,} tokens"
        )

    def time_line(self) -> str:
        """Say how long it takes, where the device's rates are known."""
        return f"a step of all adapters {self.round_s:.3g} s, all steps {self.total_s / 60:.3g} min"


def plan_many(loads: Mapping[str, Load], device: Device, num_workers: int = 1) -> ManyPlan:
    """Plan a cohort on workers (sequence groups) that each hold the base and share the adapters.

    Raises SpecError where a worker's share does not fit, which says how many of its adapters do.
    """
    seconds = {name: _step_seconds(load, device) for name, load in loads.items()}
    wholes = {name: seconds[name] * load.num_steps for name, load in loads.items()}
    shares = deal(wholes, num_workers)
    plans = [_fit([loads[name] for name in share], device) for share in shares if share]
    return ManyPlan(
        device=device,
        shares=tuple(map(tuple, shares)),
        tokens_per_pass=min(tokens for tokens, _ in plans),
        memory=max((memory for _, memory in plans), key=lambda memory: memory.peak_bytes),
        seconds=seconds,
        total_s=max(sum(wholes[name] for name in share) for share in shares),
    )


def deal(seconds: Mapping[str, float], num_workers: int) -> list[list[str]]:
    """Deal adapters to workers, the longest first, each to the one that has least to do; their order stays."""
    loads = [(0.0, worker) for worker in range(num_workers)]
    of: dict[str, int] = {}
    for name in sorted(seconds, key=lambda name: -seconds[name]):
        load, worker = heapq.heappop(loads)
        of[name] = worker
        heapq.heappush(loads, (load + seconds[name], worker))
    return [[name for name in seconds if of[name] == worker] for worker in range(num_workers)]


# -- memory -----------------------------------------------------------------------------------------------------------


def _fit(loads: list[Load], device: Device) -> tuple[int, MemoryPlan]:
    """Find the most tokens a pass with which adapters fit, down to those of the largest micro-batch."""
    least = max(load.shape.num_sequences * load.shape.padded_length for load in loads)
    of_round = math.ceil(_PADDED * sum(load.tokens_per_step for load in loads))
    tokens = max(least, min(of_round, TOKENS_PER_PASS_ON_CPU) if device.is_host else of_round)
    while (memory := _memory(loads, tokens, device)).peak_bytes > device.usable_bytes and tokens > least:
        tokens = max(least, tokens // 2)
    if memory.peak_bytes <= device.usable_bytes:
        return tokens, memory
    fitting, too_many = 0, len(loads)
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fits = _memory(loads[:middle], least, device).peak_bytes <= device.usable_bytes
        fitting, too_many = (middle, too_many) if fits else (fitting, middle)
    parts = ", ".join(f"{name} {_gb(nbytes)}" for name, nbytes in _parts(memory))
    advice = f"the first {fitting} fit: train the others in another job, or on more workers (num_workers)"
    if not fitting:
        advice = "none fits: make micro-batches smaller (batch, data.max_length), or quantize the base"
    raise SpecError(
        f"{len(loads)} adapters need {_gb(memory.peak_bytes)} a worker where {device.name} has "
        f"{_gb(device.usable_bytes)} to use ({parts}); {advice}"
    )


def _memory(loads: list[Load], tokens: int, device: Device) -> MemoryPlan:
    widest = max((load.shape for load in loads), key=lambda shape: shape.padded_length)
    shape = replace(
        widest,
        num_rows=-(-tokens // widest.padded_length),
        row_size=1,
        accumulation=1,
        num_workers=widest.sequence,
        checkpointing=any(load.shape.checkpointing for load in loads),
    )
    saved = max((_saved(load.shape) for load in loads), key=lambda part: part.nbytes)
    return with_overheads([*_resident(loads, device), *passing_items(shape, device, saved)], device)


def _resident(loads: list[Load], device: Device) -> Iterator[Item]:
    """Yield the base, and what adapters have from their first step to their last. VeRA's pair is one of those with the
    same key, rank and widths. Stacks have room for a power of two of adapters with equal shapes.
    """
    shape = loads[0].shape
    model, e = shape.model, shape.element_bytes
    yield Item("base", shape.base_bytes)
    pairs = {(load.shape.adapter.target_modules, *_pair_key(load.shape.adapter)): load for load in loads}
    pair = sum(method_of(x.shape.adapter).pair_elements(x.shape.adapter, model) for x in pairs.values())
    yield Item("VeRA's pairs", pair * (_FP32 if e == _FP32 else _FP32 + e))
    elements = [load.shape.trained.adapter for load in loads]
    each = 4 * _FP32 + (0 if e == _FP32 else e)
    yield Item(_ADAPTERS, each * sum(elements))
    if device.is_host:
        yield Item(_BEST, _FP32 * sum(elements))


def _pair_key(adapter: AdapterSpec) -> tuple[object, ...]:
    return (adapter.method, getattr(adapter, "projection_prng_key", None), getattr(adapter, "rank", None))


def _saved(shape: RunShape) -> SavedTensors:
    method, e = method_of(shape.adapter), shape.element_bytes
    return method.saved_together(shape.adapter, shape.model, element_bytes=e, is_shared=shape.sequence > 1)


def _parts(memory: MemoryPlan) -> Iterator[tuple[str, int]]:
    """Yield the base, the adapters with their best weights, and all else at the peak."""
    found = {item.name: item.nbytes for item in memory.items}
    parts = {"base": found["base"], "adapters": found[_ADAPTERS] + found.get(_BEST, 0)}
    yield from parts.items()
    yield "passes and libraries", memory.peak_bytes - sum(parts.values())


# -- time -------------------------------------------------------------------------------------------------------------


def _step_seconds(load: Load, device: Device) -> float:
    """Estimate what a step of one adapter takes beside others: what its tokens take of passes that are full, the
    small products with matrices of its own (forward one for modules with the same input and one for each module, and
    twice as many backward), and its update.
    """
    shape = load.shape
    alone = replace(
        shape, num_workers=shape.sequence, accumulation=shape.accumulation * shape.num_data_groups, strategy="ddp"
    )
    estimate = estimate_time(alone, device, plan_traffic(alone))
    share = min(1.0, load.tokens_per_step / alone.tokens_per_step)
    small = 0.0
    if device.is_host and not method_of(shape.adapter).pair_elements(shape.adapter, shape.model):
        modules = shapes(shape.adapter, shape.model)
        products = 3 * (len(modules) + len({input_of(module) for module in modules})) * shape.model.num_layers
        small = _PRODUCT_S * products * alone.accumulation
    return (estimate.step_s - estimate.optimizer_s) * share + estimate.optimizer_s + small


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
