"""A replica: an engine with its base. It loads adapters by digest from the store, through the node's cache.

This module does not import torch: the number of threads must be set first, and the process that deploys the application
needs only the class.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from typing import TYPE_CHECKING

from loray.api.status import AdapterPlacement, ReplicaStatus
from loray.bases.registry import BaseModel, get_base
from loray.errors import (
    BaseMismatch,
    EngineError,
    LorayError,
    NotFoundError,
    Overloaded,
    ReplicaUnavailable,
    RequestError,
)
from loray.serving.routing_report import RoutingStats, make_report
from loray.settings import Settings
from loray.spec import ServeSpec
from loray.telemetry import configure_logging, get_logger
from serve_apps.replica.demand import ReplicaDemand
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.streams import coalesced, fitted

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

    from loray.engine.stream import EngineStream
    from loray.spec import GenerateRequest, TokenDelta
    from serve_apps.replica.loading import AdapterLoader

_log = get_logger(__name__)

_CLIENT_ERRORS = (RequestError, NotFoundError, BaseMismatch, Overloaded)


class EngineReplica:
    """The Ray Serve deployment. Its methods run on one event loop, the engine in a thread of its own."""

    def __init__(self, spec: ServeSpec) -> None:
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        logging.getLogger("ray.serve").addFilter(without_expected_tracebacks)
        spec = set_num_threads(spec)
        self._spec = spec
        self._started_at = time.time()
        self._metrics = ReplicaMetrics()
        self._stream = start_engine(spec, get_base(settings.home, spec.base), settings)
        self._demand = spec.autoscaling and ReplicaDemand(spec, spec.autoscaling, self._stream)
        freeze_garbage()

    async def generate(self, request: GenerateRequest, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        """Yields deltas; those that arrive while one is being sent are merged. Closing it cancels the request.

        `fit`: the client did not set max_tokens, so it is lowered to what fits into this replica's pool. Raises
        ReplicaUnavailable if the engine had stopped before.
        """
        try:
            self._stream.check_health()
        except EngineError as e:
            raise ReplicaUnavailable(str(e), _replica_id()) from e
        deltas = fitted(self._stream, request) if fit else self._stream.generate(request)
        deltas = self._metrics.observed(request, deltas)
        if self._demand:
            deltas = self._demand.observed(request, deltas)
        async with aclosing(coalesced(deltas)) as pieces:
            async for delta in pieces:
                yield delta

    def stats(self) -> ReplicaStatus:
        """The replica's status; adapters are named by digest."""
        return ReplicaStatus(
            replica=_replica_id(),
            node=socket.gethostname(),
            pid=os.getpid(),
            uptime_s=time.time() - self._started_at,
            **dict(self._stream.stats()),
        )

    def metrics(self) -> list[Family]:
        """Prometheus families for the gateway's exposition, labelled with this replica."""
        return self._metrics.families(self._stream.stats(), _replica_id())

    async def adapters(self, digests: Collection[str] | None = None) -> list[AdapterPlacement]:
        """Where these adapters are, or all that this replica has loaded. Adapters that were never used here, or not for
        long, are left out. Raises EngineError if the engine has stopped.
        """
        replica, node = _replica_id(), socket.gethostname()
        return [
            AdapterPlacement(
                replica=replica,
                node=node,
                digest=placement.ref.digest,
                name=placement.ref.name,
                version=placement.ref.version,
                nbytes=placement.ref.nbytes,
                tier="none" if placement.tier is None else placement.tier.value,
                uses=placement.num_uses,
                last_used_at=placement.last_used_at,
                num_tokens=placement.num_tokens,
            )
            for placement in await self._stream.adapters(digests)
        ]

    def record_routing_stats(self) -> RoutingStats:
        """Serve calls it every second, and sends the report to the routers when it differs from the last one."""
        stats = self._stream.stats()
        return make_report(stats.adapters_in_pool, stats.adapters_on_host, now=time.time())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls it if it scales the deployment, and sends the report to its controller.

        It is async so that it runs on the event loop, as the requests do.
        """
        return self._demand.stats() if self._demand else {}

    def check_health(self) -> None:
        """Raises EngineError if the engine has stopped or has lost a rank. Serve then replaces the replica."""
        self._stream.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.stop()


def freeze_garbage() -> None:
    """Excludes all present objects from garbage collection, which would take long in torch and transformers."""
    gc.collect()
    gc.freeze()


def set_num_threads(spec: ServeSpec) -> ServeSpec:
    """Sets the number of threads of each rank, and returns `spec` with it. Must be called before torch is imported.

    Ray sets OMP_NUM_THREADS to 1 for its workers, and OpenMP reads it once.
    """
    cores = len(os.sched_getaffinity(0))
    num_ranks = spec.max_replicas * spec.tensor_parallel_size
    num_threads = spec.num_threads or max(1, cores * _num_nodes() // max(num_ranks, _num_nodes()))
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    import torch

    torch.set_num_threads(num_threads)
    _log.info("%d of %d cores", num_threads, cores)
    return spec.model_copy(update={"num_threads": num_threads})


def start_engine(spec: ServeSpec, base: BaseModel, settings: Settings) -> EngineStream:
    """Loads the base, allocates the pool, and starts the engine's thread."""
    from loray.engine.build import build_engine
    from loray.engine.stream import EngineStream
    from serve_apps.replica.ranks import RankActors

    started = time.monotonic()
    stream = EngineStream(build_engine(spec, base, adapter_loader(base, settings), start_workers=RankActors))
    stream.start()
    _log.info("base %s is ready after %.1f s", base.name, time.monotonic() - started)
    return stream


def adapter_loader(base: BaseModel, settings: Settings) -> AdapterLoader:
    """The `load` of the engine's loader threads: from a reference to an adapter."""
    from serve_apps.replica.loading import AdapterLoader

    return AdapterLoader(base, settings)


def without_expected_tracebacks(record: logging.LogRecord) -> bool:
    """A log filter. Ray Serve logs every error of a request with its traceback; it shortens expected ones to a line."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, LorayError) and not isinstance(error, EngineError):
        record.exc_info, record.exc_text = None, None
        level, what = (logging.INFO, "refused") if isinstance(error, _CLIENT_ERRORS) else (logging.WARNING, "failed")
        record.levelno, record.levelname = level, logging.getLevelName(level)
        record.msg, record.args = "request %s: %s: %s", (what, type(error).__name__, error)
    return True


def _replica_id() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)


def _num_nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
