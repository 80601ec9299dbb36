"""Prefixes that come back from host memory: the same bits, and what an engine keeps of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.memory.prefix_cache import HostTier
from loray.engine.pool.block_copies import TensorCopies
from tests.fixtures.engines import BLOCK_BYTES, Spy, empty, ids, make_engine, outputs, request
from tests.fixtures.peft_adapters import Adapters, TestAdapter

NUM_BLOCKS = 14  # of sixteen tokens, with an adapter's four


def tiered(base: BaseModel, adapters: list[TestAdapter], **spec: int) -> Engine:
    """An engine with a host tier, which a pool on a CPU has no use for."""
    engine = make_engine(base, adapters, pool_bytes=NUM_BLOCKS * BLOCK_BYTES, **spec)
    engine.scheduler.prefix_cache.host = HostTier(engine.adapter_manager.host, engine.pool.copies)
    return engine


def save_all(engine: Engine) -> None:
    cache = engine.scheduler.prefix_cache
    while cache._saving is not None or cache._unsaved:
        if cache._saving is not None:
            cache._saving[0].result(60)
        engine.step()
    engine.check_integrity()


def test_what_was_evicted_comes_back_with_the_same_logits(base: BaseModel, adapters: Adapters) -> None:
    adapter = adapters["r5"]
    asked = [(f"{i}", ids(70, i % 3), adapter if i % 3 == 1 else None) for i in range(9)]
    spies, cached = [], []
    for has_tier in (False, True):
        engine = tiered(base, [adapter])
        if not has_tier:
            engine.scheduler.prefix_cache.host = None
        spies.append(Spy(engine))
        for name, prompt, own in asked:
            out = [*outputs(engine, request(name, prompt, own, max_tokens=3))]
            cached.append(out[-1].num_cached_tokens)
            save_all(engine)
            engine.scheduler.prefix_cache.evict(NUM_BLOCKS)
            engine.check_integrity()
    assert cached == [0] * 9 + [0] * 3 + [64] * 6
    for name, expected in spies[0].logits.items():
        assert torch.equal(torch.stack(spies[1].logits[name]), torch.stack(expected))
    assert engine.stats().host_bytes > 0
    empty(engine)


def test_only_what_the_pool_lacks_comes_back_and_requests_share_it(base: BaseModel) -> None:
    engine = tiered(base, [])
    first = [*outputs(engine, request("first", ids(70), max_tokens=30))]
    assert len(first) == 30
    save_all(engine)
    engine.scheduler.prefix_cache.evict(3)  # the end of six blocks
    again = [request(name, [*ids(70), *(out.token_id or 0 for out in first)], max_tokens=1) for name in "ab"]
    found = {out.request_id: out.num_cached_tokens for out in outputs(engine, *again)}
    assert found == {"a": 96, "b": 96}
    assert len(engine.scheduler.prefix_cache.blocks()) == 6


def test_another_adapter_and_another_salt_find_nothing(base: BaseModel, adapters: Adapters) -> None:
    engine = tiered(base, [*adapters.values()])
    for i, own in enumerate((None, adapters["r2"], adapters["r5"])):
        (out,) = outputs(engine, request(f"{i}", ids(40), own, max_tokens=1))
        assert out.num_cached_tokens == 0
        save_all(engine)
        engine.scheduler.prefix_cache.evict(NUM_BLOCKS)
    engine.scheduler.prefix_cache.forget(adapters["r2"].ref.digest)
    again = [("r2", adapters["r2"]), ("r5", adapters["r5"]), ("base", None)]
    found = {
        name: out.num_cached_tokens
        for name, own in again
        for out in outputs(engine, request(name, ids(40), own, max_tokens=1))
    }
    assert found == {"r2": 0, "r5": 32, "base": 32}


def test_the_host_keeps_within_its_bytes(base: BaseModel) -> None:
    engine = tiered(base, [], host_bytes=5 * BLOCK_BYTES)
    for i in range(6):
        [*outputs(engine, request(f"{i}", ids(40 + 16 * i, i), max_tokens=1))]
        save_all(engine)
        engine.step()  # drops what is too much
        assert engine.adapter_manager.host_used <= 5 * BLOCK_BYTES


def test_a_copy_that_fails_costs_a_prefix_and_nothing_else(base: BaseModel, caplog: pytest.LogCaptureFixture) -> None:
    engine = tiered(base, [])

    def failing(*arguments: object) -> list[torch.Tensor]:
        raise RuntimeError("no memory can be page-locked")

    engine.pool.copies._save = failing  # type: ignore[method-assign]
    assert isinstance(engine.pool.copies, TensorCopies)
    [*outputs(engine, request("a", ids(40), max_tokens=1))]
    cache = engine.scheduler.prefix_cache
    assert cache._saving is None or isinstance(cache._saving[0].exception(60), RuntimeError)
    engine.step()
    assert "not copied to host memory" in caplog.text
    assert engine.adapter_manager.host_used == 0
    (out,) = outputs(engine, request("b", ids(40), max_tokens=1))
    assert out.num_cached_tokens == 32


def test_an_engine_that_sleeps_is_told_of_copies(base: BaseModel) -> None:
    """Until it takes them, they keep the memory that a load may wait for."""
    engine, was_made = tiered(base, []), threading.Event()
    tier = engine.scheduler.prefix_cache.host
    assert tier is not None
    engine.scheduler.prefix_cache.host = tier._replace(wake=was_made.set)
    [*outputs(engine, request("a", ids(40), max_tokens=1))]
    engine.step()
    assert was_made.wait(60)
    save_all(engine)


class Stream:
    """In the place of CUDA's: what waits for what is written down, and copies are made at once."""

    def __init__(self, device: object = None) -> None:
        self.log: list[str] = []

    def wait_stream(self, other: object) -> None:
        self.log.append("waits for steps" if other == "steps" else "waits for copies")

    def wait_event(self, event: object) -> None:
        self.log.append("waits for what was computed")

    def synchronize(self) -> None:
        self.log.append("is waited for")


def test_steps_and_copies_wait_for_each_other_on_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = torch.arange(12.0)
    copies, steps = TensorCopies(pool, 4), Stream()
    copies._saves, copies._restores = saves, restores = Stream(), Stream()  # type: ignore[assignment]

    class Event:
        def record(self, stream: object) -> None:
            self.on = stream

        def query(self) -> bool:
            return False

    @contextmanager
    def within(stream: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: steps if copies._is_written else "steps")
    saved = copies.save([2, 0]).result(60)
    assert [values.tolist() for values in saved] == [[8.0, 9.0, 10.0, 11.0], [0.0, 1.0, 2.0, 3.0]]
    assert saves.log == ["waits for what was computed", "is waited for"]
    is_there = copies.restore({1: saved[0]})
    assert restores.log == ["waits for steps"]  # they may read what was there
    assert not is_there()
    assert pool[4:8].tolist() == [8.0, 9.0, 10.0, 11.0]
    for _ in range(2):
        copies.wait()
    assert steps.log == ["waits for copies"]
    copies.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_blocks_of_a_gpu_go_and_come_back() -> None:
    pool = torch.randn(1 << 20, device="cuda")
    want = pool.cpu().view(64, -1)
    copies = TensorCopies(pool, 1 << 14)
    saved = copies.save([3, 5]).result(60)
    assert all(values.is_pinned() for values in saved)
    copies.restore({10: saved[0], 11: saved[1]})
    copies.wait()
    got = pool.view(64, -1)[[10, 11]].clone()
    assert torch.equal(got.cpu(), want[[3, 5]])
    copies.close()
