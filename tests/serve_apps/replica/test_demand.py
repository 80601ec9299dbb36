"""Demand measured on a real engine, and on one that refuses requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.async_engine import AsyncEngine
from loray.engine.build import build_engine
from loray.engine.request import TokenOutput
from loray.errors import Overloaded, RequestError
from loray.policy.demand import Observation
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import AdapterRef, AutoscalingSpec, GenerateRequest, SamplingParams, ServeSpec, TokenDelta
from loray.store import AdapterStore, open_store
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.requests import LocalStreams, ReplicaDemand, ReplicaRequests
from serve_apps.replica.startup import adapter_loader

SCALING = AutoscalingSpec(window_s=3600)


class Replica:
    """An engine with two published adapters, one LoRA and one VeRA."""

    def __init__(self, base: BaseModel, settings: Settings) -> None:
        self.spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=4 << 20, autoscaling=SCALING)
        self.stream = AsyncEngine(build_engine(self.spec, base, adapter_loader(base, settings)))
        self.demand = ReplicaDemand(self.spec, SCALING, self.stream)
        self.streams = LocalStreams(ReplicaRequests(self.stream, ReplicaMetrics(), self.demand))

    def deltas(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        return self.streams.generate(request, fit=False)

    def answer(self, request: GenerateRequest) -> None:
        async def run() -> None:
            async for _ in self.deltas(request):
                pass

        asyncio.run(run())

    def observe(self) -> Observation:
        return Observation.from_stats(self.demand.stats())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})


@pytest.fixture
def refs(
    tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], settings: Settings
) -> dict[str, AdapterRef]:
    base, catalog = tiny_base(), Catalog(settings.catalog)
    store = AdapterStore(open_store(settings.store))
    for method in ("lora", "vera"):
        publish(peft_folder(base, method), base, Destination(method, store, catalog))
    return {method: catalog.resolve(method) for method in ("lora", "vera")}


@pytest.fixture
def replica(tiny_base: Callable[..., BaseModel], settings: Settings) -> Iterator[Replica]:
    made = Replica(tiny_base(), settings)
    made.stream.start()
    yield made
    made.stream.stop()


def request(name: str, ref: AdapterRef | None = None, **params: Any) -> GenerateRequest:
    return GenerateRequest(name, (1, 2, 3), SamplingParams(ignore_eos=True, **params), ref)


def test_an_engines_requests_are_demand(replica: Replica, refs: dict[str, AdapterRef]) -> None:
    lora, vera = refs["lora"], refs["vera"]
    replica.answer(request("a", max_tokens=5))
    replica.answer(request("b", lora, max_tokens=7))
    seen = replica.observe()
    assert seen.tokens == (3 + 5) + (3 + 7)
    # Its size in the pool is known now: rank 4 on q (64 → 64) and v (64 → 32) of two layers, in fp32.
    assert seen.adapters == {lora.digest[:16]: 2 * 4 * (64 + 64 + 64 + 32) * 4}
    assert seen.pairs == {}
    replica.answer(request("c", vera, max_tokens=1))
    seen = replica.observe()
    (pair,) = seen.pairs.values()
    assert pair > seen.adapters[vera.digest[:16]] > 0
    assert seen.kv_byte_s == 0


async def test_a_cancelled_request_counts_with_its_tokens(replica: Replica) -> None:
    num_steps, stands, go_on, step = 0, threading.Event(), threading.Event(), replica.stream._engine.step

    def held() -> list[TokenOutput]:
        nonlocal num_steps
        num_steps += bool(outputs := step())
        if num_steps == 6:  # five have been delivered
            stands.set()
            assert go_on.wait(60)
        return outputs

    replica.stream._engine.step = held  # type: ignore[method-assign]
    deltas = replica.deltas(request("a", max_tokens=400))
    await anext(deltas)
    assert await asyncio.to_thread(stands.wait, 60)
    await deltas.aclose()
    while replica.streams._left:
        await asyncio.sleep(0)
    go_on.set()
    assert replica.observe().tokens == 3 + 5


@pytest.mark.parametrize(("error", "tokens"), [(Overloaded("full", 1.0), 3), (RequestError("no", "prompt"), 0)])
def test_a_request_refused_for_overload_is_demand(replica: Replica, error: Exception, tokens: float) -> None:
    replica.demand.ended(replica.demand.arrived(request("a")), error)
    assert replica.observe().tokens == tokens


def test_requests_that_wait_for_their_turn_are_backlog(
    replica: Replica, refs: dict[str, AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three tokens each; the second waits for its adapter instead."""
    engine = replica.stream.stats().model_copy(update={"num_waiting": 2})
    monkeypatch.setattr(replica.stream, "stats", lambda: engine)
    for name, ref in (("a", None), ("b", refs["lora"])):
        replica.demand.arrived(request(name, ref))
    assert replica.observe().backlog == 3
    held = engine.model_copy(update={"adapters_on_host": (refs["lora"].digest,)})
    monkeypatch.setattr(replica.stream, "stats", lambda: held)
    assert replica.observe().backlog == 6
