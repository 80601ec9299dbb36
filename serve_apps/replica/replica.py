"""The Ray Serve deployment of a base's engines: a replica, what it loads before it takes requests, and what it logs.

This module does not import torch: the number of threads must be set first (`startup`), and the process that deploys the
application needs only the class.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from typing import TYPE_CHECKING

from loray.bases.registry import BaseModel, get_base
from loray.encryption import client_context
from loray.errors import (
    BaseMismatch,
    EngineError,
    LorayError,
    NotFoundError,
    Overloaded,
    RankLost,
    ReplicaUnavailable,
    RequestError,
)
from loray.policy.routing import Held
from loray.policy.warm_start import expected
from loray.schemas.status import AdapterPlacement, ReplicaStatus
from loray.settings import Settings
from loray.spec import ServeSpec, is_engine
from loray.telemetry import configure_logging, get_logger
from serve_apps.channel.connection import Connections
from serve_apps.python_gc import collect_when_quiet, freeze_garbage
from serve_apps.replica.metrics import LoadCounts, ReplicaMetrics, WarmStart, placements, replica_status
from serve_apps.replica.requests import ReplicaDemand, ReplicaRequests
from serve_apps.replica.startup import adapter_loader, set_num_threads, start_engine
from serve_apps.tracing import open_tracing

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

    from loray.engine.async_engine import AsyncEngine
    from loray.spec import GenerateRequest
    from serve_apps.channel.frames import ChannelAddress
    from serve_apps.scaling import DemandRecords


_log = get_logger(__name__)

_CLIENT_ERRORS = (RequestError, NotFoundError, BaseMismatch, Overloaded)
_ALONE = 0.2  # of the time, where no other replica takes requests, which wait meanwhile


def warm_up(stream: AsyncEngine, records: DemandRecords, own: str, base: BaseModel, timeout_s: float) -> WarmStart:
    """Load what is expected of the replica `own`, which serves `base`. Blocks for `timeout_s` at most, and
    a call of the cluster. Does not raise: a replica that could not load anything starts as well.
    """
    began = time.monotonic()
    try:
        record = records.read()
        if record is None:
            return WarmStart()
        served = (base.fingerprint, base.of)
        wanted = [demand for demand in expected(record, own) if demand.ref.base_fingerprint in served]
        left_s = timeout_s * (1.0 if record.replicas else _ALONE) - (time.monotonic() - began)
        loaded = stream.prefetch([demand.ref for demand in wanted], left_s)
    except Exception:  # noqa: BLE001 - it only makes the first requests faster
        _log.warning("the replica starts without adapters", exc_info=True)
        return WarmStart(seconds=time.monotonic() - began)
    seconds = time.monotonic() - began
    _log.info(
        "warm start: of %d adapters in demand, %d are expected here; after %.2f s %d are in the pool, %d on the host, "
        "%d failed, %d are late",
        len(record.adapters),
        len(wanted),
        seconds,
        *loaded,
    )
    return WarmStart(loaded, seconds)


class EngineReplica:
    """A replica of a Ray Serve deployment. Its methods run on one event loop, the engine in a thread of its own."""

    def __init__(self, spec: ServeSpec) -> None:
        settings = Settings.from_env()
        configure_logging(settings.log_level)
        logging.getLogger("ray.serve").addFilter(without_expected_tracebacks)
        self._spec = spec = set_num_threads(spec, _num_nodes(), 1 if spec.num_threads else _num_bases())
        from serve_apps.replica.ranks import RankActors  # late: the process that deploys imports no Ray

        self._started_at = time.time()
        base, counts = get_base(settings.home, spec.base), LoadCounts()
        self._loader = adapter_loader(base, settings, counts)
        self._stream = start_engine(spec, base, self._loader, RankActors)
        warm_start = None
        if spec.warm_start_s:
            warm_start = warm_up(self._stream, _demand_records(), _replica_id(), base, spec.warm_start_s)
        self._metrics = ReplicaMetrics(loads=counts, warm_start=warm_start)
        self._demand = ReplicaDemand(spec, spec.autoscaling, self._stream) if spec.autoscaling else None
        tracing = open_tracing("replica", _replica_id())
        self._requests = ReplicaRequests(self._stream, self._metrics, self._demand, tracing)
        self._connections = Connections(_node_id(), _replica_id(), self._held, client_context(os.environ))
        freeze_garbage()
        stream = self._stream
        collect_when_quiet(lambda: stream.stats().is_idle)

    async def generate_to(
        self,
        request: GenerateRequest,
        fit: bool,
        gateway: ChannelAddress,
        stream: int,
        others: Sequence[tuple[GenerateRequest, int]] = (),
    ) -> AsyncGenerator[str, None]:
        """Run the request; its tokens go to `gateway` as `stream`, over this replica's connection to it. Yields that
        connection's name when the request has ended. Closing it cancels the request.

        `others`: requests with their streams that are run beside it; the first error ends all.
        `fit`: the client did not set max_tokens, so it is lowered to what fits into this replica's pool. Raises
        ReplicaUnavailable if the engine had stopped before, or the gateway cannot be reached. If a rank is lost, this
        process ends: so Serve knows at once, and its requests go on elsewhere.
        """
        try:
            self._stream.check_health()
            connection = await self._connections.to(gateway)
        except EngineError as e:
            raise ReplicaUnavailable(str(e), _replica_id()) from e
        except OSError as e:
            raise ReplicaUnavailable(f"the replica cannot reach the gateway: {e}", _replica_id()) from e
        try:
            if others:
                await self._requests.run_all(((request, stream), *others), fit, connection)
            else:
                await self._requests.run(request, fit, connection, stream)
        except RankLost:
            os._exit(1)  # the engine has logged why
        yield connection.name

    async def stats(self) -> ReplicaStatus:
        """Describe this replica, see `replica_status`."""
        return replica_status(self._stream, _replica_id(), self._started_at)

    def metrics(self) -> list[Family]:
        """Collect Prometheus families for the gateway's exposition, labelled with this replica."""
        return self._metrics.families(self._stream.stats(), _replica_id())

    async def adapters(self, digests: Collection[str] | None = None) -> list[AdapterPlacement]:
        """Say where adapters are, see `placements`."""
        return await placements(self._stream, _replica_id(), digests)

    async def retire(self, digests: Collection[str]) -> None:
        """Drop ephemeral adapters in the engine, see `Engine.retire`, and in the node's cache where nobody reads them.
        Raises EngineError if the engine has stopped.
        """
        await self._stream.retire(digests)
        await asyncio.to_thread(lambda: [self._loader.cache.remove(digest) for digest in digests])

    async def report_to(self, gateway: ChannelAddress) -> None:
        """Tell `gateway` from now on which adapters this replica holds. Raises OSError if it cannot be reached."""
        await self._connections.to(gateway)

    def _held(self) -> Held:
        stats = self._stream.stats()
        return Held(stats.adapters_in_pool, stats.adapters_on_host, stats.prefixes)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report to Serve, which calls this if it scales the deployment and sends the report to its controller.

        It is async so that it runs on the event loop, as the requests do.
        """
        return self._demand.stats() if self._demand else {}

    def check_health(self) -> None:
        """Raise EngineError if the engine has stopped or has lost a rank. Serve then replaces the replica."""
        self._stream.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._stream.stop()


def without_expected_tracebacks(record: logging.LogRecord) -> bool:
    """Filter a log: Ray Serve logs every error of a request with its traceback; expected ones are cut to a line."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ReplicaUnavailable) or (isinstance(error, LorayError) and not isinstance(error, EngineError)):
        record.exc_info, record.exc_text = None, None
        level, what = (logging.INFO, "refused") if isinstance(error, _CLIENT_ERRORS) else (logging.WARNING, "failed")
        record.levelno, record.levelname = level, logging.getLevelName(level)
        record.msg, record.args = "request %s: %s: %s", (what, type(error).__name__, error)
    return True


def _replica_id() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)


def _demand_records() -> DemandRecords:
    from ray import serve

    from serve_apps.scaling import DemandRecords

    here = serve.get_replica_context()
    return DemandRecords(here.app_name, here.deployment)


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _num_bases() -> int:
    """Count the application's bases now. No argument says it: the replica would be replaced where it changes."""
    from ray import serve

    application = serve.status().applications[serve.get_replica_context().app_name]
    return max(1, sum(map(is_engine, application.deployments)))


def _num_nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
