"""The gateway's access to the engines: streams of tokens, their health, status and metrics. And to other gateways."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from prometheus_client.core import Metric as Family

from loray.api.status import AutoscalingStatus, ReplicaStatus
from loray.spec import GenerateRequest, TokenDelta


class Engines(Protocol):
    def running(self, late: Callable[[float], None]) -> AbstractAsyncContextManager[None]:
        """What they do beside requests, while the gateway runs. `late` is told how late tokens come from another
        process, by what they may be (`max_token_lateness`), as often as they come.
        """

    def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        """Yields deltas as they arrive; those that arrive between two reads are one. Raises LorayError.

        Closing the generator before its last delta ends the request in the engine. `fit`: max_tokens is an upper bound,
        which the replica lowers to what fits into its pool.
        """

    async def healthy(self) -> bool:
        """Whether a replica answers and its engine runs."""

    def is_cold(self) -> bool:
        """Whether no replica runs, and the next request starts one."""

    def start_failed(self) -> bool:
        """Whether no replica runs because the last one that a request started was not ready in time."""

    async def stats(self, layout: bool | frozenset[str] = False) -> list[ReplicaStatus]:
        """The status of every replica that answers; with `layout` also what its pool's blocks hold by position, or only
        those of replicas of these names.
        """

    async def autoscaling(self) -> AutoscalingStatus | None:
        """The autoscaler's last decisions; None if there are none."""

    async def metrics(self) -> list[list[Family] | None]:
        """The Prometheus families of every replica; None for one that does not answer in time."""

    def routing_decisions(self) -> Mapping[str, int]:
        """How many requests were routed, by reason (`loray.serving.routing.Reason`). Empty without replicas."""

    def resumes(self) -> Mapping[str, int]:
        """How many begun answers went on at another replica: "lost" ones and "moved" ones. Empty without replicas."""


class Gateways(Protocol):
    """The gateways of a deployment. Each has the HTTP requests that came to it, and no other's."""

    @property
    def name(self) -> str:
        """Of the gateway in this process."""

    async def metrics(self) -> list[list[Family] | None]:
        """The families of every gateway, this one included; None for one that does not answer in time."""
