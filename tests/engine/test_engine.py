"""The engine: small pools, preemption, cancellation, failing loads, limits. No request is lost and nothing leaks."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, VeraConfig

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.errors import (
    BaseMismatch,
    ContextLengthExceeded,
    IntegrityError,
    Overloaded,
    RequestError,
    SpecError,
)
from loray.spec import GenerateRequest
from tests.engine.adapters import TestAdapter, make_adapter
from tests.engine.harness import fill_up, make_engine, request, run

BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, d, fp32
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[TestAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    loras = [
        make_adapter(base, folder / f"r{r}-{i}", LoraConfig(r=r, target_modules=ATTENTION), seed=10 * r + i, std=0.12)
        for i in range(2)
        for r in (2, 5, 8)
    ]
    vera = VeraConfig(r=16, target_modules=["q_proj", "v_proj"], save_projection=False)
    return loras + [make_adapter(base, folder / f"vera-{i}", vera, seed=i, std=0.12) for i in range(2)]


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def many(adapters: list[TestAdapter], n: int, **params: int) -> list[GenerateRequest]:
    models = [None, *adapters]
    return [request(str(i), ids(5 + (i * 13) % 40, i), models[i % len(models)], **params) for i in range(n)]


def outcomes_of(engine: Engine) -> dict[str, object]:
    """Step until no request is left; for each its finish reason or its error."""
    outcomes: dict[str, object] = {}
    while engine.has_work:
        for out in engine.step():
            outcomes[out.request_id] = out.error or out.finish_reason
    return outcomes


def test_a_small_pool_preempts_and_evicts_and_changes_no_token(base: BaseModel, adapters: list[TestAdapter]) -> None:
    requests = many(adapters, 27, max_tokens=30)
    roomy = make_engine(base, adapters)
    expected = run(roomy, requests)
    assert roomy.stats().num_preemptions == 0
    tight = make_engine(base, adapters, pool_bytes=14 * BLOCK_BYTES, max_num_batched_tokens=64)
    fill_up(tight)
    assert run(tight, requests) == expected
    assert tight.stats().num_preemptions > 0
    assert tight.stats().num_evictions > 0


def test_random_life_with_cancels_and_failing_loads(base: BaseModel, adapters: list[TestAdapter]) -> None:
    rng = random.Random(0)
    failing = {adapters[1].ref.digest: 0.5, adapters[6].ref.digest: 1.0}
    by_digest = {a.ref.digest: a for a in adapters}
    engine = make_engine(
        base, adapters, pool_bytes=16 * BLOCK_BYTES, host_bytes=60_000, max_num_batched_tokens=48, max_num_seqs=32
    )

    def load(ref):  # type: ignore[no-untyped-def]
        if rng.random() < failing.get(ref.digest, 0.0):
            raise IntegrityError(f"{ref.label} is damaged")
        return by_digest[ref.digest].load(base)

    engine._loads._load = load
    roomy, expected = make_engine(base, adapters), {}
    for r in many(adapters, 90, max_tokens=12):
        expected |= run(roomy, [r])
    waiting = many(adapters, 90, max_tokens=12)
    got: dict[str, list[int]] = {}
    failed, cancelled, live = set(), set(), {}
    while waiting or engine.has_work:
        while waiting and len(live) < 12:
            r = waiting.pop(0)
            engine.add(r)
            live[r.request_id] = r
            got[r.request_id] = []
        for out in engine.step():
            if out.error is not None:
                assert isinstance(out.error, IntegrityError)
                failed.add(out.request_id)
            else:
                assert out.token_id is not None
                got[out.request_id].append(out.token_id)
            if out.error is not None or out.finish_reason:
                del live[out.request_id]
        if live and rng.random() < 0.05:
            victim = rng.choice(sorted(live))
            engine.cancel(victim)
            cancelled.add(victim)
            del live[victim]
        engine.check_integrity()
    assert failed
    assert cancelled
    for request_id, tokens in got.items():
        whole = expected[request_id]
        assert tokens == (whole[: len(tokens)] if request_id in failed | cancelled else whole)
    adapters_of = {r.request_id: r.adapter for r in many(adapters, 90)}
    assert {adapters_of[i].digest for i in failed} <= set(failing)  # type: ignore[union-attr]


def test_idle_adapters_stay_until_their_rows_are_needed(base: BaseModel, adapters: list[TestAdapter]) -> None:
    engine = make_engine(base, adapters)
    run(engine, [request("a", ids(5), adapters[0])])
    run(engine, [request("b", ids(5), adapters[0])])
    assert engine.stats().num_loads == 1
    assert engine.stats().adapters_in_pool == (adapters[0].ref.digest,)
    assert engine.stats().blocks["kv"] == 0


def test_an_adapter_under_way_blocks_nobody(base: BaseModel, adapters: list[TestAdapter]) -> None:
    import threading

    engine = make_engine(base, adapters)
    gate = threading.Event()
    slow = adapters[0]
    original = engine._loads._load

    def load(ref):  # type: ignore[no-untyped-def]
        if ref.digest == slow.ref.digest:
            assert gate.wait(60)
        return original(ref)

    engine._loads._load = load
    engine.add(request("slow", ids(5), slow))
    engine.add(request("base", ids(5)))
    engine.add(request("quick", ids(5), adapters[1]))
    finished = set()
    while finished != {"base", "quick"}:
        finished |= {o.request_id for o in engine.step() if o.finish_reason}
    assert engine.stats().num_loading == 1
    gate.set()
    while engine.has_work:
        finished |= {o.request_id for o in engine.step() if o.finish_reason}
    assert "slow" in finished
    engine.check_integrity()


def test_requests_that_can_never_run_are_refused(base: BaseModel, adapters: list[TestAdapter]) -> None:
    engine = make_engine(base, adapters, max_model_len=64, max_queued=1)
    with pytest.raises(ContextLengthExceeded, match=r"maximum context length is 64 tokens, but 70 were asked for \(60"):
        engine.check(request("a", ids(60), max_tokens=10))
    with pytest.raises(RequestError, match="empty"):
        engine.check(request("a", []))
    with pytest.raises(RequestError, match="vocabulary of 320"):
        engine.check(request("a", [320]))
    other = replace(adapters[0], ref=replace(adapters[0].ref, base_fingerprint="f" * 64))
    with pytest.raises(BaseMismatch, match="another base"):
        engine.check(request("a", ids(4), other))
    engine.add(request("a", ids(4)))
    with pytest.raises(Overloaded) as refused:
        engine.add(request("b", ids(4)))
    assert refused.value.retry_after_s > 0
    run(engine, [])
    engine.check_integrity()


def test_an_adapter_that_no_empty_pool_would_hold_fails_its_request_alone(
    base: BaseModel, adapters: list[TestAdapter]
) -> None:
    engine = make_engine(base, adapters, pool_bytes=3 * BLOCK_BYTES)
    engine.add(request("big", ids(20), adapters[2]))
    engine.add(request("base", ids(20)))
    outcomes = outcomes_of(engine)
    assert isinstance(outcomes["big"], ContextLengthExceeded)
    assert "pool has 3" in str(outcomes["big"])
    assert outcomes["base"] == "length"


def test_a_pool_too_small_for_anything_is_refused(base: BaseModel) -> None:
    with pytest.raises(SpecError, match="holds 1 blocks"):
        make_engine(base, pool_bytes=BLOCK_BYTES)


def test_seeded_sampling_does_not_depend_on_the_batch(base: BaseModel, adapters: list[TestAdapter]) -> None:
    seeded = request("s", ids(9), adapters[0], temperature=0.9, seed=7, top_p=0.95, max_tokens=20)
    alone = run(make_engine(base, adapters), [seeded])["s"]
    together = run(make_engine(base, adapters), [*many(adapters, 9), seeded])["s"]
    assert alone == together
    other = run(
        make_engine(base, adapters), [request("s", ids(9), adapters[0], temperature=0.9, seed=8, max_tokens=20)]
    )
    assert other["s"] != alone


def test_an_adapter_that_is_not_finite_fails_its_own_requests(base: BaseModel, adapters: list[TestAdapter]) -> None:
    engine = make_engine(base, adapters)
    original = engine._loads._load

    def load(ref):  # type: ignore[no-untyped-def]
        weights = original(ref)
        if ref.digest == adapters[0].ref.digest:
            next(iter(weights.modules.values())).b_OR.fill_(float("nan"))
        return weights

    engine._loads._load = load
    engine.add(request("broken", ids(5), adapters[0]))
    engine.add(request("fine", ids(5), adapters[1]))
    outcomes = outcomes_of(engine)
    assert isinstance(outcomes["broken"], IntegrityError)
    assert outcomes["fine"] == "length"
    engine.check_integrity()


def test_logits_that_overflow_fail_their_request_alone(base: BaseModel, adapters: list[TestAdapter]) -> None:
    engine = make_engine(base, adapters)
    original = engine._loads._load

    def load(ref):  # type: ignore[no-untyped-def]
        weights = original(ref)
        if ref.digest == adapters[0].ref.digest:
            for module in weights.modules.values():
                module.b_OR.mul_(1e38)
        return weights

    engine._loads._load = load
    for name, adapter in (("broken", adapters[0]), ("fine", adapters[1])):
        engine.add(request(name, ids(20), adapter, temperature=1.0, seed=1))
    outcomes = outcomes_of(engine)
    assert isinstance(outcomes["broken"], IntegrityError)
    assert outcomes["fine"] == "length"
    broken, fine = (engine.scheduler.prefix_cache.match(a.ref.digest, ids(20)) for a in adapters[:2])
    assert not broken  # not even the block that it filled in its last step
    assert len(fine) == 1


def test_the_smallest_temperature_is_greedy(base: BaseModel) -> None:
    greedy = run(make_engine(base), [request("r", ids(5))])["r"]
    for temperature in (1e-38, 1e-6):
        assert run(make_engine(base), [request("r", ids(5), temperature=temperature, seed=0)])["r"] == greedy


def test_an_evicted_adapter_without_a_host_copy_is_loaded_again(base: BaseModel, adapters: list[TestAdapter]) -> None:
    """If an engine has work and nothing to compute, a load is always under way that will wake it."""
    engine = make_engine(base, adapters, pool_bytes=9 * BLOCK_BYTES, host_bytes=1)
    for i in range(12):
        engine.add(request(str(i), ids(60, i), adapters[i % 6], max_tokens=20))
    finished = 0
    while engine.has_work:
        outputs = engine.step()
        assert [o.error for o in outputs if o.error] == []
        finished += sum(o.finish_reason is not None for o in outputs)
        if engine.idle:
            assert engine.stats().num_loading
        engine.check_integrity()
    assert finished == 12


def test_a_first_token_that_cannot_come_in_time_is_refused_and_counted(
    base: BaseModel, adapters: list[TestAdapter]
) -> None:
    engine = make_engine(base, adapters, ttft_slo_s=1e-9)
    engine.add(request("late", ids(5), adapters[0]))
    engine.add(replace(request("patient", ids(5), adapters[0]), ttft_slo_s=600.0))
    patient = engine._requests["patient"]
    outcomes = outcomes_of(engine)
    assert isinstance(outcomes["late"], Overloaded)
    assert outcomes["patient"] == "length"
    assert engine.stats().num_aborted == 1
    with pytest.raises(Overloaded, match="was wanted within 1e-09"):  # steps have been measured by now
        engine.add(request("refused", ids(5)))
    assert engine.stats().num_aborted == 2
    config = base.config
    rows = config.num_layers * sum(2 * sum(config.module_shape(module)) for module in ATTENTION)  # rank 2
    assert patient.token_weight == pytest.approx(1 + rows / config.num_matrix_elements)
    engine.check_integrity()
