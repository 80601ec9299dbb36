"""In which thread kernels are compiled and steps captured: cuBLAS has a handle and workspaces for each thread, so what
is warm in one is cold in another.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.engine.model.decoder import Decoder
from loray.errors import EngineError
from loray.spec import ServeSpec
from tests.fixtures.engines import request
from tests.kernels.cuda.shim_ops import ShimOps, use_three_forms


@pytest.fixture(scope="session")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base("Qwen3ForCausalLM")


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    return use_three_forms(monkeypatch)


def build(base: BaseModel) -> AsyncEngine:
    spec = ServeSpec(
        base=base.name,
        dtype="float32",
        pool_bytes=8 << 20,
        itl_slo_ms=1e9,
        graph_record_s=1e9,
        max_num_seqs=4,
        num_threads=1,
    )
    return AsyncEngine(build_engine(spec, base, lambda ref: pytest.fail("there are no adapters")))


def test_the_thread_that_steps_compiles_and_captures(
    base: BaseModel, ops: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[str]] = {"forward": set(), "capture": set()}

    def watch(name: str) -> None:
        call = getattr(Decoder, name)

        def watched(*arguments: Any) -> Any:
            threads[name].add(threading.current_thread().name)
            return call(*arguments)

        monkeypatch.setattr(Decoder, name, watched)

    for name in threads:
        watch(name)
    stream = build(base)
    stream.start()
    try:
        captured = stream._engine._model.capture_state
        assert captured is not None
        assert captured.num_captured == captured.num_wanted == 3

        async def answer() -> list[Any]:
            return [delta async for delta in stream.generate(request("r", range(3, 9), max_tokens=4))]

        assert asyncio.run(answer())
        assert ops.replayed
    finally:
        stream.stop()
    assert threads == {"forward": {"engine-usual"}, "capture": {"engine-usual"}}


def test_an_engine_that_cannot_be_warmed_up_does_not_start(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: Engine) -> None:
        raise EngineError("rank 1 has ended")

    monkeypatch.setattr(Engine, "warm_up", fail)
    stream = build(base)
    with pytest.raises(EngineError, match="rank 1 has ended"):
        stream.start()
    with pytest.raises(EngineError):
        stream.check_health()
