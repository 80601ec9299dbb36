"""A base whose layers all have a window: what is behind it is given up, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.request import TokenOutput
from tests.fixtures.engines import BLOCK_BYTES, Spy, empty, ids, make_engine, outputs, request, run
from tests.fixtures.peft_adapters import ALL, Oracle, TestAdapter, make_adapters

WINDOW, BLOCK = 24, 4  # tokens
SPEC: dict[str, Any] = {"block_tokens": BLOCK, "max_num_batched_tokens": 40}


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base("MistralForCausalLM", sliding_window=WINDOW)


@pytest.fixture(scope="module")
def adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[TestAdapter]:
    configs = {
        "lora": (LoraConfig(r=8, target_modules=ALL), None),
        "vera": (VeraConfig(r=16, target_modules=["q_proj", "v_proj"], save_projection=False), None),
    }
    return make_adapters(base, tmp_path_factory.mktemp("adapters"), configs)


def most_kv(engine: Engine, *requests: Any) -> list[int]:
    """KV blocks in use after each step, those that the prefix cache keeps included."""
    return [engine.pool.allocator.occupancy().kv for _ in outputs(engine, *requests)]


def preempt_now_and_then(engine: Engine) -> None:
    """The last of those that decode, every 20 steps."""
    step = engine.step
    numbers = count(1)

    def preempting() -> list[TokenOutput]:
        running = engine.scheduler.running
        if next(numbers) % 20 == 0 and running and not engine.scheduler.waiting.begun:
            engine.scheduler.preempt(running[-1])
        return step()

    engine.step = preempting  # type: ignore[method-assign]


@pytest.mark.parametrize("cached", [False, True], ids=["alone", "with a prefix cache"])
def test_a_long_answer_takes_a_windows_blocks(base: BaseModel, cached: bool) -> None:
    engine = make_engine(base, enable_prefix_caching=cached, **SPEC)
    used = most_kv(engine, request("a", ids(5), max_tokens=200))
    window = WINDOW // BLOCK + 2
    assert max(used) <= window * (2 if cached else 1)
    assert engine.scheduler.prefix_cache.num_idle == (WINDOW // BLOCK if cached else 0)
    empty(engine)


@pytest.mark.parametrize("mode", ["alone", "together", "preempted", "a prefix is known"])
def test_logits_are_those_of_peft_far_behind_the_window(
    base: BaseModel, adapters: list[TestAdapter], mode: str
) -> None:
    engine = make_engine(base, adapters, **SPEC)
    if mode == "preempted":
        preempt_now_and_then(engine)
    models, prompt = [None, *adapters], ids(70)
    prompts = [[*prompt, *ids(10 * i, seed=i)] for i in range(len(models))]
    if mode == "a prefix is known":
        run(engine, [request(f"before {i}", prompt, a, max_tokens=1) for i, a in enumerate(models)])
    spy, jobs = Spy(engine), [request(str(i), prompts[i], a, max_tokens=50) for i, a in enumerate(models)]
    tokens = run(engine, jobs, together=True) if mode != "alone" else {}
    for job in jobs if mode == "alone" else ():
        tokens |= run(engine, [job])
    if mode == "preempted":
        assert engine.stats().num_preemptions > 2
    if mode == "a prefix is known":
        assert engine.stats().prefix_cache_hits == len(models) * WINDOW
    oracle = Oracle(base, adapters)
    for i, adapter in enumerate(models):
        expected = oracle.logits([*prompts[i], *tokens[str(i)]][:-1], adapter)[len(prompts[i]) - 1 :]
        torch.testing.assert_close(torch.stack(spy.logits[str(i)]), expected, atol=1e-4, rtol=1e-4)
    empty(engine)


def test_a_request_longer_than_the_pool_runs_where_its_window_fits(base: BaseModel, tmp_path: Path) -> None:
    num_blocks = 2 * WINDOW // BLOCK + 4
    engine = make_engine(base, pool_bytes=num_blocks * BLOCK_BYTES * BLOCK // 16, **SPEC)
    out = run(engine, [request("a", ids(10), max_tokens=300)])
    assert len(out["a"]) == 300
    assert engine.stats().num_preemptions == 0
