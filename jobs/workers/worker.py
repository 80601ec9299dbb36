"""A training worker: the function that Ray Train runs on each."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import ray
import ray.train
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.context import get_train_context  # private: see Preemptions

from jobs.events import Stages, first_line
from jobs.workers.placement import straddling_warning
from jobs.workers.reporting import (
    CheckpointUploads,
    EventSender,
    Peak,
    RayReporter,
    TrainingGauges,
    Utilisation,
)
from loray.bases.registry import BaseModel, ensure_base
from loray.errors import LorayError, SpecError, TrainingError, UnsupportedError
from loray.machine import hardware
from loray.planning.devices import device_on
from loray.planning.plan import advice_for_less
from loray.planning.run import shape_of
from loray.priority import compute_in_background
from loray.recipes.resolve import resolve
from loray.spec import TrainSpec
from loray.telemetry import configure_logging
from loray.train.mesh import World
from loray_kernels.memory import is_out_of_memory

if TYPE_CHECKING:
    from jobs.workers.initial import InitialFiles
    from loray.methods.attach import InitialAdapter
    from loray.train.data.rows import Dataset


def num_threads(per_node: int | None = None) -> int:
    """Returns OMP_NUM_THREADS of the node's environment if it is set, else this worker's part of the node's cores.
    `per_node`: so many workers share the node; None: Ray Train's.

    If it is not set, Ray sets it later to the number of CPUs that a worker reserves. A worker reserves one CPU, so that
    training also starts on a node whose other CPUs a replica has reserved.
    """
    preset = preset_threads(Path("/proc/self/environ").read_bytes())
    if preset is not None:
        return preset
    node = next(n for n in ray.nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id())
    cores = min(int(node["Resources"].get("CPU", 1)), len(os.sched_getaffinity(0)))
    num_workers: int = per_node or ray.train.get_context().get_local_world_size()
    return max(1, cores // num_workers)


def preset_threads(environ: bytes) -> int | None:
    """Reads OMP_NUM_THREADS in a process's first environment: NAME=value, each followed by a NUL byte."""
    variables = dict(entry.partition(b"=")[::2] for entry in environ.split(b"\0"))
    value = variables.get(b"OMP_NUM_THREADS", b"").partition(b",")[0]  # a list is for nested parallelism
    return int(value) if value.isdigit() and int(value) > 0 else None


class WorkerConfig(TypedDict):
    """A worker's arguments.

    recipe       a TrainSpec as JSON
    run          name of the run's folder
    peak_tflops  of one worker's device, in 10¹² FLOP/s; None: measured, again while training
    events       the event sink's actor
    data         the Dataset in Ray's object store, whose tokens are in the cache
    initial      InitialFiles there, of the adapter that the run goes on from; None: it starts afresh
    dtype_reason why the recipe's dtype is what it is
    measured_tokens that go through models before publishing: the time that is left counts them
    """

    recipe: dict[str, Any]
    home: str
    run: str
    base_fingerprint: str
    log_level: str
    peak_tflops: float | None
    events: ActorHandle
    data: ObjectRef
    initial: ObjectRef | None
    dtype_reason: str
    measured_tokens: int


def run(config: WorkerConfig) -> str | None:
    """Trains. Returns None, or the reason why training gave up.

    What every rank raises is returned. After an exception of one rank `jobs.controller` decides what follows.
    """
    configure_logging(config["log_level"])
    spec = TrainSpec.parse(config["recipe"], source="the recipe")
    if not spec.use_gpu:
        compute_in_background()  # as an engine
    torch.set_num_threads(num_threads())
    events = EventSender(config["events"])
    world = World.current()
    if world.rank == 0:
        Stages(events.send)("loading the base")
    try:
        base = ensure_base(Path(config["home"]), spec.base, fingerprint=config["base_fingerprint"])
        problem = None
    except LorayError as e:
        base, problem = None, str(e)
    problems = [p for p in world.gather(problem) if p is not None]  # so that no rank waits for one that has ended
    if base is None or problems:
        return problems[0]
    try:
        _train(spec, base, config, world, events)
    except (SpecError, TrainingError, UnsupportedError) as e:
        return str(e)  # every rank raises it
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise TrainingError(_out_of_memory(spec, base, e)) from e  # the other ranks wait until Ray Train ends them
    return None


