"""Starts an engine that loads adapters by digest, in a replica or in `loray serve`: its threads and its base.

This module imports neither torch nor Ray: the number of threads must be set before torch is imported.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from loray.bases.registry import BaseModel
from loray.priority import ForegroundTime
from loray.settings import Settings
from loray.spec import ServeSpec
from loray.telemetry import get_logger

if TYPE_CHECKING:
    from loray.engine.async_engine import AsyncEngine
    from loray.engine.parallel.worker import StartWorkers
    from serve_apps.replica.loading import AdapterLoader
    from serve_apps.replica.metrics import LoadCounts

_log = get_logger(__name__)


def set_num_threads(spec: ServeSpec, num_nodes: int = 1, num_bases: int = 1) -> ServeSpec:
    """Set the number of threads of each rank, and return `spec` with it. Must be called before torch is imported.

    The replicas are spread over `num_nodes` machines, which `num_bases` bases share equally. Ray sets OMP_NUM_THREADS
    to 1 for its workers, and OpenMP reads it once.
    """
    cores = len(os.sched_getaffinity(0))
    num_ranks = num_bases * spec.max_replicas * spec.tensor_parallel_size
    num_threads = spec.num_threads or max(1, cores * num_nodes // max(num_ranks, num_nodes))
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    import torch

    torch.set_num_threads(num_threads)
    _log.info("%d of %d cores", num_threads, cores)
    return spec.model_copy(update={"num_threads": num_threads})


def start_engine(
    spec: ServeSpec, base: BaseModel, load: AdapterLoader, start_workers: StartWorkers | None = None
) -> AsyncEngine:
    """Load the base, allocate the pool, and start the engine's thread. `load` is an `adapter_loader`. An
    engine on a CPU tells trainers of this machine when it computes for people.

    `start_workers` starts the ranks of tensor parallel other than 0, by default as processes of this machine.
    """
    from loray.engine.async_engine import AsyncEngine
    from loray.engine.build import build_engine
    from loray.engine.parallel.worker import LocalWorkers

    started = time.monotonic()
    engine = build_engine(spec, base, load, start_workers=start_workers or LocalWorkers)
    if spec.device.startswith("cpu"):
        engine.foreground = ForegroundTime(load.home)
    stream = AsyncEngine(engine)
    stream.start()
    _log.info("base %s is ready after %.1f s", base.name, time.monotonic() - started)
    return stream


def adapter_loader(base: BaseModel, settings: Settings, counts: LoadCounts | None = None) -> AdapterLoader:
    """Make the `load` of the engine's loader threads, from a reference to an adapter."""
    from serve_apps.replica.loading import AdapterLoader

    return AdapterLoader(base, settings, counts)
