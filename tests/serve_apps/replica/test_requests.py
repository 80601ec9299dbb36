"""Requests of a replica: defaults that fit what it has, and the demand that they are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine, TokenSink
from loray.engine.build import build_engine
from loray.engine.request import TokenOutput
from loray.errors import ContextLengthExceeded, EngineError, Overloaded, RequestError
from loray.policy.demand import Observation
from loray.settings import Settings
from loray.spec import (
    AdapterRef,
    AutoscalingSpec,
    GenerateRequest,
    OutputKind,
    SamplingParams,
    ServeSpec,
    TokenDelta,
    TokenLogprobs,
)
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.requests import MOST_HELD, LocalStreams, ReplicaDemand, ReplicaRequests
from serve_apps.replica.startup import adapter_loader


class Limited:
    """An engine whose exact limit is known once its adapter is loaded."""

    def __init__(self, estimate: int, exact: int) -> None:
        self._limit, self._exact = estimate, exact
        self.asked: list[int] = []

    def max_model_len(self, adapter: AdapterRef | None) -> int:
        return self._limit

    def subscribe(self, request: GenerateRequest, sink: TokenSink, key: Any) -> None:
        self.asked.append(request.params.max_tokens)
        self._limit = self._exact
        fits = len(request.prompt_ids) + request.params.max_tokens <= self._limit
        error = None if fits else ContextLengthExceeded("too long", "prompt")
        sink.deliver([(key, TokenOutput("r", 7, finish_reason="length", error=error))])


async def ask(engine: Any, max_tokens: int, adapter: AdapterRef | None = None) -> list[TokenDelta]:
    request = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=max_tokens, ignore_eos=True), adapter)
    streams = LocalStreams(ReplicaRequests(engine, ReplicaMetrics()))
    return [d async for d in streams.generate(request, fit=True)]


@pytest.mark.parametrize(
    ("estimate", "exact", "asked"), [(200, 200, [100]), (50, 50, [47]), (50, 20, [47, 17]), (20, 50, [17])]
)
async def test_a_default_fits_what_the_replica_has(estimate: int, exact: int, asked: list[int]) -> None:
    engine: Any = Limited(estimate, exact)
    assert await ask(engine, 100) == [TokenDelta((7,), "length")]
    assert engine.asked == asked


class Stepped:
    """An engine whose steps the test makes, and where their results go: `sent`, what of the stream goes at once."""

    def __init__(self) -> None:
        self.now, self.sent, self.left = 0.0, list[list[TokenOutput]](), dict[int, Callable[[str], None]]()
        self.metrics, self.cancelled = ReplicaMetrics(lambda: self.now), list[str]()

    async def begin(self, kind: OutputKind, **params: Any) -> asyncio.Task[None]:
        engine: Any = self
        asked = GenerateRequest("r", (1, 2), SamplingParams(max_tokens=99, **params), output_kind=kind)
        run = asyncio.create_task(ReplicaRequests(engine, self.metrics).run(asked, False, self, 5))
        await asyncio.sleep(0)
        return run

    def subscribe(self, request: GenerateRequest, sink: TokenSink, key: Any) -> None:
        self._deliver = lambda outs: sink.deliver([(key, out) for out in outs])

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def step(self, token: int | None, **fields: Any) -> None:
        self.now += 1
        self._deliver([TokenOutput("r", token, **fields)])

    def forced(self, *tokens: int) -> None:
        self._deliver([TokenOutput("r", token) for token in tokens])

    def send(self, outputs: Sequence[tuple[int, TokenOutput]]) -> None:
        assert {stream for stream, _ in outputs} == {5}
        self.sent.append([out for _, out in outputs])

    def watch(self, stream: int, left: Callable[[str], None]) -> None:
        self.left[stream] = left

    def unwatch(self, stream: int) -> None:
        del self.left[stream]

    @property
    def tokens(self) -> list[list[int | None]]:
        return [[out.token_id for out in outputs] for outputs in self.sent]


@pytest.mark.parametrize("kind", ["delta", "final"])
async def test_what_nobody_reads_along_comes_some_tokens_at_a_time(kind: OutputKind) -> None:
    """The first one at once. Metrics are of the tokens as they are computed."""
    place, most = Stepped(), MOST_HELD + 1
    run = await place.begin(kind)
    for i in range(most + 10):
        place.step(i, logprobs=TokenLogprobs(-float(i), (), 1), finish_reason="length" if i == most + 9 else None)
    await run
    whole = list(range(most + 10))
    assert place.tokens == ([[i] for i in whole] if kind == "delta" else [[0], whole[1 : most + 1], whole[most + 1 :]])
    assert [out.logprobs.logprob for outputs in place.sent for out in outputs if out.logprobs] == [-i for i in whole]
    found = {s.name: s.value for f in place.metrics.request_families() for s in f.samples}
    assert [found[f"loray_inter_token_latency_seconds_{what}"] for what in ("count", "sum")] == [most + 9] * 2
    assert found["loray_time_to_first_token_seconds_sum"] == 1
    assert found["loray_request_generation_tokens_sum"] == most + 10


async def test_what_was_held_precedes_an_error() -> None:
    place = Stepped()
    run = await place.begin("final")
    for i in range(3):
        place.step(i)
    place.step(None, error=EngineError("broken"))
    with pytest.raises(EngineError, match="broken"):
        await run
    assert place.tokens == [[0], [1, 2]]


async def test_tokens_of_one_step_stay_together() -> None:
    """What a grammar has forced is computed again as a whole, too."""
    place = Stepped()
    run = await place.begin("final")
    place.forced(0, 1)
    for i in range(MOST_HELD):
        place.step(i)
    place.forced(50, 51, 52)
    assert place.tokens == [[0, 1], [*range(MOST_HELD), 50, 51, 52]]
    place.left[5]("abort")
    await run


async def test_parts_of_a_scored_prompt_are_not_held() -> None:
    place, part = Stepped(), (TokenLogprobs(-1.0, (), 1),)
    run = await place.begin("final", prompt_logprobs=0)
    for token in (None, None, 0):
        place.step(token, prompt_logprobs=part)
    place.step(1)
    assert place.tokens == [[None], [None], [0]]
    place.left[5]("abort")
    await run
    assert place.tokens == [[None], [None], [0]]


async def test_the_first_error_of_several_requests_ends_the_others() -> None:
    class Fails(Stepped):
        def subscribe(self, request: GenerateRequest, sink: TokenSink, key: Any) -> None:
            if request.request_id == "b":
                raise EngineError("broken")

    place: Any = Fails()
    asked = [(GenerateRequest(name, (1,), SamplingParams()), i) for i, name in enumerate("abc")]
    with pytest.raises(EngineError, match="broken"):
        await ReplicaRequests(place, place.metrics).run_all(asked, False, place)
    assert (sorted(place.cancelled), place.left) == (["a", "c"], {})


async def test_an_embedding_goes_to_a_reader_of_this_process() -> None:
    class Embeds(Limited):
        def subscribe(self, request: GenerateRequest, sink: TokenSink, key: Any) -> None:
            sink.deliver([(key, TokenOutput("r", None, finish_reason="stop", embedding=(0.6, 0.8)))])

    assert await ask(Embeds(200, 200), 0) == [TokenDelta((), "stop", embedding=(0.6, 0.8))]


@pytest.mark.parametrize("method", ["lora", "vera"])
async def test_a_default_leaves_room_for_the_adapter(
    base: BaseModel, settings: Settings, published: Callable[..., AdapterRef], method: str
) -> None:
    """A real engine with a pool smaller than the model's context. The published size does not contain VeRA's pair."""
    ref = published("a", method)
    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=160 << 10)
    stream = AsyncEngine(build_engine(spec, base, adapter_loader(base, settings)))
    limit = stream.max_model_len(None)
    assert limit < ref.context_length
    stream.start()
    try:
        deltas = await ask(stream, limit - 3, ref)
        assert deltas[-1].finish_reason == "length"
        left = stream.max_model_len(ref) - 3
        num_tokens = sum(len(d.token_ids) for d in deltas)
        assert left - 2 * spec.block_tokens <= num_tokens <= left < limit - 3  # the estimate is cautious
    finally:
        stream.stop()


async def test_a_prompt_that_never_fits_is_refused_once_its_limit_is_known() -> None:
    engine: Any = Limited(2, 2)
    with pytest.raises(ContextLengthExceeded):
        await ask(engine, 100)
    assert engine.asked == [1]


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

    async def answer(self, request: GenerateRequest) -> None:
        async for _ in self.deltas(request):
            pass

    def observe(self) -> Observation:
        return Observation.from_stats(self.demand.stats())


@pytest.fixture
def refs(published: Callable[..., AdapterRef]) -> dict[str, AdapterRef]:
    return {method: published(method, method) for method in ("lora", "vera")}


@pytest.fixture
def replica(base: BaseModel, settings: Settings) -> Iterator[Replica]:
    made = Replica(base, settings)
    made.stream.start()
    yield made
    made.stream.stop()


def request(name: str, ref: AdapterRef | None = None, **params: Any) -> GenerateRequest:
    return GenerateRequest(name, (1, 2, 3), SamplingParams(ignore_eos=True, **params), ref)


async def test_an_engines_requests_are_demand(replica: Replica, refs: dict[str, AdapterRef]) -> None:
    lora, vera = refs["lora"], refs["vera"]
    await replica.answer(request("a", max_tokens=5))
    await replica.answer(request("b", lora, max_tokens=7))
    seen = replica.observe()
    assert seen.tokens == (3 + 5) + (3 + 7)
    # Its size in the pool is known now: rank 4 on q (64 → 64) and v (64 → 32) of two layers, in fp32.
    assert seen.adapters == {lora.digest[:16]: 2 * 4 * (64 + 64 + 64 + 32) * 4}
    assert seen.pairs == {}
    await replica.answer(request("c", vera, max_tokens=1))
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
