"""In whatever way the engine runs a request, its logits are those of transformers + PEFT, in fp32 and with strong
adapters, and in the smallest pool, with cancellations and loads that fail, none is lost or answered wrongly.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.metrics import EngineStats
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.errors import IntegrityError
from loray.methods.vera import VeraWeights
from loray.methods.weights import LoraWeights
from loray.spec import AdapterRef, Constraint, GenerateRequest, RopeParameters
from tests.fixtures.engines import BLOCK_BYTES, Spy, empty, fill_up, make_engine, request, run
from tests.fixtures.peft_adapters import (
    ALL,
    ATTENTION,
    LINEAR_ROPE,
    NORMS,
    Adapters,
    Oracle,
    TestAdapter,
    make_adapters,
)
from tests.fixtures.scheduling import no_backoff

NUM_TOKENS = 20
INVOCATION = [300, 301]  # no prompt has these tokens otherwise
INVOKED: dict[str, Any] = {"lora_alpha": 32, "alora_invocation_tokens": INVOCATION}
Case = tuple[BaseModel, list[TestAdapter], Oracle]


@pytest.fixture(scope="module")
def case(tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Case:
    base = tiny_base()
    configs: dict[str, tuple[Any, RopeParameters | None]] = {
        "r16": (LoraConfig(r=16, lora_alpha=32, target_modules=ALL), None),
        "r3": (LoraConfig(r=3, lora_alpha=24, target_modules=["q_proj", "v_proj"]), None),
        "vera": (VeraConfig(r=32, target_modules=["q_proj", "v_proj"], save_projection=False), None),
        "rows": (LoraConfig(r=8, target_modules=ATTENTION, modules_to_save=["embed_tokens", *NORMS]), LINEAR_ROPE),
        "alora": (LoraConfig(r=16, target_modules=ALL, task_type="CAUSAL_LM", **INVOKED), None),
    }
    adapters = make_adapters(base, tmp_path_factory.mktemp("adapters"), configs, std=0.05)
    return base, adapters, Oracle(base, adapters)


MODES: dict[str, tuple[dict[str, Any], Callable[[EngineStats], bool]]] = {
    "batched": ({}, lambda s: s.max_adapters_in_step == 5),
    "chunks of 24": ({"max_num_batched_tokens": 24, "max_num_seqs": 8}, lambda s: s.num_steps > 50),
    "chunks of 7": ({"max_num_batched_tokens": 7, "max_num_seqs": 3}, lambda s: s.num_steps > 150),
    "preempted": (
        {"pool_bytes": 30 * BLOCK_BYTES, "max_num_batched_tokens": 64, "enable_prefix_caching": False},
        lambda s: s.num_preemptions > 0 and s.num_evictions > 0,
    ),
    "preempted, cached": (
        {"pool_bytes": 30 * BLOCK_BYTES, "max_num_batched_tokens": 64},
        lambda s: s.num_preemptions > 0 and s.prefix_cache_hits > 0,
    ),
    "prefix-cached": ({"max_num_seqs": 6}, lambda s: s.prefix_cache_hits > 0),
}


@pytest.mark.parametrize("seed", [0, 1], ids=["one order", "another order"])
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_peft_in_every_mode(case: Case, mode: str, seed: int) -> None:
    base, adapters, oracle = case
    spec, happened = MODES[mode]
    rng = random.Random(seed)
    system = [rng.randrange(256) for _ in range(40)]  # shared, so that the prefix cache has something to find
    models = [None, *adapters]
    jobs = {}
    for i in range(4 * len(models)):
        shared, own = system[: rng.choice((0, 16, 40))], [rng.randrange(256) for _ in range(rng.randint(1, 30))]
        adapter = models[i % len(models)]
        invocation = [] if adapter is None or adapter.ref.invocation_tokens is None else INVOCATION
        jobs[str(i)] = ([*shared, *invocation, *own], adapter)
    requests = [request(name, ids, adapter, max_tokens=NUM_TOKENS) for name, (ids, adapter) in jobs.items()]
    rng.shuffle(requests)
    engine = make_engine(base, adapters, max_model_len=128, **spec)
    if "preempted" in mode:
        fill_up(engine)
    spy = Spy(engine)
    tokens = run(engine, requests, together=True)  # so that the order is the same on every machine
    stats = engine.stats()
    assert happened(stats), (stats.num_steps, stats.num_preemptions, stats.num_evictions, stats.prefix_cache_hits)
    close = 0
    for name, (ids, adapter) in jobs.items():
        expected = oracle.logits([*ids, *tokens[name]][:-1], adapter)[len(ids) - 1 :]
        got = torch.stack(spy.logits[name])
        assert got.shape[0] == NUM_TOKENS
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
        best = expected.topk(2)
        is_close = best.values[:, 0] - best.values[:, 1] < 2e-3
        close += int(is_close.sum())
        assert (is_close | (best.indices[:, 0] == torch.tensor(tokens[name]))).all()
    assert close <= 0.01 * len(jobs) * NUM_TOKENS


def test_every_adapter_changes_what_is_said(case: Case) -> None:
    """Otherwise a wrong adapter would pass the tests above."""
    base, adapters, _ = case
    prompt = [*range(30), *INVOCATION]
    out = run(make_engine(base, adapters), [request(str(i), prompt, a) for i, a in enumerate([None, *adapters])])
    assert len({tuple(tokens) for tokens in out.values()}) == len(out)


# Most of the first one's tokens are forced, and none of the second's.
COMPACT = {"type": "array", "items": {"enum": ["a long word", {"key": None}]}, "minItems": 1}
CONSTRAINTS = [None, Constraint.from_schema(COMPACT, whitespace=""), None, Constraint.from_regex("[a-z ]{5,90}"), None]
SMALL_BLOCK = 4  # tokens
SMALL_BLOCK_BYTES = 2 * 2 * SMALL_BLOCK * 2 * 16 * 4  # layers, K and V, tokens, heads, d, fp32


def cases(adapters: Adapters, max_tokens: int) -> list[GenerateRequest]:
    """Prompts of one to ten blocks, most of which have common prefixes, for every adapter and the base."""
    rng = random.Random(0)
    system = [[rng.randrange(256) for _ in range(24)] for _ in range(2)]
    models = [None, *adapters.values()]
    return [
        request(
            str(i),
            system[i % 2][: rng.choice([0, 16, 24])] + [rng.randrange(256) for _ in range(rng.randint(1, 15))],
            models[i % len(models)],
            max_tokens=rng.randint(1, max_tokens),
            structured=CONSTRAINTS[i % len(CONSTRAINTS)],
        )
        for i in range(8 * len(models))
    ]


def smallest_pool(base: BaseModel, adapters: Adapters, requests: list[GenerateRequest]) -> int:
    """Bytes that hold the largest request and its adapter."""
    engine = make_engine(base, list(adapters.values()), block_tokens=SMALL_BLOCK)
    run(engine, [request(name, [1], adapter, max_tokens=1) for name, adapter in adapters.items()])
    kv = max(-(-(len(r.prompt_ids) + r.params.max_tokens) // SMALL_BLOCK) for r in requests)
    return SMALL_BLOCK_BYTES * (kv + max(engine._loads.num_blocks(a.ref.digest) or 0 for a in adapters.values()))


class Store:
    """Loads adapters; sometimes it fails, or the adapter is damaged."""

    def __init__(self, base: BaseModel, adapters: Adapters) -> None:
        self.base, self.rng = base, random.Random(1)
        self.weights = {a.ref.digest: a.load(base) for a in adapters.values()}
        self.lock = threading.Lock()
        self.num_failures = 0

    def __call__(self, ref: AdapterRef, packer: Packer) -> PackedAdapter:
        with self.lock:
            luck = self.rng.random()
            self.num_failures += luck < 0.1
        if luck < 0.05:
            raise OSError(f"{ref.label} cannot be read")
        weights = self.weights[ref.digest]
        if luck < 0.1:
            key, module = next(iter(weights.modules.items()))
            if isinstance(module, LoraWeights):
                damaged: LoraWeights | VeraWeights = replace(module, b_OR=module.b_OR * torch.nan)
            else:
                damaged = replace(module, b_O=module.b_O * torch.nan)
            weights = replace(weights, modules={**weights.modules, key: damaged})
        return packer.pack(weights)


def live(
    engine: Engine, requests: list[GenerateRequest], expected: dict[str, list[int]], rng: random.Random
) -> dict[str, int]:
    """Runs all of `requests`, at most 16 at once, and counts how they ended. Ids are `case.number`."""
    woken = threading.Event()
    engine.wake = woken.set
    ended = {"finished": 0, "failed": 0, "cancelled": 0}
    under_way: dict[str, list[int]] = {}
    waiting = iter(requests)
    more = True
    while more or under_way:
        while more and len(under_way) < 16:
            r = next(waiting, None)
            more = r is not None
            if r is not None:
                engine.add(r)
                under_way[r.request_id] = []
        woken.clear()
        for out in engine.step():
            tokens = under_way[out.request_id]
            if out.error is not None:
                assert isinstance(out.error, (IntegrityError, OSError)), out.error
                ended["failed"] += 1
                del under_way[out.request_id]
                continue
            assert out.token_id is not None
            tokens.append(out.token_id)
            whole = expected[out.request_id.split(".")[0]]
            assert tokens == whole[: len(tokens)]
            if out.finish_reason is not None:
                assert tokens == whole
                ended["finished"] += 1
                del under_way[out.request_id]
        engine.check_integrity()
        if under_way and rng.random() < 0.02:
            victim = rng.choice(sorted(under_way))
            engine.cancel(victim)
            ended["cancelled"] += 1
            del under_way[victim]
            engine.check_integrity()
        if engine.idle and under_way:
            assert woken.wait(60), f"nothing is under way: {engine.stats()}"
    assert not engine.has_work
    return ended


@pytest.mark.parametrize(("num_requests", "max_tokens"), [(300, 9), pytest.param(10_000, 3, marks=pytest.mark.slow)])
def test_none_lost_none_wrong_nothing_leaked(
    base: BaseModel, adapters: Adapters, num_requests: int, max_tokens: int
) -> None:
    kinds = cases(adapters, max_tokens)
    reference = make_engine(base, list(adapters.values()), block_tokens=SMALL_BLOCK, enable_prefix_caching=False)
    expected: dict[str, list[int]] = {}
    for r in kinds:
        expected |= run(reference, [r])
    engine = make_engine(
        base,
        block_tokens=SMALL_BLOCK,
        pool_bytes=smallest_pool(base, adapters, kinds),
        host_bytes=60_000,
        max_num_batched_tokens=32,
        max_num_seqs=16,
    )
    fill_up(engine)
    store = Store(base, adapters)
    engine._loads._load = store
    engine.adapter_manager._backoff = no_backoff()
    rng = random.Random(2)
    requests = []
    for i in range(num_requests):
        r = rng.choice(kinds)
        requests.append(GenerateRequest(f"{r.request_id}.{i}", r.prompt_ids, r.params, r.adapter))
    ended = live(engine, requests, expected, rng)
    assert sum(ended.values()) == num_requests
    assert store.num_failures > 0
    assert ended["failed"] > 0
    assert ended["cancelled"] > 0
    stats = engine.stats()
    assert stats.num_evictions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.num_preemptions > 0
    empty(engine)
