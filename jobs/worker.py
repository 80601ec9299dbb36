"""What runs on Ray Train's workers and controller: the loop with a Ray reporter, and the events' way out."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict

import ray
import ray.train
import torch

from jobs.events import encode
from loray.bases.registry import get_base
from loray.errors import BaseMismatch, LorayError
from loray.spec import TrainSpec
from loray.telemetry import configure_logging
from loray.train.loop import train


class WorkerConfig(TypedDict):
    """`data` is the object store's reference to the tokenised Dataset."""

    recipe: dict[str, Any]
    home: str
    base_fingerprint: str
    log_level: str
    data: Any


class RayReporter:
    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        name = None
        if metrics["event"] == "checkpoint":
            name = f"step_{metrics['step']:06d}"
            if metrics["eval_loss"] is None:  # Ray ranks checkpoints by it, and nan comes last
                metrics = metrics | {"eval_loss": float("nan")}
        saved = None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint)
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=name)


def run(config: WorkerConfig) -> str | None:
    """The reason why training gave up, or None. An error that a restart cannot cure is returned, not raised:
    Ray Train would start the workers again, only to fail in the same way.
    """
    configure_logging(config["log_level"])
    torch.set_num_threads(_num_threads())
    try:
        _train(config)
    except LorayError as e:
        return str(e)
    return None


def _train(config: WorkerConfig) -> None:
    spec = TrainSpec.parse(config["recipe"], source="the recipe")
    base = get_base(Path(config["home"]), spec.base)
    if base.fingerprint != config["base_fingerprint"]:
        raise BaseMismatch(
            f"base {spec.base!r} is another model on this worker's machine than on the driver's; add the same to both"
        )
    device = ray.train.torch.get_device() if spec.use_gpu else torch.device("cpu")
    last = ray.train.get_checkpoint()
    with nullcontext(None) if last is None else last.as_directory() as folder, tempfile.TemporaryDirectory() as workdir:
        train(
            spec,
            base,
            ray.get(config["data"]),
            reporter=RayReporter(),
            workdir=Path(workdir),
            resume_from=None if folder is None else Path(folder),
            device=device,
        )


def _num_threads() -> int:
    """This machine's cores, shared by its workers. Ray sets OMP_NUM_THREADS to the CPUs that a worker reserves, and
    a worker reserves one, so that training also starts where a replica holds the others.
    """
    node = next(n for n in ray.nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id())
    cores = min(int(node["Resources"].get("CPU", 1)), len(os.sched_getaffinity(0)))
    local_workers: int = ray.train.get_context().get_local_world_size()
    return max(1, cores // local_workers)


class EventLog(ray.train.UserCallback):  # type: ignore[misc]
    """Appends rank 0's reports to a file. It lives in the controller, which Ray starts on the driver's machine."""

    def __init__(self, path: str) -> None:
        self._path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._append(metrics[0] if checkpoint is None else metrics[0] | {"path": checkpoint.path})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = next(iter(worker_exceptions.items()))
        self._append({"event": "worker_lost", "message": f"rank {rank}: {first_line(error)}"})

    def _append(self, event: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(encode(event) + "\n")


def first_line(error: BaseException) -> str:
    """Of the innermost cause: Ray wraps errors in layers with their tracebacks as text."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
