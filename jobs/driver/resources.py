"""The cluster of a driver, and whether it has what a recipe's workers take."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ray

from jobs.driver.record import Interrupts
from jobs.workers.placement import worker_resources
from loray.errors import SpecError
from loray.machine import Hardware, hardware
from loray.settings import Settings
from loray.spec import TrainSpec
from loray.telemetry import get_logger

log = get_logger(__name__)

_RAY_UP_CONFIG = Path("~/ray_bootstrap_config.yaml")  # on the head node of a cluster that `ray up` has started


def connect(spec: TrainSpec, settings: Settings, interrupts: Interrupts) -> None:
    """To the cluster, or to one on this machine alone. Raises SpecError if it has too few resources."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    interrupts.arm()
    check_resources(spec, settings)


class Workers(NamedTuple):
    """The hardware of the nodes that a recipe's workers run on, with a GPU for each worker or none. `per_node`: how
    many share a node, at least.
    """

    hardware: Hardware
    per_node: int

    @classmethod
    def here(cls, spec: TrainSpec) -> Workers:
        """All on this machine."""
        return cls(hardware(), spec.num_workers)


def find_workers(spec: TrainSpec, settings: Settings, interrupts: Interrupts) -> Workers:
    """Return what a recipe's workers run on.

    A recipe that leaves it to the cluster uses GPUs where there are as many as workers. On a cluster of several nodes,
    or with GPUs, a task that takes what a worker takes looks. A driver that is no cluster's job starts Ray on this
    machine alone. Raises SpecError if there are too few resources.
    """
    if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:
        return Workers.here(spec)
    connect(spec, settings, interrupts)
    if spec.use_gpu == "auto":
        spec = spec.model_copy(update={"use_gpu": ray.cluster_resources().get("GPU", 0) >= spec.num_workers})
    check_resources(spec, settings)
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if not spec.use_gpu and num_nodes == 1:
        return Workers(replace(hardware(), gpus=()), spec.num_workers)
    takes = worker_resources(spec, settings.training_group)
    look = ray.remote(hardware).options(
        num_cpus=takes.pop("CPU", 0), num_gpus=takes.pop("GPU", 0), resources=takes, max_retries=0
    )
    found: Hardware = ray.get(look.remote())
    if not spec.use_gpu:
        return Workers(replace(found, gpus=()), -(-spec.num_workers // num_nodes))
    per_node = min(spec.num_workers, max(len(found.gpus), 1))
    return Workers(replace(found, gpus=found.gpus[:1] * spec.num_workers), per_node)


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
    """Return whether an autoscaler may add nodes, judged by traces on the driver's node. Ray has no API for it.

    KubeRay starts the head with --no-monitor if it runs the autoscaler itself, which does not show on other nodes;
    `ray up` leaves its configuration file.
    """
    command = os.environ.get("KUBERAY_GEN_RAY_START_CMD", "")
    is_worker = bool(command) and "--head" not in command
    return is_worker or "--no-monitor" in command or _RAY_UP_CONFIG.expanduser().exists()
