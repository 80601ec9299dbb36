"""In whatever way the engine runs a request, its logits are those of transformers + PEFT, in fp32 and with strong
adapters. Teacher-forced: the reference is given what the engine has generated so far, position by position.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig

from loray.bases.registry import BaseModel
from loray.engine.metrics import EngineStats
from loray.spec import RopeParameters
from tests.engine.adapters import NORMS, Oracle, TestAdapter, make_adapter
from tests.engine.harness import Spy, fill_up, make_engine, request, run

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, d, fp32
NUM_TOKENS = 20
Case = tuple[BaseModel, list[TestAdapter], Oracle]


@pytest.fixture(scope="module")
def case(tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Case:
    base, folder = tiny_base(), tmp_path_factory.mktemp("adapters")
    rope = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2.0)
    configs: list[tuple[Any, RopeParameters | None]] = [
        (LoraConfig(r=16, lora_alpha=32, target_modules=ALL), None),
        (LoraConfig(r=3, lora_alpha=24, target_modules=["q_proj", "v_proj"]), None),
        (VeraConfig(r=32, target_modules=["q_proj", "v_proj"], save_projection=False), None),
        (LoraConfig(r=8, lora_alpha=16, target_modules=ALL[:4], modules_to_save=["embed_tokens", *NORMS]), rope),
    ]
    adapters = [make_adapter(base, folder / str(i), c, seed=i, rope=r, std=0.05) for i, (c, r) in enumerate(configs)]
    return base, adapters, Oracle(base, adapters)


MODES: dict[str, tuple[dict[str, Any], Callable[[EngineStats], bool]]] = {
    "batched": ({}, lambda s: s.max_adapters_in_step == 4),
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
        jobs[str(i)] = ([*shared, *own], models[i % len(models)])
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
    out = run(make_engine(base, adapters), [request(str(i), range(30), a) for i, a in enumerate([None, *adapters])])
    assert len({tuple(tokens) for tokens in out.values()}) == len(out)
