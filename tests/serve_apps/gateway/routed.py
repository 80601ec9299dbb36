"""Ray's RequestRouter with stand-in replicas, without a cluster."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from loray.policy.routing import Held, RoutingSeries
from loray.spec import AdapterRef, GenerateRequest, SamplingParams
from serve_apps.gateway.replicas import router as module
from serve_apps.gateway.replicas.router import AdapterRouter

ENGINE = DeploymentID("engine", "app")
DIGESTS = [f"{i:064x}"[::-1] for i in range(1 << 40, (1 << 40) + 20)]


class Replica:
    """Stands in for RunningReplica, which needs an actor. `queue_len` is what it says to a probe."""

    def __init__(self, name: str, *, limit: int = 50) -> None:
        self.replica_id = ReplicaID(name, ENGINE)
        self.max_ongoing_requests = limit
        self.node_id = self.availability_zone = None
        self.multiplexed_model_ids: list[str] = []
        self.queue_len = self.num_asked = 0
        self._series = RoutingSeries(name)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.num_asked += 1
        return self.queue_len

    def report(self, *in_pool: str, on_host: tuple[str, ...] = ()) -> None:
        """It holds nothing else now."""
        for delta in self._series.deltas(Held(in_pool, on_host)):
            assert module.reports.take(str(self.replica_id.unique_id), delta, time.monotonic())


numbers = itertools.count()


def pending(digest: str | None, *, http_request: str | None = None) -> PendingRequest:
    """A pending call of `generate`, as Serve creates it. Calls of one HTTP request share its id."""
    number = next(numbers)
    adapter = digest and AdapterRef(
        digest=digest, name="a", version=1, method="lora", base_fingerprint="0" * 64, context_length=64, nbytes=1
    )
    metadata = RequestMetadata(f"r{number}", http_request or f"i{number}", call_method="generate")
    return PendingRequest([GenerateRequest(f"r{number}", (1,), SamplingParams(), adapter or None), True], {}, metadata)


def with_router(replicas: list[Replica], scenario: Callable[[AdapterRouter], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        router = AdapterRouter(
            ENGINE, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True, initial_backoff_s=0.001
        )
        router.initialize_state(floor=4)
        router.update_replicas(replicas)
        await asyncio.wait_for(scenario(router), timeout=20)

    asyncio.run(run())


async def route(router: AdapterRouter, request: PendingRequest) -> str:
    """Routes a request as Serve's AsyncioRouter does, to a replica that accepts it."""
    replica = await router._choose_replica_for_request(request)
    router.on_send_request(replica.replica_id)
    replica.queue_len += 1
    router.on_new_queue_len_info(replica.replica_id, replica.queue_len)
    router.on_request_routed(request, replica.replica_id, None)
    return str(replica.replica_id.unique_id)
