"""One run of Ray Train: what it finds on the cluster, its trainer, and how it ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from jobs.controller import EventLog, Restarts, WholeGroupScaling, is_lost
from jobs.driver.record import Interrupts
from jobs.events import Emit, Event, Stages, appending, first_line, following
from jobs.runs.folders import BATCH, SCORE, RunFolder, last_step
from jobs.trackers import tensorboard
from jobs.workers import measuring, worker
from jobs.workers.placement import WholeGroups, worker_resources
from jobs.workers.reporting import EventSender
from jobs.workers.sink import start_sink
from loray.bases.registry import BaseModel
from loray.errors import LorayError, SpecError, TrainingError
from loray.machine import Hardware, hardware
from loray.settings import Settings
from loray.spec import TrainSpec
from loray.telemetry import get_logger

log = get_logger(__name__)

_HEALTH_CHECK_S = "0.2"  # Ray's default, 2 s, would delay by as much its knowledge of an uploaded checkpoint
_MEASURING = "measuring"  # the folder of Ray's files, which has no checkpoints
_RESIZE_S = 60.0  # between two checks whether an elastic run can have more workers
_RAY_UP_CONFIG = Path("~/ray_bootstrap_config.yaml")  # on the head node of a cluster that `ray up` has started


class Workload(NamedTuple):
    """Holds what workers are given: the recipe, its base, and in Ray's object store the tokenised data and the adapter
    that the run goes on from. `is_evaluated`: there are held-out rows. `dtype_reason`: why the recipe's dtype is what
    it is. `measured_tokens`: that go through models before publishing. `batch_reason`: why a step's rows are cut as
    they are; empty where the recipe says it.
    """

    spec: TrainSpec
    base: BaseModel
    data: ObjectRef
    is_evaluated: bool
    initial: ObjectRef | None
    dtype_reason: str
    measured_tokens: int = 0
    batch_reason: str = ""


def build_trainer(work: Workload, run: RunFolder, settings: Settings, sink: ActorHandle) -> TorchTrainer:
    spec = work.spec
    config = worker.WorkerConfig(
        recipe=spec.model_dump(mode="json"),
        home=str(settings.home),
        run=run.name,
        base_fingerprint=work.base.fingerprint,
        log_level=settings.log_level,
        peak_tflops=settings.peak_tflops,
        events=sink,
        data=work.data,
        initial=work.initial,
        dtype_reason=work.dtype_reason,
        measured_tokens=work.measured_tokens,
    )
    checkpoints = CheckpointConfig(
        num_to_keep=spec.checkpoint.keep,
        checkpoint_score_attribute=SCORE if spec.evaluation.keep_best and work.is_evaluated else None,
        checkpoint_score_order="min",
    )
    run_config = RunConfig(**run.storage, checkpoint_config=checkpoints, callbacks=[EventLog(sink, str(run))])
    restarts = Restarts(EventSender(sink).send, partial(last_step, run.filesystem, run.path))
    return _Trainer(worker.run, config, run_config, spec, settings, restarts)


def build_measuring(measurement: measuring.Measurement, run: RunFolder, settings: Settings) -> TorchTrainer:
    """Returns workers as those of the run, which measure and write nothing. Ray's own files are in a folder of it."""
    storage = {"name": _MEASURING, "storage_path": run.path, "storage_filesystem": run.storage["storage_filesystem"]}
    run_config = RunConfig(**storage, callbacks=[])
    config = {"measurement": measurement}
    return _Trainer(measuring.run, config, run_config, measurement.spec, settings, Restarts())


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's trainer on the workers of a recipe, with policies of ours."""

    def __init__(
        self,
        work: Callable[[Any], Any],
        config: Mapping[str, Any],
        run_config: RunConfig,
        spec: TrainSpec,
        settings: Settings,
        restarts: Restarts,
    ) -> None:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _HEALTH_CHECK_S)  # Ray passes it to its controller
        group = spec.parallel.sequence
        scaling_config = ScalingConfig(
            num_workers=spec.num_workers if spec.min_workers is None else (spec.min_workers, spec.num_workers),
            elastic_resize_monitor_interval_s=_RESIZE_S,
            use_gpu=spec.use_gpu,
            resources_per_worker=worker_resources(spec, settings.training_group),
            placement_strategy="PACK",
            label_selector=WholeGroups.label_selectors(spec.num_workers) if group > 1 else None,
        )
        if group > 1:
            run_config.callbacks.append(WholeGroups(group))
        super().__init__(work, train_loop_config=config, scaling_config=scaling_config, run_config=run_config)
        self._policies: dict[str, Any] = {"failure_policy": restarts}
        if spec.min_workers is not None:
            self._policies["scaling_policy"] = WholeGroupScaling(scaling_config, group)

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:  # private: the only way to pass a policy
        return super()._initialize_and_run_controller(**kwargs | self._policies)


def cause(error: TrainingFailedError) -> Exception:
    """Returns the error of a worker with which a run ended. Of workers that lost a peer, that of the peer."""
    failures: list[Exception] = list((getattr(error, "worker_failures", None) or {0: error}).values())
    return min(failures, key=is_lost)


