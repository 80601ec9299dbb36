"""Builds Ray Train's trainer of a run: number and placement of workers, their configuration, and failure handling."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.driver.prepare import Prepared
from jobs.runs.folders import RunFolder
from jobs.runs.saved import SCORE
from jobs.workers import worker
from jobs.workers.controller import EventLog
from jobs.workers.elastic import ElasticTorchTrainer
from jobs.workers.placement import WholeGroups, worker_resources
from loray.bases.registry import BaseModel
from loray.settings import Settings
from loray.spec import TrainSpec

_MAX_LOST_WORKERS = 3
_HEALTH_CHECK_S = "0.2"  # Ray's default, 2 s, would delay by as much its knowledge of an uploaded checkpoint
_RESIZE_S = 60.0  # between two checks whether an elastic run can have more workers


class Workload(NamedTuple):
    """What workers are given: the recipe, its base, and in Ray's object store the tokenised data and the adapter that
    the run goes on from. `is_evaluated`: there are held-out rows. `dtype_reason`: why the
    recipe's dtype is what it is.
    """

    spec: TrainSpec
    base: BaseModel
    data: ObjectRef
    is_evaluated: bool
    initial: ObjectRef | None
    dtype_reason: str


def share_workload(prepared: Prepared, data: ObjectRef | None = None) -> Workload:
    """Puts what workers need into the object store. `data`: the dataset there, where several runs have the same."""
    initial = None if prepared.initial is None else ray.put(prepared.initial)
    is_evaluated = len(prepared.data.evaluation) > 0
    held = data or ray.put(prepared.data)
    return Workload(prepared.spec, prepared.base, held, is_evaluated, initial, prepared.dtype_reason)


def build_trainer(work: Workload, run: RunFolder, settings: Settings, sink: ActorHandle) -> TorchTrainer:
    spec = work.spec
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _HEALTH_CHECK_S)  # Ray passes it to its controller
    ranked = spec.evaluation.keep_best and work.is_evaluated
    arguments: dict[str, Any] = {
        "train_loop_config": worker.WorkerConfig(
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
        ),
        "scaling_config": _scaling(spec, settings),
        "run_config": RunConfig(
            **run.storage,
            failure_config=FailureConfig(max_failures=_MAX_LOST_WORKERS),
            checkpoint_config=CheckpointConfig(
                num_to_keep=spec.checkpoint.keep,
                checkpoint_score_attribute=SCORE if ranked else None,
                checkpoint_score_order="min",
            ),
            callbacks=[EventLog(sink, str(run)), *_placement(spec)],
        ),
    }
    if spec.min_workers is None:
        return TorchTrainer(worker.run, **arguments)
    return ElasticTorchTrainer(worker.run, group_size=spec.parallel.sequence, **arguments)


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
