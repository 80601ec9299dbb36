"""A store that does not answer: what is warm, and the base, are served as ever."""

from __future__ import annotations

import asyncio
import threading

import pytest

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.engine.build import build_engine
from loray.errors import StoreError
from loray.methods.weights import AdapterWeights
from loray.spec import AdapterRef, GenerateRequest, ServeSpec
from tests.engine.adapters import TestAdapter
from tests.engine.harness import request


def test_a_load_that_hangs_fails_its_requests_alone(base: BaseModel, adapters: dict[str, TestAdapter]) -> None:
    hangs, goes_on = {adapters[name].ref.digest for name in ("r2", "r5")}, threading.Event()

    def load(ref: AdapterRef) -> AdapterWeights:
        if ref.digest in hangs:
            assert goes_on.wait(60)
        return next(a for a in adapters.values() if a.ref.digest == ref.digest).load(base)

    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=8 << 20, num_threads=1, load_timeout_s=1.0)
    stream = AsyncEngine(build_engine(spec, base, load))

    async def tokens(asked: GenerateRequest) -> list[int]:
        return [t async for delta in stream.generate(asked) for t in delta.token_ids]

    async def run() -> None:
        warm = adapters["r8"]
        undisturbed = await tokens(request("warm", [1, 2], warm))
        cold = asyncio.create_task(tokens(request("cold", [1, 2], adapters["r2"])))
        num_served, loading = 0, set[str]()
        while not cold.done():
            assert await tokens(request(f"warm-{num_served}", [1, 2], warm)) == undisturbed
            assert len(await tokens(request(f"base-{num_served}", [1, 2]))) == len(undisturbed)
            loading.update(stream.stats().adapters_loading)
            num_served += 1
        assert num_served > 0
        assert adapters["r2"].ref.digest in loading
        with pytest.raises(StoreError, match=r"was not loaded within 1 s"):
            await cold
        with pytest.raises(StoreError, match="is tried again in") as refused:
            await tokens(request("other", [1, 2], adapters["r5"]))
        assert refused.value.retry_after_s is not None
        goes_on.set()
        while adapters["r2"].ref.digest not in stream.stats().adapters_on_host + stream.stats().adapters_in_pool:
            await stream.adapters()
            await tokens(request("again", [1, 2]))
        assert len(await tokens(request("other again", [1, 2], adapters["r5"]))) == len(undisturbed)

    stream.start()
    try:
        asyncio.run(asyncio.wait_for(run(), 60))
    finally:
        goes_on.set()
        stream.stop()
