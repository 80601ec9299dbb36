"""The benchmark of the gateway alone: its engines keep in step with who reads, and its figures are of what was read."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from benchmarks.front.__main__ import main
from benchmarks.front.engines import FakeEngines
from benchmarks.front.floor import chunk
from benchmarks.processes import cpu_seconds, title, tree
from loray.bases.registry import BaseModel
from loray.spec import GenerateRequest, SamplingParams, TokenDelta


def streams(engines: FakeEngines, num: int, max_tokens: int) -> list[AsyncGenerator[TokenDelta, None]]:
    params = SamplingParams(max_tokens=max_tokens)
    return [engines.generate(GenerateRequest(str(i), (1,), params), fit=False) for i in range(num)]


async def tokens(stream: AsyncGenerator[TokenDelta, None]) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


def test_every_request_gets_its_tokens() -> None:
    async def run() -> list[list[int]]:
        return await asyncio.gather(*(tokens(s) for s in streams(FakeEngines((5, 6, 7), 0.0), 3, 5)))

    assert asyncio.run(run()) == [[5, 6, 7, 5, 6]] * 3


def test_a_step_waits_for_the_slowest_reader_and_not_for_one_that_has_left() -> None:
    async def run() -> tuple[int, list[int]]:
        slow, gone, fast = streams(FakeEngines((5,), 0.0), 3, 50)
        for stream in (slow, gone):
            await anext(stream)
        reader = asyncio.create_task(tokens(fast))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not reader.done()
        assert await anext(slow)
        await gone.aclose()
        rest = asyncio.create_task(tokens(slow))
        return len(await rest), await reader

    assert asyncio.run(run()) == (48, [5] * 50)


def test_the_last_delta_says_so() -> None:
    async def run() -> list[str | None]:
        (stream,) = streams(FakeEngines((5,), 0.0), 1, 3)
        return [delta.finish_reason async for delta in stream]

    assert asyncio.run(run()) == [None, None, "length"]


def test_processor_time_is_that_of_a_process() -> None:
    began, before = time.process_time(), cpu_seconds(os.getpid())
    while time.process_time() < began + 0.2:
        pass
    assert cpu_seconds(os.getpid()) - before == pytest.approx(time.process_time() - began, abs=0.01)
    assert tree(os.getpid())[0] == os.getpid()
    assert "python" in title(os.getpid())
    assert cpu_seconds(1 << 22) == 0.0


def test_a_chunk_has_its_length_in_hexadecimal() -> None:
    assert chunk("data: {}\n\n") == b"a\r\ndata: {}\n\n\r\n"


def test_the_whole_benchmark(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base()
    monkeypatch.setenv("LORAY_HOME", str(base.path.parents[1]))
    options = ["--base", base.name, "--request", "completions", "--tokens", "8", "--connections", "3"]
    found = main([*options, "--seconds", "0.4", "--json", str(tmp_path / "front.json")])
    assert [front.server for front in found] == ["floor", "gateway", "channel"]
    for front in found:
        assert front.tokens_per_s > 0
        assert front.us_per_token > 0
        assert 0 < front.p50_ms <= front.p99_ms
    rows = json.loads((tmp_path / "front.json").read_text())["rows"]
    assert [row["tokens_per_s"] for row in rows] == [front.tokens_per_s for front in found]
