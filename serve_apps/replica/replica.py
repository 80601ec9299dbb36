"""One replica: an engine with its base, and adapters by digest from the store through the node's cache.

Nothing heavy is imported here: torch must come after the number of threads is set, and the driver that deploys
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
from serve_apps.replica.streams import coalesced, fitted, generate

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

    from loray.engine.stream import EngineStream
    from loray.spec import Delta, GenerateRequest
    from serve_apps.replica.loading import AdapterLoader

_log = get_logger(__name__)

_CALLERS_OWN = (RequestError, NotFoundError, BaseMismatch, Overloaded)


class EngineReplica:
    """Ray Serve deployment. Its methods run on one event loop, the engine in its own thread."""

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

    async def generate(self, request: GenerateRequest, fit: bool) -> AsyncGenerator[Delta, None]:
        """Deltas as they come; what has come while the last one was sent goes as one. Closing it cancels.

        `fit`: nobody asked for max_tokens, so it is lowered to what this replica has room for. Raises
        ReplicaUnavailable where the engine had stopped before.
        """
        try:
            self._stream.check_health()
        except EngineError as e:
            raise ReplicaUnavailable(str(e), _replica_id()) from e
        deltas = fitted(self._stream, request) if fit else generate(self._stream, request)
        deltas = self._metrics.observed(request, deltas)
        if self._demand:
            deltas = self._demand.observed(request, deltas)
        async with aclosing(coalesced(deltas)) as pieces:
            async for delta in pieces:
                yield delta

    def stats(self) -> ReplicaStatus:
        """Adapters by digest."""
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
        """Of these adapters, or of all that this replica has had. One that was never asked for here, or long ago, is
        left out. Raises EngineError where the engine has stopped.
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
        """Asked for by Serve, every second, and sent to the routers when it differs."""
        stats = self._stream.stats()
        return make_report(stats.adapters_in_pool, stats.adapters_on_host, now=time.time())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked for by Serve where it scales, and sent to its controller. On the loop, as the requests that it sums."""
        return self._demand.stats() if self._demand else {}

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has stopped, or has lost a rank."""
        self._stream.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.stop()


def freeze_garbage() -> None:
    """What is there by now stays: collections that walk through all of torch and transformers hold up steps."""
    gc.collect()
    gc.freeze()


def set_num_threads(spec: ServeSpec) -> ServeSpec:
    """`spec` with the threads that each rank uses, before torch is imported: Ray tells its workers to use one thread,
    and OpenMP reads that once.
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
    """Load the base, cut the pool, start the engine's thread."""
    from transformers import AutoTokenizer

    from loray.engine.build import build_engine
    from loray.engine.stream import EngineStream
    from serve_apps.replica.ranks import RankActors

    started = time.monotonic()
    stream = EngineStream(
        build_engine(spec, base, adapter_loader(base, settings), start_workers=RankActors),
        AutoTokenizer.from_pretrained(str(base.path)),
    )
    stream.start()
    _log.info("base %s is ready after %.1f s", base.name, time.monotonic() - started)
    return stream


def adapter_loader(base: BaseModel, settings: Settings) -> AdapterLoader:
    """From a reference to an adapter, by the engine's loader threads."""
    from serve_apps.replica.loading import AdapterLoader

    return AdapterLoader(base, settings)


def without_expected_tracebacks(record: logging.LogRecord) -> bool:
    """Ray Serve logs whatever a request raises with its traceback; of an error raised on purpose one line is enough."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, LorayError) and not isinstance(error, EngineError):
        record.exc_info, record.exc_text = None, None
        level, what = (logging.INFO, "refused") if isinstance(error, _CALLERS_OWN) else (logging.WARNING, "failed")
        record.levelno, record.levelname = level, logging.getLevelName(level)
        record.msg, record.args = "request %s: %s: %s", (what, type(error).__name__, error)
    return True


def _replica_id() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)


def _num_nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
