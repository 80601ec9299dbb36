"""The pool in the engine: shared and dropped prefixes, runs; logits stay the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.request import TokenOutput
from loray.errors import IntegrityError
from loray.methods.weights import AdapterWeights, LoraWeights
from loray.spec import AdapterRef, GenerateRequest
from tests.engine.adapters import TestAdapter
from tests.engine.harness import Spy, fill_up, make_engine, request, run, submit

BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, d, fp32


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def outputs_of(engine: Engine, *requests: GenerateRequest) -> list[TokenOutput]:
    for r in requests:
        engine.add(r)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.check_integrity()
    return outputs


def test_a_shared_system_prompt_is_computed_once(base: BaseModel) -> None:
    """Three blocks of sixteen tokens, and five tokens for each user."""
    system = ids(48)
    engine = make_engine(base)
    cached = [
        outputs_of(engine, request(str(i), system + ids(5, i), max_tokens=1))[0].num_cached_tokens for i in range(1, 5)
    ]
    assert cached == [0, 48, 48, 48]
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (4 * 53, 3 * 48)
    assert stats.step_tokens.sum == 53 + 3 * 5
    assert stats.num_prompt_tokens == 4 * 53
    assert (stats.blocks["cached"], stats.blocks["kv"]) == (3, 0)
    (whole,) = outputs_of(engine, request("whole", system, max_tokens=1))
    assert whole.num_cached_tokens == 32  # a token must be computed, so the third block is
    (answer,) = outputs_of(engine, request("next turn", ids(60, 9), max_tokens=1))
    assert answer.num_cached_tokens == 0


def test_what_was_answered_is_known_in_the_next_turn(base: BaseModel) -> None:
    engine = make_engine(base)
    first = ids(20)
    answer = run(engine, [request("first", first, max_tokens=30)])["first"]
    out = outputs_of(engine, request("second", first + answer + ids(10, 1), max_tokens=1))
    assert out[0].num_cached_tokens == 48  # of 20 + 29 tokens: the last one was never computed


def test_those_who_come_together_share_afterwards(base: BaseModel) -> None:
    engine = make_engine(base)
    requests = [request(str(i), ids(48) + ids(5, i), max_tokens=3) for i in range(4)]
    for r in requests:
        engine.add(r)
    engine.step()
    assert engine.stats().blocks["kv"] == 16
    engine.step()
    engine.check_integrity()
    assert engine.stats().blocks["kv"] == 3 + 4
    assert engine.stats().prefix_cache_hits == 0
    engine.add(request("late", ids(49), max_tokens=1))
    assert {o.request_id: o.num_cached_tokens for o in engine.step()}["late"] == 48


def test_adapters_and_their_versions_share_nothing(base: BaseModel, adapters: dict[str, TestAdapter]) -> None:
    v1 = adapters["r2"]
    v2 = replace(v1, ref=replace(v1.ref, digest="2" * 64, version=2))
    renamed = replace(v1, ref=replace(v1.ref, name="another"))
    engine = make_engine(base, [*adapters.values(), v2])
    for i, adapter in enumerate([None, *adapters.values(), v2]):
        outputs_of(engine, request(str(i), ids(40), adapter, max_tokens=2))
    assert engine.stats().prefix_cache_hits == 0
    assert outputs_of(engine, request("same bytes", ids(40), renamed, max_tokens=1))[0].num_cached_tokens == 32


def test_switched_off_nothing_is_kept(base: BaseModel) -> None:
    engine = make_engine(base, enable_prefix_caching=False)
    for i in range(2):
        assert outputs_of(engine, request(str(i), ids(40), max_tokens=1))[0].num_cached_tokens == 0
    assert engine.stats().blocks["cached"] == 0


def test_a_prompt_whose_logprobs_are_asked_for_is_computed_whole(base: BaseModel) -> None:
    engine = make_engine(base)
    outputs_of(engine, request("first", ids(40), max_tokens=1))
    parts = outputs_of(engine, request("scored", ids(40), max_tokens=1, prompt_logprobs=0))
    assert {part.num_cached_tokens for part in parts} == {0}
    assert sum(len(part.prompt_logprobs or ()) for part in parts) == 39
    assert engine.stats().blocks["cached"] == 2  # it found them there afterwards


@pytest.mark.parametrize("num_blocks", [400, 21], ids=["roomy", "tight"])
def test_logits_are_the_same_bits_with_and_without(
    base: BaseModel, adapters: dict[str, TestAdapter], num_blocks: int
) -> None:
    models = [None, adapters["r5"], adapters["longlora"], adapters["vera-a"]]
    requests = [request(str(i), ids(35, i % 4) + ids(3 + i, i), models[i % 4], max_tokens=14) for i in range(12)]
    logits = []
    for caching in (False, True):
        engine = make_engine(
            base,
            list(adapters.values()),
            pool_bytes=num_blocks * BLOCK_BYTES,
            max_num_batched_tokens=40,
            enable_prefix_caching=caching,
        )
        fill_up(engine)
        spy = Spy(engine)
        run(engine, requests[:4])
        run(engine, requests[4:])
        logits.append(spy.logits)
        assert (engine.stats().prefix_cache_hits > 0) == caching
        assert (engine.stats().num_preemptions > 0) == (num_blocks == 21)
    for name, expected in logits[0].items():
        assert torch.equal(torch.stack(logits[1][name]), torch.stack(expected))


def test_prefixes_go_before_idle_adapters_and_those_before_running_requests(
    base: BaseModel, adapters: dict[str, TestAdapter]
) -> None:
    engine = make_engine(base, list(adapters.values()), pool_bytes=12 * BLOCK_BYTES)
    engine.scheduler.prefix_cache._token_seconds = lambda: 0.0  # else what was measured decides
    run(engine, [request("idle", ids(4), adapters["r8"], max_tokens=1)])  # four blocks of rows
    run(engine, [request("cached", ids(60), max_tokens=1)])  # three full blocks
    assert engine.stats().blocks == {"free": 5, "kv": 0, "cached": 3, "layered": 4, "flat": 0, "run": 0}
    run(engine, [request("seven", ids(112, 1), max_tokens=1)])
    assert engine.stats().blocks["cached"] == 1 + 7
    assert engine.stats().num_evictions == 0
    run(engine, [request("nine", ids(144, 2), max_tokens=1)])
    assert engine.stats().num_evictions == 1
    assert engine.stats().num_preemptions == 0


def test_prefixes_that_gave_logits_that_are_not_finite_are_forgotten(
    base: BaseModel, adapters: dict[str, TestAdapter]
) -> None:
    engine = make_engine(base, list(adapters.values()), max_num_batched_tokens=32)

    def overflowing(ref: AdapterRef) -> AdapterWeights:
        weights = adapters["r2"].load(base)
        for module in weights.modules.values():
            assert isinstance(module, LoraWeights)
            module.b_OR.mul_(1e38)
        return weights

    engine._loads._load = overflowing
    (out,) = outputs_of(engine, request("broken", ids(70), adapters["r2"]))
    assert isinstance(out.error, IntegrityError)
    assert engine.stats().blocks["cached"] == 0


def generating(engine: Engine, *requests: GenerateRequest) -> None:
    """Step until all requests have a token; their adapters are loaded before the first step."""
    waited = {r.request_id for r in requests}
    submit(engine, requests)
    while waited:
        waited -= {o.request_id for o in engine.step()}


def test_tables_are_kept_from_step_to_step_until_rows_move(base: BaseModel, adapters: dict[str, TestAdapter]) -> None:
    engine = make_engine(base, list(adapters.values()))
    generating(engine, request("gone", ids(3), adapters["r5"], max_tokens=200))
    generating(engine, *(request(name, ids(20), adapters[name], max_tokens=24) for name in ("r8", "longlora")))
    engine.cancel("gone")
    engine.step()
    tables = engine._model._adapters
    engine.step()
    assert engine._model._adapters is tables
    while engine.adapter_manager.evict_one():
        pass
    assert engine.pool._clear_run(engine.pool.allocator.num_free)
    engine.step()
    assert engine._model._adapters is not tables
    engine.cancel("r8")
    tables = engine._model._adapters
    engine.step()
    assert engine._model._adapters is not tables


def test_a_pair_comes_in_though_no_stretch_of_blocks_is_free(base: BaseModel, adapters: dict[str, TestAdapter]) -> None:
    """Rows and KV of running requests are moved, and no request is preempted."""
    stay = [request(f"kv {i}", ids(17, i), max_tokens=12) for i in range(6)]
    stay.append(request("rows", ids(17, 9), adapters["longlora"], max_tokens=12))
    come = request("pair", ids(17, 10), adapters["vera-c"], max_tokens=12)
    undisturbed = make_engine(base, list(adapters.values()))
    expected = Spy(undisturbed)
    run(undisturbed, [*stay, come])
    engine = make_engine(base, list(adapters.values()), pool_bytes=24 * BLOCK_BYTES, enable_prefix_caching=False)
    spy = Spy(engine)
    gone = [request(f"gone {i}", ids(17, 20 + i), max_tokens=12) for i in range(3)]
    generating(engine, stay[0], gone[0], stay[1], stay[6], gone[1], *stay[2:4], gone[2], *stay[4:6])
    for r in gone:
        engine.cancel(r.request_id)
    assert engine.pool.allocator.num_free == 7
    assert engine.pool.allocator.allocate_run(4) is None
    run(engine, [come])
    assert engine.stats().num_preemptions == 0
    for r in (*stay, come):
        assert torch.equal(torch.stack(spy.logits[r.request_id]), torch.stack(expected.logits[r.request_id]))
