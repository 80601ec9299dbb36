"""What runs on Ray Train's workers and controller: the loop with a Ray reporter, and the events' way out."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import ray
import ray.train
import torch

from jobs.events.sink import EventSender
from jobs.workers.checkpoints import SCORE, CheckpointUploads
from jobs.workers.gauges import TrainingGauges, Utilisation
from jobs.workers.placement import straddling_warning
from jobs.workers.reporter import RayReporter
from loray.bases.registry import BaseModel, ensure_base
from loray.errors import LorayError, SpecError, TrainingError, UnsupportedError
from loray.recipes.resolve import resolve
from loray.spec import TrainSpec
from loray.telemetry import configure_logging
from loray.train.mesh import World

if TYPE_CHECKING:
    from loray.train.data.dataset import Dataset


class WorkerConfig(TypedDict):
    """`run` is the name of the run's folder, `data` the object store's reference to the tokenised Dataset, `events` the
    actor that news go to. `peak_tflops` None: to be measured.
    """

    recipe: dict[str, Any]
    home: str
    run: str
    base_fingerprint: str
    log_level: str
    peak_tflops: float | None
    events: Any
    data: Any


def run(config: WorkerConfig) -> str | None:
    """The reason why training gave up, or None. An error that a restart cannot cure is returned, not raised:
    Ray Train would start the workers again, only to fail in the same way.
    """
    configure_logging(config["log_level"])
    torch.set_num_threads(_num_threads())
    spec = TrainSpec.parse(config["recipe"], source="the recipe")
    try:
        base = ensure_base(Path(config["home"]), spec.base, fingerprint=config["base_fingerprint"])
        problem = None
    except LorayError as e:
        base, problem = None, str(e)
    world = World.current()
    problems = [p for p in world.gather(problem) if p is not None]  # all ranks end here, or none waits for another
    if base is None or problems:
        return problems[0]
    try:
        _train(spec, base, config, world)
    except (SpecError, TrainingError, UnsupportedError) as e:
        return str(e)  # every rank's
    except LorayError as e:
        if world.size > 1:
            raise  # perhaps this rank's alone: the others wait for it until Ray Train ends them
        return str(e)
    return None


def _train(spec: TrainSpec, base: BaseModel, config: WorkerConfig, world: World) -> None:
    from loray.train.loop import train  # takes seconds, which driver and controller, who import this module, have not

    device = ray.train.torch.get_device() if spec.use_gpu else torch.device("cpu")
    data: Dataset = ray.get(config["data"])
    events = EventSender(config["events"])
    nodes = world.gather(ray.get_runtime_context().get_node_id())
    warning = straddling_warning(nodes, spec.parallel.sequence)
    if world.rank == 0:
        for message in (*spec.doubts, *([] if warning is None else [warning])):
            events.send({"event": "warning", "message": message})
    gauges = TrainingGauges(spec.name, config["run"], world.rank)
    with ExitStack() as stack:
        if world.rank == 0:  # outlives a worker that is killed, for the one that takes its place
            folder = Path(config["home"], "checkpoints", spec.name, config["run"])
            utilisation = _utilisation(spec, base, data, device, config["peak_tflops"])
        else:
            folder, utilisation = Path(stack.enter_context(tempfile.TemporaryDirectory()), "checkpoints"), None
        stack.callback(events.flush)
        uploads = CheckpointUploads(folder, lambda seconds: gauges.set(checkpoint_seconds=seconds))
        stack.enter_context(uploads)
        reporter = RayReporter(events, uploads, gauges, utilisation, world, device)
        last = uploads.latest(world)
        resume_from = None if last is None else Path(stack.enter_context(last.as_directory()))
        train(spec, base, data, reporter=reporter, workdir=folder, resume_from=resume_from, device=device)


def _utilisation(
    spec: TrainSpec, base: BaseModel, data: Dataset, device: torch.device, peak_tflops: float | None
) -> Utilisation:
    from loray.planning.compute import model_flops_per_token
    from loray.train.rates import product_flops

    per_token = model_flops_per_token(
        base.config,
        spec.adapter,
        data.train.lengths.tolist(),
        group_size=resolve(spec, base.config).group_size,
        target_share=data.report.num_targets / data.report.num_tokens,
    )
    if peak_tflops is not None:
        return Utilisation(per_token, peak_tflops * 1e12, "setting")
    return Utilisation(per_token, product_flops(device, getattr(torch, spec.dtype)), "measured")


def _num_threads() -> int:
    return num_threads(ray.train.get_context().get_local_world_size())


def num_threads(num_workers: int) -> int:
    """OMP_NUM_THREADS where the node's environment sets it; else this machine's cores, shared by `num_workers` of it.

    Where it is not set Ray sets it later, to the CPUs that a worker reserves. A worker reserves one, so that training
    also starts where a replica holds the others.
    """
    preset = _preset_threads(Path("/proc/self/environ").read_bytes())
    if preset is not None:
        return preset
    node = next(n for n in ray.nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id())
    cores = min(int(node["Resources"].get("CPU", 1)), len(os.sched_getaffinity(0)))
    return max(1, cores // num_workers)


def _preset_threads(environ: bytes) -> int | None:
    """OMP_NUM_THREADS of the environment that a process was started with (NAME=value, each behind a NUL)."""
    variables = dict(entry.partition(b"=")[::2] for entry in environ.split(b"\0"))
    value = variables.get(b"OMP_NUM_THREADS", b"").partition(b",")[0]  # a list is for nested parallelism
    return int(value) if value.isdigit() and int(value) > 0 else None


class EventLog(ray.train.UserCallback):  # type: ignore[misc]
    """Tells of checkpoints and lost workers, from Ray Train's controller. `run` is how people call the run's folder."""

    def __init__(self, sink: Any, run: str) -> None:
        self._events = EventSender(sink)
        self._run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if checkpoint is not None:
            event = {name: value for name, value in metrics[0].items() if name != SCORE}
            self._events.send(event | {"path": f"{self._run}/{Path(checkpoint.path).name}"})
            self._events.flush()

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = next(iter(worker_exceptions.items()))
        self._events.send({"event": "worker_lost", "message": f"rank {rank}: {first_line(error)}"})
        self._events.flush()


def first_line(error: BaseException) -> str:
    """Of the innermost cause: Ray wraps errors in layers with their tracebacks as text."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
