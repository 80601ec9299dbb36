"""Routers that write down where each request went, beyond what they do anyway. By import path, for Ray Serve.

loray       the product's
ray         Ray Serve's default: of two replicas drawn at random the one with the shorter queue
random      any replica, as where a load balancer stands before independent servers
round-robin each replica in turn, as most load balancers do by default
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter  # where Serve's default is
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from loray.spec import GenerateRequest
from serve_apps.gateway.replicas.router import AdapterRouter


class Recorded:
    """A line of JSON for each request that a replica has accepted: whose it is (the client's id), when (seconds of
    `time.perf_counter`), the replica, and, for loray's, the requests on all replicas as the router knew them at its
    choice, this one included.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """`record`: the file."""
        file = kwargs.pop("record")
        self._record = open(file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - as long as the router lives
        super().initialize_state(**kwargs)  # type: ignore[misc]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        super().on_request_routed(pending_request, replica_id, result)  # type: ignore[misc]
        first = pending_request.args[0] if pending_request.args else None
        if isinstance(first, GenerateRequest):
            name = first.request_id.partition("-")[0]
            line = [name, time.perf_counter(), str(replica_id.unique_id), self._known_loads(pending_request)]
            self._record.write(json.dumps(line) + "\n")

    def _known_loads(self, pending: PendingRequest) -> dict[str, int]:
        return {}


class Loray(Recorded, AdapterRouter):
    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        chosen = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is not None:
            views = (self._view(replica, time.monotonic()) for replica in candidate_replicas)
            pending_request.loads = {view.id: view.load for view in views}
        return chosen

    def _known_loads(self, pending: PendingRequest) -> dict[str, int]:
        return getattr(pending, "loads", {})


class Default(Recorded, PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    pass


class Random(Recorded, PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        _pause_if_full(pending_request)
        return [[random.choice(candidate_replicas)]] if candidate_replicas else []


class RoundRobin(Recorded, PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    def initialize_state(self, **kwargs: Any) -> None:
        self._turn = 0
        super().initialize_state(**kwargs)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas:
            return []
        _pause_if_full(pending_request)
        self._turn += 1
        in_order = sorted(candidate_replicas, key=lambda replica: str(replica.replica_id.unique_id))
        return [[in_order[self._turn % len(in_order)]]]


def _pause_if_full(pending_request: PendingRequest | None) -> None:
    """Otherwise Serve asks again at once where the replica has no room."""
    if pending_request is not None:
        pending_request.routing_context.should_backoff = True
