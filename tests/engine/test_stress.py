"""Random requests in the smallest pool that can run them, some of them held to a constraint, with cancellations and
loads that fail or are corrupt. No request is lost or answered wrongly, and no row or block leaks; checked after every
step.
"""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.errors import IntegrityError
from loray.methods.weights import AdapterWeights, LoraWeights, VeraWeights
from loray.spec import AdapterRef, Constraint, GenerateRequest
from tests.engine.adapters import TestAdapter
from tests.engine.harness import fill_up, make_engine, request, run
from tests.engine.scheduling.simulation import no_backoff

# Most of the first one's tokens are forced, and none of the second's.
COMPACT = {"type": "array", "items": {"enum": ["a long word", {"key": None}]}, "minItems": 1}
CONSTRAINTS = [None, Constraint.from_schema(COMPACT, whitespace=""), None, Constraint.from_regex("[a-z ]{5,90}"), None]
BLOCK_TOKENS = 4
BLOCK_BYTES = 2 * 2 * BLOCK_TOKENS * 2 * 16 * 4  # layers, K and V, tokens, heads, d, fp32


def cases(adapters: dict[str, TestAdapter], max_tokens: int) -> list[GenerateRequest]:
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


def smallest_pool(base: BaseModel, adapters: dict[str, TestAdapter], requests: list[GenerateRequest]) -> int:
    """Bytes that hold the largest request and its adapter."""
    engine = make_engine(base, list(adapters.values()), block_tokens=BLOCK_TOKENS)
    run(engine, [request(name, [1], adapter, max_tokens=1) for name, adapter in adapters.items()])
    kv = max(-(-(len(r.prompt_ids) + r.params.max_tokens) // BLOCK_TOKENS) for r in requests)
    return BLOCK_BYTES * (kv + max(engine._loads.num_blocks(a.ref.digest) or 0 for a in adapters.values()))


class Store:
    """Loads adapters; sometimes it fails, or the adapter is damaged."""

    def __init__(self, base: BaseModel, adapters: dict[str, TestAdapter]) -> None:
        self.base, self.rng = base, random.Random(1)
        self.weights = {a.ref.digest: a.load(base) for a in adapters.values()}
        self.lock = threading.Lock()
        self.num_failures = 0

    def __call__(self, ref: AdapterRef) -> AdapterWeights:
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
        return weights


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
    base: BaseModel, adapters: dict[str, TestAdapter], num_requests: int, max_tokens: int
) -> None:
    kinds = cases(adapters, max_tokens)
    reference = make_engine(base, list(adapters.values()), block_tokens=BLOCK_TOKENS, enable_prefix_caching=False)
    expected: dict[str, list[int]] = {}
    for r in kinds:
        expected |= run(reference, [r])
    engine = make_engine(
        base,
        block_tokens=BLOCK_TOKENS,
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
    num_blocks = engine.pool.geometry.num_blocks
    engine.scheduler.prefix_cache.evict(num_blocks)
    while engine.adapter_manager.evict_one():
        pass
    assert engine.pool.allocator.num_free == num_blocks
