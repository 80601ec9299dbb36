"""Builds Ray Train's trainer of a run: number and placement of workers, their configuration, and failure handling."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ray import ObjectRef
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from jobs.controller.elastic import WholeGroupScaling
from jobs.controller.events import EventLog
from jobs.controller.restarts import Restarts, is_lost
from jobs.events.sink import EventSender
from jobs.runs.folders import RunFolder
from jobs.runs.saved import SCORE
from jobs.workers import measuring, worker
from jobs.workers.placement import WholeGroups, worker_resources
from loray.bases.registry import BaseModel
from loray.settings import Settings
from loray.spec import TrainSpec

_HEALTH_CHECK_S = "0.2"  # Ray's default, 2 s, would delay by as much its knowledge of an uploaded checkpoint
_MEASURING = "measuring"  # the folder of Ray's files, which has no checkpoints
_RESIZE_S = 60.0  # between two checks whether an elastic run can have more workers


class Workload(NamedTuple):
    """Holds what workers are given: the recipe, its base, and in Ray's object store the tokenised data and the adapter
    that the run goes on from. `is_evaluated`: there are held-out rows. `dtype_reason`: why the recipe's dtype is what
    it is.
    """

    spec: TrainSpec
    base: BaseModel
    data: ObjectRef
    is_evaluated: bool
    initial: ObjectRef | None
    dtype_reason: str


def build_trainer(work: Workload, run: RunFolder, settings: Settings, sink: ActorHandle) -> TorchTrainer:
    spec = work.spec
    ranked = spec.evaluation.keep_best and work.is_evaluated
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
    )
    run_config = RunConfig(
        **run.storage,
        checkpoint_config=CheckpointConfig(
            num_to_keep=spec.checkpoint.keep,
            checkpoint_score_attribute=SCORE if ranked else None,
            checkpoint_score_order="min",
        ),
        callbacks=[EventLog(sink, str(run)), *_placement(spec)],
    )
    return _workers(worker.run, config, run_config, spec, settings, Restarts(EventSender(sink).send))


def build_measuring(measurement: measuring.Measurement, run: RunFolder, settings: Settings) -> TorchTrainer:
    """The same workers as those of the run, which measure and write nothing. Ray's own files are in a folder of it."""
    spec = measurement.spec
    storage = {"name": _MEASURING, "storage_path": run.path, "storage_filesystem": run.storage["storage_filesystem"]}
    run_config = RunConfig(**storage, callbacks=[*_placement(spec)])
    return _workers(measuring.run, {"measurement": measurement}, run_config, spec, settings, Restarts())


def _workers(
    work: Callable[[Any], Any],
    config: Mapping[str, Any],
    run_config: RunConfig,
    spec: TrainSpec,
    settings: Settings,
    restarts: Restarts,
) -> TorchTrainer:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _HEALTH_CHECK_S)  # Ray passes it to its controller
    scaling_config = _scaling(spec, settings)
    return _Trainer(
        work,
        restarts=restarts,
        scaling=None if spec.min_workers is None else WholeGroupScaling(scaling_config, spec.parallel.sequence),
        train_loop_config=config,
        scaling_config=scaling_config,
        run_config=run_config,
    )


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's, with policies of ours. `scaling` None: Ray Train's."""

    def __init__(self, *args: Any, restarts: Restarts, scaling: WholeGroupScaling | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._policies = {"failure_policy": restarts} | ({} if scaling is None else {"scaling_policy": scaling})

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:  # private: the only way to pass a policy
        return super()._initialize_and_run_controller(**kwargs | self._policies)


def _scaling(spec: TrainSpec, settings: Settings) -> ScalingConfig:
    has_groups = spec.parallel.sequence > 1
    return ScalingConfig(
        num_workers=spec.num_workers if spec.min_workers is None else (spec.min_workers, spec.num_workers),
        elastic_resize_monitor_interval_s=_RESIZE_S,
        use_gpu=spec.use_gpu,
        resources_per_worker=worker_resources(spec, settings.training_group),
        placement_strategy="PACK",
        label_selector=WholeGroups.label_selectors(spec.num_workers) if has_groups else None,
    )


def _placement(spec: TrainSpec) -> list[WholeGroups]:
    return [WholeGroups(spec.parallel.sequence)] if spec.parallel.sequence > 1 else []


def cause(error: TrainingFailedError) -> Exception:
    """The error of a worker with which a run ended. Of workers that lost a peer, that of the peer."""
    failures: list[Exception] = list((getattr(error, "worker_failures", None) or {0: error}).values())
    return min(failures, key=is_lost)
