"""The benchmark of the gateway alone: its engines keep in step with who reads, and its report has its columns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from benchmarks.front.__main__ import main
from benchmarks.front.server import FakeEngines
from benchmarks.report import Report
from loray.bases.registry import BaseModel
from loray.spec import GenerateRequest, SamplingParams, TokenDelta


async def tokens(stream: AsyncGenerator[TokenDelta, None]) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


def test_a_step_waits_for_the_slowest_reader_and_not_for_one_that_has_left() -> None:
    async def run() -> tuple[int, list[int]]:
        engines, params = FakeEngines((5, 6), 0.0), SamplingParams(max_tokens=50)
        slow, gone, fast = (engines.generate(GenerateRequest(i, (1,), params), fit=False) for i in "abc")
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

    assert asyncio.run(run()) == (48, [5, 6] * 25)


@pytest.mark.slow
def test_the_whole_benchmark(
    tiny_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, file = tiny_base(), tmp_path / "front.json"
    monkeypatch.setenv("LORAY_HOME", str(base.path.parents[1]))
    small = ["--base", base.name, "--request", "completions", "--tokens", "8", "--connections", "3"]
    found = main([*small, "--seconds", "0.4", "--json", str(file)])
    assert [front.server for front in found] == ["floor", "gateway", "channel"]
    for front in found:
        assert front.tokens_per_s > 0 < front.us_per_token
        assert 0 < front.p50_ms <= front.p99_ms
    assert Report.read(file).rows == [list(front) for front in found]
