"""Parts of the replica without Ray: fitted defaults, and logs of errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import AdapterVersion, Catalog
from loray.engine.async_engine import AsyncEngine, TokenSink
from loray.engine.build import build_engine
from loray.engine.request import TokenOutput
from loray.errors import ContextLengthExceeded, EngineError, IntegrityError, RequestError
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import AdapterRef, GenerateRequest, SamplingParams, ServeSpec, TokenDelta
from loray.store import AdapterStore, open_store
from serve_apps.replica.metrics import ReplicaMetrics
from serve_apps.replica.replica import without_expected_tracebacks
from serve_apps.replica.requests import LocalStreams, ReplicaRequests
from serve_apps.replica.startup import adapter_loader


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})


def published(folder: Path, base: BaseModel, settings: Settings) -> AdapterVersion:
    store = AdapterStore(open_store(settings.store))
    return publish(folder, base, Destination("a", store, Catalog(settings.catalog)))


# -- defaults ---------------------------------------------------------------------------------------------------------


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
def test_a_default_fits_what_the_replica_has(estimate: int, exact: int, asked: list[int]) -> None:
    engine: Any = Limited(estimate, exact)

    assert asyncio.run(ask(engine, 100)) == [TokenDelta((7,), "length")]
    assert engine.asked == asked


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_a_default_leaves_room_for_the_adapter(
    tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], settings: Settings, method: str
) -> None:
    """A real engine with a pool smaller than the model's context. The published size does not contain VeRA's pair."""
    base = tiny_base()
    published(peft_folder(base, method), base, settings)
    ref = Catalog(settings.catalog).resolve("a")
    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=160 << 10)
    stream = AsyncEngine(build_engine(spec, base, adapter_loader(base, settings)))
    limit = stream.max_model_len(None)
    assert limit < ref.context_length
    stream.start()

    try:
        deltas = asyncio.run(ask(stream, limit - 3, ref))
        assert deltas[-1].finish_reason == "length"
        left = stream.max_model_len(ref) - 3
        assert (
            left - 2 * spec.block_tokens <= sum(len(d.token_ids) for d in deltas) <= left < limit - 3
        )  # the estimate is cautious
    finally:
        stream.stop()


def test_a_prompt_that_never_fits_is_refused_once_its_limit_is_known() -> None:
    engine: Any = Limited(2, 2)
    with pytest.raises(ContextLengthExceeded):
        asyncio.run(ask(engine, 100))
    assert engine.asked == [1]


# -- logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "level", "message"),
    [
        (RequestError("no", "prompt"), logging.INFO, "request refused: RequestError: no"),
        (IntegrityError("damaged"), logging.WARNING, "request failed: IntegrityError: damaged"),
        (EngineError("x"), logging.ERROR, "Request failed."),
        (KeyError("x"), logging.ERROR, "Request failed."),
    ],
)
def test_what_is_raised_on_purpose_is_one_line(error: Exception, level: int, message: str) -> None:
    info = (type(error), error, None)
    record = logging.LogRecord("ray.serve", logging.ERROR, "f", 1, "Request failed.", (), info)
    assert without_expected_tracebacks(record)
    assert (record.exc_info is None) == (level != logging.ERROR)
    assert (record.levelno, record.getMessage()) == (level, message)
