"""Memory of a node beside its GPUs: what its workers and the driver hold there while a run starts, trains and is
published.

Where workers have no GPUs, a worker's own memory is the host's, and this adds nothing. Files that are mapped (the base,
tokens, the optimizer's state of a checkpoint) are not counted: the system drops their pages when it needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from loray.planning.devices import Device
from loray.planning.measuring import num_shards
from loray.planning.memory import CHECKPOINT
from loray.planning.run import Run
from loray.spec import LINEAR_MODULES

HostMoment = Literal["loading", "training", "publishing"]
HOST_MOMENTS: tuple[HostMoment, ...] = ("loading", "training", "publishing")

_TOKENISED_BYTES = 64 * (8 << 20)  # parts of data files that the driver has given to tasks
_BATCH_BYTES = 4 * 8  # of a token: id, label, position and mask, as 64-bit integers


@dataclass(frozen=True, slots=True)
class HostItem:
    name: str
    nbytes: int
    moments: tuple[HostMoment, ...] = HOST_MOMENTS


@dataclass(frozen=True, slots=True)
class HostPlan:
    """`usable_bytes` is None where nothing is known of the node's memory."""

    items: tuple[HostItem, ...]
    num_workers: int
    usable_bytes: int | None

    def at(self, moment: HostMoment) -> int:
        return sum(item.nbytes for item in self.items if moment in item.moments)

    @property
    def peak_moment(self) -> HostMoment:
        return max(HOST_MOMENTS, key=self.at)

    @property
    def peak_bytes(self) -> int:
        return self.at(self.peak_moment)

    @property
    def dominant(self) -> HostItem:
        """The largest item at the peak."""
        return max((i for i in self.items if self.peak_moment in i.moments), key=lambda item: item.nbytes)

    @property
    def fits(self) -> bool:
        return self.usable_bytes is None or self.peak_bytes <= self.usable_bytes


def plan_host(run: Run, device: Device) -> HostPlan | None:
    """Of the node with the driver and rank 0, which holds most. None where workers compute in the host's memory."""
    if device.is_host:
        return None
    num_workers = min(run.num_workers, device.workers_per_node)
    items = (*_processes(num_workers, device), *_base(run, num_workers), *_data(run, num_workers), *_state(run))
    usable = None if device.host_memory_bytes is None else int(device.host_memory_bytes * device.usable_share)
    return HostPlan(tuple(item for item in items if item.nbytes), num_workers, usable)


def _processes(num_workers: int, device: Device) -> Iterator[HostItem]:
    yield HostItem("processes of workers and driver", (num_workers + 1) * device.process_bytes)


def _base(run: Run, num_workers: int) -> Iterator[HostItem]:
    """Strategies that shard the base read it tensor by tensor, and so does one that is quantised; the others build it
    whole. What is whole then moves to the device.
    """
    e, model = run.element_bytes, run.model
    shapes = [(model.vocab_size, model.hidden_size), *(model.module_shape(module) for module in LINEAR_MODULES)]
    largest = max(out * width for out, width in shapes)
    if run.weight_shards > 1 or run.quantization is not None:
        yield HostItem("a tensor of the base, as each worker reads it", num_workers * e * largest, ("loading",))
    if run.weight_shards == 1:
        yield HostItem("the base, as each worker reads it", num_workers * run.base_bytes, ("loading",))
    rows = 0 if model.tie_word_embeddings else run.trained.embedding
    trained = e * (run.trained.total + rows)
    yield HostItem("trained parameters, before they move", num_workers * trained, ("loading",))
    if run.measured_length is None:
        return
    if num_shards(run) > 1:
        yield HostItem("a tensor of the base, to be measured", num_workers * e * largest, ("publishing",))
    else:
        yield HostItem("the base, to be measured", num_workers * e * run.base.total, ("publishing",))


def _data(run: Run, num_workers: int) -> Iterator[HostItem]:
    """The tokens of training data are mapped files."""
    yield HostItem("parts of the data, while they are tokenised", _TOKENISED_BYTES, ("loading",))
    tokens = run.accumulation * run.num_sequences * run.padded_length
    yield HostItem("a step's batches", num_workers * _BATCH_BYTES * tokens, ("training",))


def _state(run: Run) -> Iterator[HostItem]:
    yield HostItem(CHECKPOINT, run.checkpoint_bytes, ("training",))
