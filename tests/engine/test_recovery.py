"""Steps that need more memory than the device has: each fails its largest request, the others' texts are exact, and
nothing leaks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.engine.engine import Engine, undo_step
from loray.engine.request import Chunk
from loray.errors import EngineError
from loray.spec import GenerateRequest
from tests.engine.adapters import TestAdapter
from tests.engine.harness import make_engine, request, run

Fails = Callable[[Sequence[Chunk]], bool]


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def out_of_memory(engine: Engine, fails: Fails, where: str) -> list[int]:
    """From now on steps for which `fails` is true run out of memory in `where`: the model's pass or the sampler.
    Returns the list of their numbers of chunks.
    """
    batch, chunks, failed = engine._model.batch, list[Chunk](), list[int]()

    def batched(planned: Sequence[Chunk], *arguments: Any) -> Any:
        chunks[:] = planned
        return batch(planned, *arguments)

    owner, name = (engine._model, "forward") if where == "forward" else (engine._runner, "_sampler")
    run_it = getattr(owner, name)

    def perhaps(*arguments: Any) -> Any:
        result = run_it(*arguments)
        if fails(chunks):
            failed.append(len(chunks))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return result

    engine._model.batch = batched  # type: ignore[method-assign,assignment]
    setattr(owner, name, perhaps)
    return failed


def outcomes(engine: Engine, requests: Sequence[GenerateRequest]) -> tuple[dict[str, list[int]], dict[str, Exception]]:
    """Tokens and errors by request. Afterwards the pool is as empty as before."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    errors: dict[str, Exception] = {}
    for r in requests:
        engine.add(r)
    while engine.has_work:
        for out in engine.step():
            if out.error is not None:
                errors[out.request_id] = out.error
            else:
                assert out.token_id is not None
                tokens[out.request_id].append(out.token_id)
        engine.check_integrity()
    assert not engine._requests
    engine.scheduler.prefix_cache.evict(1 << 20)
    while engine.adapter_manager.evict_one():
        pass
    engine.check_integrity()
    assert engine.pool.allocator.num_free == engine.pool.geometry.num_blocks
    return tokens, errors


def requests_of(adapter: TestAdapter) -> list[GenerateRequest]:
    return [
        request("base", ids(9, 1), max_tokens=20),
        request("long", ids(200, 2), max_tokens=4),
        request("adapter", ids(21, 3), adapter, max_tokens=18),
        request("penalties", ids(17, 4), max_tokens=16, repetition_penalty=1.3, frequency_penalty=0.4),
        request("drawn", ids(12, 5), max_tokens=22, temperature=1.0, seed=3, top_k=30),
    ]


@pytest.mark.parametrize("where", ["forward", "sampler"])
@pytest.mark.parametrize("caching", [True, False])
def test_the_largest_prompt_fails_and_the_others_texts_are_exact(
    base: BaseModel, adapters: dict[str, TestAdapter], where: str, caching: bool
) -> None:
    requests = requests_of(adapters["r5"])
    expected = {r.request_id: run(make_engine(base, [adapters["r5"]]), [r])[r.request_id] for r in requests}
    engine = make_engine(base, [adapters["r5"]], max_num_batched_tokens=128, enable_prefix_caching=caching)
    failed = out_of_memory(engine, lambda chunks: any(c.num_tokens > 60 for c in chunks), where)
    tokens, errors = outcomes(engine, requests)
    assert len(failed) == 1
    assert [*errors] == ["long"]
    assert isinstance(errors["long"], EngineError)
    assert "the step needed more memory than the device has; this request had the most of its" in str(errors["long"])
    assert tokens.pop("long") == []
    assert tokens == {name: expected[name] for name in tokens}


@pytest.mark.parametrize("where", ["forward", "sampler"])
def test_a_decode_step_fails_the_longest_request(base: BaseModel, where: str) -> None:
    requests = [request(str(i), ids(5 + 10 * i, i), max_tokens=12 + i, repetition_penalty=1.2) for i in range(4)]
    expected = {r.request_id: run(make_engine(base), [r])[r.request_id] for r in requests}
    engine = make_engine(base)
    decoded: list[int] = []

    def fails(chunks: Sequence[Chunk]) -> bool:
        if all(c.num_tokens == 1 for c in chunks):
            decoded.append(len(chunks))
        return len(decoded) in (5, 6)

    assert out_of_memory(engine, fails, where) == []
    tokens, errors = outcomes(engine, requests)
    assert [*errors] == ["3", "2"]
    assert decoded[4:6] == [4, 3]
    for name in "01":
        assert tokens[name] == expected[name]
    for name in errors:
        assert tokens[name] == expected[name][: len(tokens[name])]


def test_each_of_several_steps_in_a_row_fails_one_request_and_the_last_fails_alone(base: BaseModel) -> None:
    engine = make_engine(base)
    low = [True]
    failed = out_of_memory(engine, lambda chunks: low[0], "forward")
    _, errors = outcomes(engine, [request(str(i), ids(5 + i, i)) for i in range(3)])
    assert [*errors] == ["2", "1", "0"]
    assert len(failed) == 3
    low[0] = False
    after = request("after", ids(9))
    tokens, errors = outcomes(engine, [after])
    assert not errors
    assert tokens == run(make_engine(base), [after])


def test_a_stream_goes_on(base: BaseModel) -> None:
    engine = make_engine(base, num_threads=1)
    low = [True]
    out_of_memory(engine, lambda chunks: low[0], "forward")
    stream = AsyncEngine(engine)
    stream.start()

    async def tokens(r: GenerateRequest) -> list[int]:
        return [t async for delta in stream.generate(r) for t in delta.token_ids]

    async def test() -> list[int]:
        with pytest.raises(EngineError, match="more memory than the device has"):
            await tokens(request("first", ids(9)))
        low[0] = False
        stream.check_health()
        return await tokens(request("second", ids(9)))

    try:
        got = asyncio.run(asyncio.wait_for(test(), timeout=60))
    finally:
        stream.stop()
    assert got == run(make_engine(base), [request("second", ids(9))])["second"]


@pytest.mark.parametrize("message", ["CUDA_ERROR_OUT_OF_MEMORY: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_libraries_without_an_error_of_their_own_are_understood(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    engine = make_engine(base)

    def forward(*arguments: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(engine._model, "forward", forward)
    assert [*outcomes(engine, [request("one", ids(5))])[1]] == ["one"]


def test_other_errors_of_a_step_are_the_engines(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(base)

    def forward(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine._model, "forward", forward)
    engine.add(request("one", ids(5)))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.step()


def test_where_no_request_is_left_to_end_the_error_is_the_engines(base: BaseModel) -> None:
    engine, error = make_engine(base), torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        undo_step(error, [], engine.scheduler, engine._model)