def fit(
    work: Workload, run: RunFolder, settings: Settings, emit: Emit, *, on_interrupt: Callable[[], None] = lambda: None
) -> Result:
    """Trains, from the run's last checkpoint if it has one. TrainingError where the workers could not be kept alive.

    The result's `return_value` is None, or why training gave up. `on_interrupt` is called at once where this thread is
    interrupted, and may raise.
    """

    def write_and_emit(event: Event) -> None:
        write(event)
        emit(event)

    has_board = "tensorboard" in work.spec.tracking
    run.repair()
    if work.batch_reason:
        run.write_model(BATCH, work.spec.batch)
    with (
        run.history() as (events, folder),
        tensorboard(folder) as write,
        following(events, write_and_emit if has_board else emit),
    ):
        _tell_start(work, appending(events))
        sink = start_sink(events)
        try:
            return build_trainer(work, run, settings, sink).fit()
        except TrainingFailedError as e:
            error = cause(e)
            reason = str(error) if isinstance(error, LorayError) else first_line(error)
            raise TrainingError(
                f"training failed: {reason}; go on from the last checkpoint with --resume, details are in {run}"
            ) from e
        except KeyboardInterrupt:
            on_interrupt()
            raise
        finally:
            ray.kill(sink)


def _tell_start(work: Workload, tell: Emit) -> None:
    batch = work.spec.batch
    if work.batch_reason and batch.rows is not None:
        times = batch.chosen_accumulation
        tell({"event": "batch", "rows": batch.rows, "accumulation": times, "reason": work.batch_reason})
    Stages(tell)("starting the workers")


def connect(spec: TrainSpec, settings: Settings, interrupts: Interrupts) -> None:
    """Connects to the cluster, or to one on this machine alone. Raises SpecError if it has too few resources."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    interrupts.arm()
    check_resources(spec, settings)


class WorkerHardware(NamedTuple):
    """The hardware of the nodes that a recipe's workers run on, with a GPU for each worker or none. `per_node`: how
    many share a node, at least.
    """

    hardware: Hardware
    per_node: int

    @classmethod
    def here(cls, spec: TrainSpec) -> WorkerHardware:
        """Places all on this machine."""
        return cls(hardware(), spec.num_workers)


def find_workers(spec: TrainSpec, settings: Settings, interrupts: Interrupts) -> WorkerHardware:
    """Returns what a recipe's workers run on.

    A recipe that leaves it to the cluster uses GPUs where there are as many as workers. On a cluster of several nodes,
    or with GPUs, a task that takes what a worker takes looks. A driver that is no cluster's job starts Ray on this
    machine alone. Raises SpecError if there are too few resources.
    """
    if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:
        return WorkerHardware.here(spec)
    connect(spec, settings, interrupts)
    if spec.use_gpu == "auto":
        spec = spec.model_copy(update={"use_gpu": ray.cluster_resources().get("GPU", 0) >= spec.num_workers})
    check_resources(spec, settings)
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if not spec.use_gpu and num_nodes == 1:
        return WorkerHardware(replace(hardware(), gpus=()), spec.num_workers)
    takes = worker_resources(spec, settings.training_group)
    look = ray.remote(hardware).options(
        num_cpus=takes.pop("CPU", 0), num_gpus=takes.pop("GPU", 0), resources=takes, max_retries=0
    )
    found: Hardware = ray.get(look.remote())
    if not spec.use_gpu:
        return WorkerHardware(replace(found, gpus=()), -(-spec.num_workers // num_nodes))
    per_node = min(spec.num_workers, max(len(found.gpus), 1))
    return WorkerHardware(replace(found, gpus=found.gpus[:1] * spec.num_workers), per_node)


def check_resources(spec: TrainSpec, settings: Settings) -> None:
    """Raises SpecError if the cluster has too few resources, for which Ray would wait without end.

    With an autoscaler, which may add nodes, it only logs a warning.
    """
    have = ray.cluster_resources()
    name, needed = ("num_workers", spec.num_workers) if spec.min_workers is None else ("min_workers", spec.min_workers)
    for resource, each in worker_resources(spec, settings.training_group).items():
        if have.get(resource, 0) >= needed * each:
            continue
        unit = f"{resource}s" if resource.isupper() else f"of the resource {resource}"
        lack = f"{name} is {needed}, but the cluster has {have.get(resource, 0):g} {unit}"
        if not _has_autoscaler():
            raise SpecError(f"{lack}; lower it, or use a larger cluster")
        log.warning("%s: waiting for its autoscaler to add them, as long as that takes", lack)


def _has_autoscaler() -> bool:
    """Says whether an autoscaler may add nodes, judged by traces on the driver's node. Ray has no API for it.

    KubeRay starts the head with --no-monitor if it runs the autoscaler itself, which does not show on other nodes;
    `ray up` leaves its configuration file.
    """
    command = os.environ.get("KUBERAY_GEN_RAY_START_CMD", "")
    is_worker = bool(command) and "--head" not in command
    return is_worker or "--no-monitor" in command or _RAY_UP_CONFIG.expanduser().exists()
