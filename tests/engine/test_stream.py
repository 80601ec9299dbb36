"""The engine for asyncio: streams, cancellation, failures."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from loray.bases.registry import BaseModel
from loray.engine import engine as engine_module
from loray.engine.async_engine import AsyncEngine
from loray.engine.engine import check_request
from loray.engine.metrics import EngineStats
from loray.engine.request import Request
from loray.errors import ContextLengthExceeded, EngineError, EngineStopped, IntegrityError, Overloaded, RequestError
from loray.spec import GenerateRequest, TokenDelta
from tests.engine.adapters import make_adapter
from tests.engine.harness import hold, make_engine, request, run


@asynccontextmanager
async def started(base: BaseModel, **spec: Any) -> AsyncIterator[AsyncEngine]:
    stream = AsyncEngine(make_engine(base, num_threads=1, **spec))
    stream.start()
    try:
        yield stream
    finally:
        stream.stop()


async def collect(stream: AsyncEngine, r: GenerateRequest) -> list[TokenDelta]:
    return [delta async for delta in stream.generate(r)]


async def idle(stream: AsyncEngine) -> EngineStats:
    """What the engine counts once nothing runs; it counts after it has delivered."""
    while (stats := stream.stats()).num_running:
        await asyncio.sleep(0.01)
    return stats


def go(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), timeout=60))  # type: ignore[arg-type]


IDS = list(b"stream me")


def test_deltas_are_the_engines_tokens_and_count_them(base: BaseModel) -> None:
    expected = run(make_engine(base), [request("r", IDS, max_tokens=12)])["r"]

    async def test() -> None:
        async with started(base) as stream:
            deltas = await collect(stream, request("r", IDS, max_tokens=12, logprobs=2))
        assert [t for d in deltas for t in d.token_ids] == expected
        assert [d.finish_reason for d in deltas] == [None] * 11 + ["length"]
        for d in deltas:
            assert d.logprobs is not None
            (lp,) = d.logprobs
            assert lp.top[0][0] == d.token_ids[0]  # greedy
            assert lp.top[0][1] == pytest.approx(lp.logprob)
            assert lp.top[0][1] >= lp.top[1][1]

    go(test)


def test_many_streams_at_once(base: BaseModel) -> None:
    requests = [request(str(i), IDS[: 3 + i], max_tokens=10) for i in range(6)]
    expected = run(make_engine(base), requests)

    async def test() -> None:
        async with started(base) as stream:
            got = await asyncio.gather(*(collect(stream, r) for r in requests))
        assert {
            r.request_id: [t for d in ds for t in d.token_ids] for r, ds in zip(requests, got, strict=True)
        } == expected

    go(test)


def test_closing_a_stream_cancels_its_request(base: BaseModel) -> None:
    async def test() -> None:
        async with started(base) as stream:
            async with aclosing(stream.generate(request("r", IDS, max_tokens=400))) as deltas:
                async for _ in deltas:
                    break
            await collect(stream, request("after", IDS, max_tokens=1))
            stats = await idle(stream)
            assert stats.blocks["kv"] == 0
            assert stats.num_output_tokens < 100

    go(test)


def test_an_idle_engine_holds_no_request(base: BaseModel) -> None:
    def held() -> list[object]:
        gc.collect()
        ours = (o for o in gc.get_objects() if type(o) in (Request, GenerateRequest))
        return [o for o in ours if (o.spec if isinstance(o, Request) else o).request_id.startswith("held")]

    async def test() -> None:
        async with started(base) as stream:
            await asyncio.gather(*(collect(stream, request(f"held-{i}", IDS, max_tokens=6)) for i in range(3)))
            async with aclosing(stream.generate(request("held-cancelled", IDS, max_tokens=400))) as deltas:
                await anext(aiter(deltas))
            await idle(stream)
            while held():  # until the engine's thread waits again
                await asyncio.sleep(0.01)

    go(test)


def test_a_pools_blocks_by_position_are_told_between_steps(base: BaseModel) -> None:
    async def test() -> None:
        async with started(base) as stream:
            (empty,) = await stream.layout()
            async with aclosing(stream.generate(request("r", IDS, max_tokens=400))) as deltas:
                await anext(deltas)
                used, *rest = await stream.layout()
            assert empty.holds == "free"
            assert (used.holds, [stretch.holds for stretch in rest]) == ("kv", ["free"])
            assert used.num_blocks + rest[0].num_blocks == empty.num_blocks
        with pytest.raises(EngineError):
            await stream.layout()

    go(test)


def test_a_request_too_long_is_refused_before_the_first_delta(base: BaseModel) -> None:
    async def test() -> None:
        async with started(base) as stream:
            with pytest.raises(ContextLengthExceeded):
                await collect(stream, request("r", IDS, max_tokens=100_000))

    go(test)


def test_a_failing_load_fails_its_own_requests_only(base: BaseModel, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]), seed=0)

    async def test() -> None:
        async with started(base) as stream:
            stream._engine._loads._load = lambda ref: (_ for _ in ()).throw(IntegrityError("damaged"))
            broken, fine = await asyncio.gather(
                collect(stream, request("a", IDS, adapter)), collect(stream, request("b", IDS)), return_exceptions=True
            )
            assert isinstance(broken, IntegrityError)
            assert isinstance(fine, list)
            stream.check_health()

    go(test)


def test_a_request_is_refused_in_time_although_nothing_happens(base: BaseModel, tmp_path: Path) -> None:
    """The load that it waits for ends only after the refusal, and nothing else wakes the engine."""
    adapter = make_adapter(base, tmp_path / "slow", LoraConfig(r=2, target_modules=["q_proj"]), seed=1)
    refused = threading.Event()

    async def test() -> None:
        async with started(base) as stream:

            def load(ref: Any) -> Any:
                refused.wait(60)
                return adapter.load(base)

            stream._engine._loads._load = load
            with pytest.raises(Overloaded, match="no first token within"):
                await collect(stream, replace(request("late", IDS, adapter), ttft_slo_s=0.2))
            refused.set()
            assert stream.failure is None

    try:
        go(test)
    finally:
        refused.set()


def test_a_dead_engine_fails_everyone_and_says_so(base: BaseModel) -> None:
    async def test() -> None:
        async with started(base) as stream:
            stream._engine._model.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck"))  # type: ignore[method-assign]
            with pytest.raises(EngineError, match="out of luck"):
                await collect(stream, request("r", IDS))
            with pytest.raises(EngineError):
                stream.check_health()
            with pytest.raises(EngineError):
                await collect(stream, request("s", IDS))

    go(test)


def test_an_engine_that_stops_says_which_adapters_were_in_its_step(base: BaseModel, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]), seed=0)

    async def test() -> None:
        stream = AsyncEngine(make_engine(base, [adapter], num_threads=1))
        stream.start()
        stream._engine._model.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck"))  # type: ignore[method-assign]
        with pytest.raises(EngineStopped, match="out of luck") as e:
            await collect(stream, request("r", IDS, adapter))
        assert e.value.adapters == (adapter.ref.digest,)
        with pytest.raises(EngineStopped) as e:
            stream.check_health()
        assert e.value.adapters == ()
        stream.stop()

    go(test)


def test_who_asks_a_dying_engine_for_its_adapters_hears_of_it(base: BaseModel) -> None:
    async def test() -> None:
        async with started(base) as stream:
            entered, leave = threading.Event(), threading.Event()

            def forward(*_: object) -> None:
                entered.set()
                assert leave.wait(60)
                raise RuntimeError("out of luck")

            assert await stream.adapters() == []
            stream._engine._model.forward = forward  # type: ignore[method-assign,assignment]
            request_task = asyncio.create_task(collect(stream, request("a", IDS)))
            await asyncio.to_thread(entered.wait, 60)
            asked = asyncio.create_task(stream.adapters())
            await asyncio.sleep(0)
            leave.set()
            for task in (request_task, asked):
                with pytest.raises(EngineError, match="out of luck"):
                    await task
            with pytest.raises(EngineError, match="out of luck"):
                await stream.adapters()

    go(test)


def test_stopping_ends_open_streams(base: BaseModel) -> None:
    async def test() -> None:
        async with started(base) as stream:
            stands, go_on = hold(stream._engine)
            task = asyncio.create_task(collect(stream, request("r", IDS, max_tokens=450)))
            assert await asyncio.to_thread(stands.wait, 60)
            threading.Thread(target=stream.stop).start()
            while not stream._threads._ended:
                await asyncio.sleep(0.001)
            go_on.set()
            with pytest.raises(EngineError, match="shutting down"):
                await task

    go(test)


def test_whoever_waits_in_the_inbox_of_a_dying_engine_hears_of_it(base: BaseModel) -> None:
    async def test() -> None:
        async with started(base) as stream:
            entered, leave = threading.Event(), threading.Event()

            def forward(*_: object) -> None:
                entered.set()
                assert leave.wait(60)
                raise RuntimeError("out of luck")

            stream._engine._model.forward = forward  # type: ignore[method-assign,assignment]
            first = asyncio.create_task(collect(stream, request("a", IDS)))
            await asyncio.to_thread(entered.wait, 60)
            second = asyncio.create_task(collect(stream, request("b", IDS)))
            await asyncio.sleep(0)
            leave.set()
            for task in (first, second):
                with pytest.raises(EngineError):
                    await task

    go(test)


def test_a_request_id_in_use_is_refused_and_the_first_goes_on(base: BaseModel) -> None:
    async def test() -> None:
        async with started(base) as stream:
            first = asyncio.create_task(collect(stream, request("r", IDS, max_tokens=40)))
            await asyncio.sleep(0)
            with pytest.raises(RequestError, match="in use"):
                await collect(stream, request("r", IDS))
            assert len(await first) == 40

    go(test)


def test_a_prompt_is_checked_once_and_not_between_steps(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(spec: GenerateRequest, *args: Any, **limits: Any) -> None:
        checked.append(threading.current_thread().name)
        check_request(spec, *args, **limits)

    monkeypatch.setattr(engine_module, "check_request", check)

    async def test() -> None:
        async with started(base) as stream:
            assert await collect(stream, request("r", IDS, max_tokens=2))
        assert checked == [threading.current_thread().name]

    go(test)
