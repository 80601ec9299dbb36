"""Prefill on an adapter that is not complete yet: the same tokens, none sent before the adapter is verified, and other
requests undisturbed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.engine.memory.adapter_manager import Tier
from loray.engine.memory.partial import PartialLoad
from loray.engine.model.partial import PartialAdapters
from loray.engine.pool.loader import LoadProgress
from loray.engine.pool.packed import PackedAdapter, Packer, Packing
from loray.engine.request import TokenOutput
from loray.errors import IntegrityError
from loray.spec import AdapterRef, GenerateRequest
from tests.fixtures.engines import make_engine, request, run
from tests.fixtures.peft_adapters import Adapters, TestAdapter

PROMPT = tuple(range(30, 60))


class Scripted(PartialLoad):
    """Time that passes while the engine waits: `layer(n)` before it has waited for n layers, `end()` for the rest."""

    def __init__(self, layer: Callable[[int], None], end: Callable[[], None]) -> None:
        super().__init__()
        self.layer, self.end = layer, end
        self.waited: list[int] = []

    def wait_for_layers(self, num_layers: int, timeout_s: float) -> int:
        self.waited.append(num_layers)
        self.layer(num_layers)
        return super().wait_for_layers(num_layers, 0.0)

    def wait(self, timeout_s: float) -> bool:
        self.end()
        return super().wait(0.0)


class Load:
    """An adapter of which only the shapes are known: its values are NaN until `bring` gives them, layer by layer."""

    def __init__(self, adapter: TestAdapter, base: BaseModel) -> None:
        self._weights, self._num_layers = adapter.load(base), base.config.num_layers
        self.partial = Scripted(self.bring, lambda: self.partial.finish())
        self._packing: Packing | None = None
        self.taken = 0

    def pack(self, packer: Packer, progress: LoadProgress) -> PackedAdapter:
        self._packing = Packing(packer, self._weights, self.partial)
        for rows in self._packing.packed.layered:
            rows.fill_(torch.nan)
        return self._packing.packed

    def bring(self, num_layers: int) -> None:
        assert self._packing is not None
        self._packing.take(range(self.taken, num_layers))
        self.taken = max(self.taken, num_layers)
        self.partial.advance(self.taken)

    def bring_all(self) -> None:
        self.bring(self._num_layers)
        self.partial.finish()


class Scene:
    """An engine whose adapter "r5" comes by a `Load`, with a request on it, one on "r8" and one on the base."""

    def __init__(self, base: BaseModel, adapters: Adapters) -> None:
        self.cold, self.warm = adapters["r5"], adapters["r8"]
        self.load = Load(self.cold, base)
        models = {"cold": self.cold, "warm": self.warm, "base": None}
        self.requests = [request(name, PROMPT, own, max_tokens=4) for name, own in models.items()]
        self.expected = run(make_engine(base, list(adapters.values())), self.requests)
        self.engine = make_engine(base, list(adapters.values()))
        run(self.engine, [request("before", PROMPT, self.warm, max_tokens=1)])
        others = self.engine._loads._load
        self.engine._loads._load = lambda ref: self.load if ref.digest == self.cold.ref.digest else others(ref)
        self.got: dict[str, list[TokenOutput]] = {}
        for r in self.requests[1:]:
            self.engine.add(r)
        self.add_cold()

    def add_cold(self) -> None:
        self.engine.add(self.requests[0])
        self.engine.adapter_manager.poll()
        entry = self.engine.adapter_manager.table.entries[self.cold.ref.digest]
        if entry.load is not None:
            entry.load.exception(60)  # it is usable

    def step(self) -> None:
        for out in self.engine.step():
            self.got.setdefault(out.request_id, []).append(out)
        self.engine.check_integrity()

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()

    def tokens(self, of: Sequence[GenerateRequest]) -> dict[str, list[int | None]]:
        return {r.request_id: [out.token_id for out in self.got[r.request_id]] for r in of}


@pytest.fixture
def scene(base: BaseModel, adapters: Adapters) -> Scene:
    return Scene(base, adapters)


def test_layers_that_come_in_time_are_waited_for_one_by_one(scene: Scene) -> None:
    scene.step()
    assert scene.load.partial.waited == [1, 2]
    assert len(scene.got["cold"]) == 1
    scene.finish()
    assert scene.load.partial.waited == [1, 2]  # complete from then on
    assert scene.tokens(scene.requests) == scene.expected
    assert sum(scene.engine.stats().load_seconds.counts) == 2


@pytest.mark.parametrize("missing", ["a layer", "the verification"])
def test_what_comes_late_holds_back_its_own_requests_alone(scene: Scene, missing: str) -> None:
    partial = scene.load.partial
    if missing == "a layer":
        partial.layer = lambda num_layers: scene.load.bring(1) if num_layers == 1 else None
    partial.end = lambda: None
    for _ in range(3):
        scene.step()
    assert partial.waited == [1, 2]  # in the first step; later ones leave it out
    assert "cold" not in scene.got
    assert [len(scene.got[name]) for name in ("warm", "base")] == [3, 3]
    assert scene.engine.adapter_manager.table.tier(scene.cold.ref) is Tier.LOADING
    scene.load.bring_all()
    scene.finish()
    assert scene.tokens(scene.requests) == scene.expected


@pytest.mark.parametrize("moment", ["between layers", "at the end", "after a step that did not wait"])
def test_what_was_not_published_is_never_sent(scene: Scene, moment: str) -> None:
    partial = scene.load.partial

    def fail() -> None:
        partial.fail(IntegrityError("damaged"))

    partial.end = lambda: None
    if moment == "between layers":
        partial.layer = lambda num_layers: scene.load.bring(1) if num_layers == 1 else fail()
    elif moment == "at the end":
        partial.end = fail
    scene.step()
    if moment == "after a step that did not wait":
        fail()
    assert "cold" not in scene.got
    scene.finish()
    (out,) = scene.got["cold"]
    assert out.token_id is None
    assert isinstance(out.error, IntegrityError)
    assert scene.tokens(scene.requests[1:]) == {name: scene.expected[name] for name in ("warm", "base")}
    assert scene.engine.stats().num_failed_loads == 1
    scene.engine.adapter_manager._backoff.succeeded(scene.cold.ref.digest)
    scene.load = Load(scene.cold, scene.engine.base)  # and may be tried again later
    scene.got.clear()
    scene.add_cold()
    scene.finish()
    assert scene.tokens(scene.requests[:1]) == {"cold": scene.expected["cold"]}


def test_cancelled_in_the_middle(scene: Scene) -> None:
    scene.load.partial.end = lambda: None
    scene.step()
    scene.engine.cancel("cold")
    scene.finish()
    scene.load.bring_all()
    scene.engine.step()
    scene.engine.check_integrity()
    assert scene.engine.stats().adapters_in_pool.count(scene.cold.ref.digest) == 1


class Chances:
    """Loads in which each wait may find nothing, or an error, and that are complete some steps later."""

    def __init__(self, base: BaseModel, adapters: Adapters, seed: int) -> None:
        self._base, self._rng = base, random.Random(seed)
        self._by_digest = {a.ref.digest: a for a in adapters.values()}
        self.unfinished: list[Load] = []
        self.num_failed = 0

    def load(self, ref: AdapterRef) -> Load:
        load = Load(self._by_digest[ref.digest], self._base)
        bring, finish = load.partial.layer, load.partial.end
        load.partial.layer = lambda num_layers: self._perhaps(load, lambda: bring(num_layers))
        load.partial.end = lambda: self._perhaps(load, finish)
        self.unfinished.append(load)
        return load

    def _perhaps(self, load: Load, come: Callable[[], None]) -> None:
        chance = self._rng.random()
        if load.partial.done or chance < 0.2:
            return
        if chance < 0.25:
            self.num_failed += 1
            load.partial.fail(IntegrityError("damaged"))
        else:
            come()

    def pass_time(self) -> None:
        for load in self.unfinished:
            if load.partial.waited and not load.partial.done and self._rng.random() < 0.3:
                load.bring_all()
        self.unfinished = [load for load in self.unfinished if not load.partial.done]


@pytest.mark.parametrize("seed", range(3))
def test_many_at_once_with_any_delays(base: BaseModel, adapters: Adapters, seed: int) -> None:
    """Preempted, evicted, late, failed: every request gets the right tokens, or an error."""
    models = [None, *adapters.values()]
    requests = [
        request(str(i), PROMPT[: 5 + 7 * i % 25], models[i % len(models)], max_tokens=6) for i in range(5 * len(models))
    ]
    expected = run(make_engine(base, list(adapters.values())), requests)
    engine = make_engine(base, pool_bytes=20 << 13, max_num_batched_tokens=48, host_bytes=1)
    chances = Chances(base, adapters, seed)
    engine._loads._load = chances.load
    got: dict[str, list[int]] = {r.request_id: [] for r in requests}
    failed: set[str] = set()
    waiting, live = list(requests), 0
    while waiting or engine.has_work:
        while waiting and live < 4:  # few, so that the adapters of others are let go and come anew
            engine.add(waiting.pop(0))
            live += 1
        for out in engine.step():
            live -= bool(out.error or out.finish_reason)
            if out.error is not None:
                assert isinstance(out.error, IntegrityError)
                assert out.request_id not in failed
                failed.add(out.request_id)
            else:
                assert out.token_id is not None
                got[out.request_id].append(out.token_id)
        engine.check_integrity()
        chances.pass_time()
        if engine.idle:
            time.sleep(0.001)  # the threads that load need the interpreter
    assert {name: tokens for name, tokens in got.items() if name not in failed} == {
        name: tokens for name, tokens in expected.items() if name not in failed
    }
    assert bool(failed) == bool(chances.num_failed)
    assert all(r.adapter is not None for r in requests if r.request_id in failed)


def test_a_step_waits_no_longer_than_it_may_in_all() -> None:
    """The waits of layers and of the end share one allowance."""
    now, allowed = 0.0, []

    class Slow(PartialLoad):
        def wait_for_layers(self, num_layers: int, timeout_s: float) -> int:
            nonlocal now
            allowed.append(round(timeout_s, 6))
            now += 0.02
            return num_layers

        def wait(self, timeout_s: float) -> bool:
            allowed.append(round(timeout_s, 6))
            return False

    some = SimpleNamespace
    pool: Any = some(geometry=some(num_layers=2), take=lambda adapter, n: setattr(adapter, "num_layers", n))
    adapter: Any = some(num_layers=0, pending=some(partial=Slow()), ref=some(digest="a"))
    adapters = PartialAdapters(pool, [adapter], max_wait_s=0.03, clock=lambda: now)
    for layer in range(2):
        adapters.wait_for_layer(layer)
    assert adapters._incomplete() == {"a"}
    assert allowed == [0.03, 0.01, 0.0]
