"""The engine for asyncio: streams, cancellation, failures, a store that hangs, and its thread."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import weakref
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.engine import engine as engine_module
from loray.engine.async_engine import AsyncEngine
from loray.engine.build import build_engine
from loray.engine.engine import check_request
from loray.engine.metrics import EngineStats
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.errors import ContextLengthExceeded, EngineError, EngineStopped, Overloaded, RequestError, StoreError
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec, TokenDelta
from tests.conftest import compute_in_background
from tests.fixtures.engines import hold, make_engine, request, run
from tests.fixtures.peft_adapters import Adapters

IDS = list(b"stream me")


@pytest.fixture
def stream(base: BaseModel, adapters: Adapters) -> Iterator[AsyncEngine]:
    stream = AsyncEngine(make_engine(base, list(adapters.values()), num_threads=1))
    stream.start()
    yield stream
    stream.stop()


async def collect(stream: AsyncEngine, r: GenerateRequest) -> list[TokenDelta]:
    return [delta async for delta in stream.generate(r)]


async def tokens(stream: AsyncEngine, r: GenerateRequest) -> list[int]:
    return [token for delta in await collect(stream, r) for token in delta.token_ids]


async def idle(stream: AsyncEngine) -> EngineStats:
    """What the engine counts once nothing runs; it counts after it has delivered."""
    while (stats := stream.stats()).num_running:
        await asyncio.sleep(0.01)
    return stats


def go(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, timeout=60))


def test_deltas_are_the_engines_tokens_and_count_them(base: BaseModel, stream: AsyncEngine) -> None:
    requests = [request(str(i), IDS[: 3 + i], max_tokens=10, logprobs=2) for i in range(6)]
    expected = run(make_engine(base), requests)

    async def test() -> None:
        for r, deltas in zip(requests, await asyncio.gather(*(collect(stream, r) for r in requests)), strict=True):
            assert [t for d in deltas for t in d.token_ids] == expected[r.request_id]
            assert [d.finish_reason for d in deltas] == [None] * 9 + ["length"]
            for d in deltas:
                assert d.logprobs is not None
                (lp,) = d.logprobs
                assert lp.top[0][0] == d.token_ids[0]  # greedy
                assert lp.top[0][1] == pytest.approx(lp.logprob)
                assert lp.top[0][1] >= lp.top[1][1]

    go(test())


def test_closing_a_stream_cancels_its_request(stream: AsyncEngine) -> None:
    async def test() -> None:
        async with aclosing(stream.generate(request("r", IDS, max_tokens=400))) as deltas:
            await anext(deltas)
        await collect(stream, request("after", IDS, max_tokens=1))
        stats = await idle(stream)
        assert stats.blocks["kv"] == 0
        assert stats.num_output_tokens < 100

    go(test())


def test_an_idle_engine_holds_no_request(stream: AsyncEngine) -> None:
    held: list[weakref.ref[SamplingParams]] = []  # who has a request has these

    def asked(name: str, max_tokens: int) -> GenerateRequest:
        made = request(name, IDS, max_tokens=max_tokens)
        held.append(weakref.ref(made.params))
        return made

    async def test() -> None:
        await asyncio.gather(*(collect(stream, asked(f"held-{i}", 6)) for i in range(3)))
        async with aclosing(stream.generate(asked("held-cancelled", 400))) as deltas:
            await anext(aiter(deltas))
        await idle(stream)
        while any(params() is not None for params in held):  # until the engine's thread waits again
            gc.collect()
            await asyncio.sleep(0.01)

    go(test())


def test_what_is_refused_is_refused_at_once_and_others_go_on(stream: AsyncEngine) -> None:
    async def test() -> None:
        first = asyncio.create_task(collect(stream, request("r", IDS, max_tokens=40)))
        await asyncio.sleep(0)
        with pytest.raises(ContextLengthExceeded):
            await collect(stream, request("long", IDS, max_tokens=100_000))
        with pytest.raises(RequestError, match="in use"):
            await collect(stream, request("r", IDS))
        assert len(await first) == 40

    go(test())


def test_a_request_is_refused_in_time_although_nothing_happens(stream: AsyncEngine, adapters: Adapters) -> None:
    """The load that it waits for ends only after the refusal, and nothing else wakes the engine."""
    refused, load = threading.Event(), stream._engine._loads._load
    stream._engine._loads._load = lambda ref, packer: (refused.wait(60), load(ref, packer))[1]

    async def test() -> None:
        with pytest.raises(Overloaded, match="no first token within"):
            await collect(stream, replace(request("late", IDS, adapters["r2"]), ttft_slo_s=0.2))
        assert stream.failure is None

    try:
        go(test())
    finally:
        refused.set()


def test_everyone_hears_of_a_dying_engine_and_it_says_which_adapters_were_in_its_step(
    stream: AsyncEngine, adapters: Adapters
) -> None:
    """Who is in its step, waits in its inbox, asks for its adapters, and comes later."""
    entered, leave = threading.Event(), threading.Event()

    def forward(*_: object) -> None:
        entered.set()
        assert leave.wait(60)
        raise RuntimeError("out of luck")

    stream._engine._model.forward = forward  # type: ignore[method-assign,assignment]

    async def test() -> None:
        assert await stream.adapters() == []
        stepping = asyncio.create_task(collect(stream, request("a", IDS, adapters["r2"])))
        await asyncio.to_thread(entered.wait, 60)
        tasks = [asyncio.create_task(collect(stream, request("b", IDS))), asyncio.create_task(stream.adapters())]
        await asyncio.sleep(0)
        leave.set()
        with pytest.raises(EngineStopped, match="out of luck") as stopped:
            await stepping
        assert stopped.value.adapters == (adapters["r2"].ref.digest,)
        for asked in (*tasks, collect(stream, request("c", IDS)), stream.adapters()):
            with pytest.raises(EngineError, match="out of luck"):
                await asked
        with pytest.raises(EngineStopped) as stopped:
            stream.check_health()
        assert stopped.value.adapters == ()

    go(test())


def test_a_stream_goes_on_where_memory_was_short(base: BaseModel, stream: AsyncEngine) -> None:
    forward = stream._engine._model.forward

    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    stream._engine._model.forward = short  # type: ignore[method-assign,assignment]

    async def test() -> None:
        with pytest.raises(EngineError, match="more memory than the device has"):
            await collect(stream, request("first", IDS))
        stream._engine._model.forward = forward  # type: ignore[method-assign]
        stream.check_health()
        expected = run(make_engine(base), [request("second", IDS)])["second"]
        assert await tokens(stream, request("second", IDS)) == expected

    go(test())


def test_stopping_ends_open_streams(stream: AsyncEngine) -> None:
    async def test() -> None:
        stands, go_on = hold(stream._engine)
        task = asyncio.create_task(collect(stream, request("r", IDS, max_tokens=450)))
        assert await asyncio.to_thread(stands.wait, 60)
        threading.Thread(target=stream.stop).start()
        while not stream._stopping:
            await asyncio.sleep(0.001)
        go_on.set()
        with pytest.raises(EngineError, match="shutting down"):
            await task

    go(test())


def test_a_prompt_is_checked_once_and_not_between_steps(stream: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(spec: GenerateRequest, *args: Any, **limits: Any) -> None:
        checked.append(threading.current_thread().name)
        check_request(spec, *args, **limits)

    monkeypatch.setattr(engine_module, "check_request", check)

    async def test() -> None:
        assert await collect(stream, request("r", IDS, max_tokens=2))
        assert checked == [threading.current_thread().name]

    go(test())


def test_a_load_that_hangs_fails_its_requests_alone(base: BaseModel, adapters: Adapters) -> None:
    """A store that does not answer: what is warm, and the base, are served as ever."""
    hangs, goes_on = {adapters[name].ref.digest for name in ("r2", "r5")}, threading.Event()

    def load(ref: AdapterRef, packer: Packer) -> PackedAdapter:
        if ref.digest in hangs:
            assert goes_on.wait(60)
        return packer.pack(next(a for a in adapters.values() if a.ref.digest == ref.digest).load(base))

    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=8 << 20, num_threads=1, load_timeout_s=1.0)
    stream = AsyncEngine(build_engine(spec, base, load))

    async def test() -> None:
        warm = adapters["r8"]
        undisturbed = await tokens(stream, request("warm", [1, 2], warm))
        cold = asyncio.create_task(tokens(stream, request("cold", [1, 2], adapters["r2"])))
        num_served, loading = 0, set[str]()
        while not cold.done():
            assert await tokens(stream, request(f"warm-{num_served}", [1, 2], warm)) == undisturbed
            assert len(await tokens(stream, request(f"base-{num_served}", [1, 2]))) == len(undisturbed)
            loading.update(stream.stats().adapters_loading)
            num_served += 1
        assert num_served > 0
        assert adapters["r2"].ref.digest in loading
        with pytest.raises(StoreError, match=r"was not loaded within 1 s"):
            await cold
        with pytest.raises(StoreError, match="is tried again in") as refused:
            await tokens(stream, request("other", [1, 2], adapters["r5"]))
        assert refused.value.retry_after_s is not None
        goes_on.set()
        while adapters["r2"].ref.digest not in stream.stats().adapters_on_host + stream.stats().adapters_in_pool:
            await stream.adapters()
            await tokens(stream, request("again", [1, 2]))
        assert len(await tokens(stream, request("other again", [1, 2], adapters["r5"]))) == len(undisturbed)

    stream.start()
    try:
        go(test())
    finally:
        goes_on.set()
        stream.stop()


def test_what_comes_in_a_turn_is_not_slept_through(stream: AsyncEngine) -> None:
    """Nothing else wakes the engine, which is idle after that turn."""
    for _ in range(20):
        inner = stream.call(lambda: stream.call(lambda: "came")).result(60)
        assert inner.result(60) == "came"


def test_a_stop_in_a_turn_is_not_slept_through(stream: AsyncEngine) -> None:
    def turn() -> None:
        stopping.start()
        while not stream._stopping:
            pass

    stopping = threading.Thread(target=stream.stop)
    stream.call(turn).result(60)
    stopping.join(60)
    assert not stopping.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_steps_run_in_the_background(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loray.engine.async_engine.compute_in_background", compute_in_background)
    stream = AsyncEngine(make_engine(base, num_threads=1))
    stream.start()
    try:
        assert stream.call(lambda: os.sched_getscheduler(threading.get_native_id())).result(60) == os.SCHED_IDLE
    finally:
        stream.stop()
