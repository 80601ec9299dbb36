"""A gateway without Ray, on scripted engines or on others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from fastapi import FastAPI
from prometheus_client.core import Metric as Family
from tokenizers.pre_tokenizers import ByteLevel

from loray.bases.registry import BaseModel
from loray.catalog import AdapterVersion, Catalog
from loray.schemas.status import AutoscalingStatus, ReplicaStatus
from loray.spec import AdapterManifest, FinishReason, GenerateRequest, ServeSpec, TokenDelta
from serve_apps.auth import Authenticator
from serve_apps.gateway.app import create_app
from serve_apps.gateway.bases import EngineClient, ServedBase
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.gateway import Gateway
from tests.serve_apps.keys import access_of

REPLICA = ReplicaStatus(
    replica="r1",
    node="n",
    pid=1,
    uptime_s=2.0,
    num_running=1,
    blocks={"free": 10, "kv": 2},
    adapters_in_pool=("0" * 64,),
)


def gateway_app(
    base: BaseModel, catalog_url: str, engines: EngineClient, *, access: Authenticator | None = None, **spec: Any
) -> FastAPI:
    """`access` None: as on loopback."""
    return fleet_app([ServedBase.open(ServeSpec(base=base.name, **spec), base, engines)], catalog_url, access)


def fleet_app(bases: Sequence[ServedBase], catalog_url: str, access: Authenticator | None = None) -> FastAPI:
    """As `gateway_app`, of several bases."""
    access = access or access_of(catalog_url)
    return create_app(Gateway(bases, ModelResolver([b.base for b in bases], access.follower)), access)


def register(
    catalog: Catalog, name: str, base_fingerprint: str, *, context_length: int = 512, **fields: Any
) -> AdapterVersion:
    """Registers a version in the catalog, without an adapter in the store."""
    num_versions = len(catalog.adapter(name).versions) if any(e.name == name for e in catalog.adapters()) else 0
    given: dict[str, Any] = {"files": {}} | fields
    manifest = AdapterManifest(
        method="lora",
        base="tiny",
        base_fingerprint=base_fingerprint,
        rank=8,
        target_modules=("q_proj",),
        num_parameters=10,
        nbytes=40,
        context_length=context_length,
        created_at="2026-01-01T00:00:00+00:00",
        **given,
    )
    return catalog.register(name, f"{num_versions:064x}", manifest)


class ScriptedEngines:
    """Yields the deltas of `script` and raises its exceptions; then waits for ever if `hang`."""

    def __init__(self, script: Sequence[TokenDelta | Exception] = (), *, hang: bool = False) -> None:
        self.script, self.hang = script, hang
        self.requests: list[GenerateRequest] = []
        self.fits: list[bool] = []
        self.closed: list[str] = []
        self.replicas: list[ReplicaStatus] = [REPLICA]
        self.families: list[list[Family] | None] = []
        self.scaling: AutoscalingStatus | None = None
        self.cold = self.failed = False

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        self.fits.append(fit)
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                yield item
            if self.hang:
                await asyncio.Event().wait()
        finally:
            self.closed.append(request.request_id)

    def running(self, late: Callable[[float], None]) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def healthy(self) -> bool:
        return bool(self.replicas)

    def is_cold(self) -> bool:
        return self.cold

    def start_failed(self) -> bool:
        return self.failed

    async def stats(self, layout: bool | frozenset[str] = False) -> list[ReplicaStatus]:
        wanted = {r.replica for r in self.replicas if layout} if isinstance(layout, bool) else layout
        return [r if r.replica in wanted else r.model_copy(update={"layout": ()}) for r in self.replicas]

    async def metrics(self) -> list[list[Family] | None]:
        return self.families

    async def autoscaling(self) -> AutoscalingStatus | None:
        return self.scaling

    def routing_decisions(self) -> dict[str, int]:
        return {}

    def resumes(self) -> dict[str, int]:
        return {}


# The ids of the byte tokenizer of tests.
_BYTES = {byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}
_END = 258


def delta(text: str, finish_reason: FinishReason | None = None) -> TokenDelta:
    """A token for each byte of `text`, in the tiny bases' tokenizer, and the one that stops it."""
    chars = "".join(word for word, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))
    return TokenDelta((*(_BYTES[c] for c in chars), *([_END] if finish_reason == "stop" else [])), finish_reason)