def _train(spec: TrainSpec, base: BaseModel, config: WorkerConfig, world: World, events: EventSender) -> None:
    from loray.train.loop import deterministic, train  # takes seconds, which driver and controller spare themselves

    device = ray.train.torch.get_device() if spec.use_gpu else torch.device("cpu")
    data: Dataset = ray.get(config["data"])
    nodes = world.gather(ray.get_runtime_context().get_node_id())
    warning = straddling_warning(nodes, spec.parallel.sequence)
    if world.rank == 0:
        for message in (*spec.warnings, *filter(None, (warning, _slow_products(spec, device)))):
            events.send({"event": "warning", "message": message})
    gauges = TrainingGauges(spec.name, config["run"], world.rank)
    with ExitStack() as stack:
        stack.enter_context(deterministic(spec.deterministic))  # before the device is measured
        if world.rank == 0:  # a folder that remains if the worker is killed, for the worker that replaces it
            folder = Path(config["home"], "checkpoints", spec.name, config["run"])
            utilisation = _utilisation(spec, base, data, device, config["peak_tflops"])
        else:
            folder, utilisation = Path(stack.enter_context(tempfile.TemporaryDirectory()), "checkpoints"), None
        stack.callback(events.flush)
        uploads = CheckpointUploads(folder, lambda seconds: gauges.set(checkpoint_seconds=seconds))
        stack.enter_context(uploads)
        reporter = RayReporter(events, uploads, gauges, utilisation, world, device, config["dtype_reason"])
        last = uploads.latest(world)
        resume_from = None if last is None else Path(stack.enter_context(last.as_directory()))
        initial, teaching = _initial(config, stack), spec.objective.teaching
        is_taught_here = teaching is not None and teaching.url is None
        teacher = ensure_base(Path(config["home"]), teaching.model) if teaching and is_taught_here else None
        train(
            spec,
            base,
            data,
            reporter=reporter,
            workdir=folder,
            resume_from=resume_from,
            initial=initial,
            teacher=teacher,
            device=device,
            dtype_reason=config["dtype_reason"],
            measured_tokens=config["measured_tokens"],
            leaving=Preemptions(events),
        )


class Preemptions:
    """The nodes of the run whose end Ray has announced, for rank 0, which says it once. Ray's own function for it is a
    collective call, which would cost every step.
    """

    def __init__(self, events: EventSender) -> None:
        self._events, self._told = events, frozenset[str]()

    def __call__(self) -> frozenset[str]:
        info = get_train_context().preemption_context.preemption_info
        nodes = frozenset[str]() if info is None else frozenset(info.preempted_node_ids)
        if nodes - self._told:
            message = f"{len(nodes)} of the run's nodes will be taken away: a checkpoint is written now, to go on from"
            self._events.send({"event": "warning", "message": message})
        self._told |= nodes
        return nodes


def _out_of_memory(spec: TrainSpec, base: BaseModel, error: RuntimeError) -> str:
    """Says what to change in a run that did not fit, although the plan may have said that it would."""
    per_node = ray.train.get_context().get_local_world_size()
    device = device_on(hardware(), per_node, use_gpu=spec.use_gpu is True)
    advice = "" if device is None else f"; {advice_for_less(shape_of(spec, base.config), device)}"
    return f"out of memory: {first_line(error)}{advice}"


def _initial(config: WorkerConfig, stack: ExitStack) -> InitialAdapter | None:
    """Returns the adapter to go on from, in a folder that `stack` removes."""
    if config["initial"] is None:
        return None
    from loray.methods.attach import InitialAdapter  # imports PEFT

    files: InitialFiles = ray.get(config["initial"])
    return InitialAdapter(files.digest, stack.enter_context(files.as_folder()))


def _utilisation(
    spec: TrainSpec, base: BaseModel, data: Dataset, device: torch.device, peak_tflops: float | None
) -> Utilisation:
    from loray.planning.compute import model_flops_per_token
    from loray.train.rates import fastest_product_flops

    per_token = model_flops_per_token(
        base.config,
        spec.adapter,
        data.length_counts,
        group_size=resolve(spec, base.config).group_size,
        target_share=data.report.num_targets / data.report.num_tokens,
        extra_forwards=spec.objective.extra_forwards,
    )
    if peak_tflops is not None:
        return Utilisation(per_token, Peak(peak_tflops * 1e12))
    sample = partial(fastest_product_flops, device)
    # A GPU is the worker's alone, and its memory may be full while it trains.
    again = None if device.type == "cuda" else partial(sample, passes=1)
    return Utilisation(per_token, Peak(sample, again))


def _slow_products(spec: TrainSpec, device: torch.device) -> str | None:
    """Measures what bfloat16 costs on a CPU that does not multiply it; None elsewhere."""
    from loray.train.rates import product_flops

    if spec.dtype != "bfloat16" or device.type != "cpu" or hardware().multiplies_bfloat16:
        return None
    factor = product_flops(device, torch.float32) / product_flops(device, torch.bfloat16)
    return (
        f"this CPU has no bfloat16 products: those of float32 are {factor:.1f} times as fast here; "
        "set dtype: float32, or leave it out"
    )
