"""What runs on Ray Train's workers and controller: the loop with a Ray reporter, and the events' way out."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict

import ray
import ray.train
import torch

from jobs.bases import ensure_base
from jobs.sink import EventSender
from loray.bases.registry import BaseModel
from loray.errors import BaseMismatch, LorayError
from loray.spec import TrainSpec
from loray.telemetry import configure_logging
from loray.train.data_parallel import World

SCORE = "score"  # what Ray ranks checkpoints by


class WorkerConfig(TypedDict):
    """`data` is the object store's reference to the tokenised Dataset; `events` the actor that news go to."""

    recipe: dict[str, Any]
    home: str
    base_fingerprint: str
    log_level: str
    events: Any
    data: Any


class RayReporter:
    """Only checkpoints go through Ray: it takes one report per health check, and would hold every step up for that.
    Other events rank 0 sends to the driver itself.
    """

    def __init__(self, events: EventSender, rank: int) -> None:
        self._events, self._rank = events, rank

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if metrics["event"] == "checkpoint":
            saved = None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint)
            name = f"step_{metrics['step']:06d}"
            ray.train.report(metrics | {SCORE: score(metrics["eval_loss"])}, checkpoint=saved, checkpoint_dir_name=name)
        elif self._rank == 0:
            self._events.send(metrics)


def score(eval_loss: float | None) -> float:
    """Finite, as Ray's snapshot must hold it in JSON; checkpoints that were not evaluated come last."""
    return sys.float_info.max if eval_loss is None else eval_loss


def run(config: WorkerConfig) -> str | None:
    """The reason why training gave up, or None. An error that a restart cannot cure is returned, not raised:
    Ray Train would start the workers again, only to fail in the same way.
    """
    configure_logging(config["log_level"])
    torch.set_num_threads(_num_threads())
    spec = TrainSpec.parse(config["recipe"], source="the recipe")
    try:
        base, problem = _find_base(spec, config), None
    except LorayError as e:
        base, problem = None, str(e)
    world = World.current()
    problems = [p for p in world.gather(problem) if p is not None]  # all ranks end here, or none waits for another
    if base is None or problems:
        return problems[0]
    try:
        _train(spec, base, config, world.rank)
    except LorayError as e:
        return str(e)
    return None


def _find_base(spec: TrainSpec, config: WorkerConfig) -> BaseModel:
    base = ensure_base(Path(config["home"]), spec.base)
    if base.fingerprint != config["base_fingerprint"]:
        raise BaseMismatch(
            f"base {spec.base!r} is another model on this worker's machine than on the driver's; add the same to both"
        )
    return base


def _train(spec: TrainSpec, base: BaseModel, config: WorkerConfig, rank: int) -> None:
    from loray.train.loop import train  # takes seconds, which driver and controller, who import this module, have not

    device = ray.train.torch.get_device() if spec.use_gpu else torch.device("cpu")
    last = ray.train.get_checkpoint()
    events = EventSender(config["events"])
    with nullcontext(None) if last is None else last.as_directory() as folder, tempfile.TemporaryDirectory() as workdir:
        try:
            train(
                spec,
                base,
                ray.get(config["data"]),
                reporter=RayReporter(events, rank),
                workdir=Path(workdir),
                resume_from=None if folder is None else Path(folder),
                device=device,
            )
        finally:
            events.flush()


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
