"""Decode steps that are launched before the tokens of the step before have been read, and captured before the first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.engine.model.decoder import Decoder
from loray.errors import EngineError
from loray.spec import BACKGROUND_PRIORITY, GenerateRequest, ServeSpec, Thinking
from loray_kernels import DecodeStep
from loray_kernels.cuda import graphs
from loray_kernels.cuda.sampling import Readback
from loray_kernels.sampling import ReferenceChooser
from tests.fixtures.engines import Spy, fill_up, make_engine, request, run, submit
from tests.fixtures.peft_adapters import TestAdapter
from tests.fixtures.shim_ops import ShimOps, use_three_forms
from tests.fixtures.slow_masks import constraint, slow
from tests.kernels.cuda.engines import decode_steps_of, mixture, served, use_reference

SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5, "top_k": 20, "top_p": 0.9},
    {"logprobs": 2},
    {"temperature": 0.8, "seed": 3},
]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replays and reads of results, as they come."""
    found: list[str] = []
    replay, read = graphs.DecodeGraphs.__call__, Readback.read

    def replaying(steps: graphs.DecodeGraphs, step: DecodeStep) -> Tensor:
        found.append("launch")
        return replay(steps, step)

    def reading(readback: Readback, *arguments: Any) -> Any:
        found.append("read")
        return read(readback, *arguments)

    monkeypatch.setattr(graphs.DecodeGraphs, "__call__", replaying)
    monkeypatch.setattr(Readback, "read", reading)
    return found


def num_ahead(order: Sequence[str]) -> int:
    """Launches before which the last step's tokens had not been read."""
    found = in_flight = 0
    for what in order:
        found += what == "launch" and in_flight > 0
        in_flight = in_flight + 1 if what == "launch" else max(0, in_flight - 1)
    return found


def expected(
    monkeypatch: pytest.MonkeyPatch,
    base: BaseModel,
    adapters: Sequence[TestAdapter],
    requests: Sequence[GenerateRequest],
    **spec: Any,
) -> dict[str, list[int]]:
    with monkeypatch.context() as patched:
        use_reference(patched)
        return run(make_engine(base, adapters, **spec), requests)


def test_a_step_is_launched_before_the_last_one_is_read(
    base: BaseModel, adapters: list[TestAdapter], ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token of a request is one replay, none more: the last one is known by their number."""
    requests = [request(str(i), range(3, 9), [None, *adapters][i], max_tokens=9, **SAMPLING[i]) for i in range(3)]
    want = expected(monkeypatch, base, adapters, requests)
    order.clear()
    engine = make_engine(base, adapters)
    assert run(engine, requests, together=True) == want
    num = len(ops.replayed)
    assert order[order.index("launch") :] == ["launch", *["launch", "read"] * (num - 1), "read"]
    assert num <= 8


def test_captured_steps_have_no_guesses(base: BaseModel, base_ops: ShimOps) -> None:
    """They have one token a request."""
    assert make_engine(base, speculation="auto").scheduler.speculation is None


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.2}, {"min_tokens": 9}])
def test_where_a_token_depends_on_those_before_it_they_are_read_first(
    base: BaseModel, base_ops: ShimOps, order: list[str], params: dict[str, Any]
) -> None:
    run(make_engine(base), [request("plain", range(3, 9)), request("other", range(3, 9), max_tokens=5, **params)])
    assert num_ahead(order[: order.index("launch") + 8]) == 0
    assert num_ahead(order) > 0  # when it has ended


def test_a_thought_with_a_budget_is_launched_ahead_until_it_may_have_to_end(
    base: BaseModel, base_ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its budget is used up, and its content is free again."""
    thinking = Thinking(start_id=7, end_id=300, state="open", budget=12)
    thoughtful = request("thought", range(3, 9), thinking=thinking, max_tokens=30)
    requests = [request("plain", range(3, 9), max_tokens=40, **SAMPLING[1]), thoughtful]
    want = expected(monkeypatch, base, (), requests)
    order.clear()
    assert run(make_engine(base), requests) == want
    assert want["thought"].index(300) == 12
    assert 25 < num_ahead(order) < 39


def test_steps_without_the_request_that_awaits_its_mask_are_launched_ahead(
    base: BaseModel, base_ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = request("held", range(4, 9), structured=constraint(0.03, 6), max_tokens=7, temperature=1.0, seed=1)
    requests = [request("plain", range(3, 9), max_tokens=60, **SAMPLING[1]), held]

    def masked() -> Engine:
        engine = make_engine(base)
        slow(engine)
        return engine

    with monkeypatch.context() as patched:
        use_reference(patched)
        want = run(masked(), requests)
    order.clear()
    assert run(masked(), requests) == want
    assert len(want["held"]) == 7
    assert 20 < num_ahead(order) < 59


def test_rows_that_are_left_out_of_captured_steps_go_on_later(
    base: BaseModel, mixed: dict[str, TestAdapter], ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By turns, of any adapter, one of them held to a constraint; steps are launched ahead all the while."""
    own = [mixed["r2"], mixed["vera"], None, mixed["r7"]]
    others = mixture(4, own, lambda _: 30, SAMPLING)
    others.append(request("held", range(4, 9), structured=constraint(0.0, 30), max_tokens=30))
    person = request("person", range(3, 9), max_tokens=80, **SAMPLING[1])
    want = expected(monkeypatch, base, list(mixed.values()), [*others, person])
    order.clear()
    engine = make_engine(base, list(mixed.values()), background_slack=0.0)
    decode_steps = decode_steps_of(engine, monkeypatch)
    got = served(engine, [*(replace(r, priority=BACKGROUND_PRIORITY) for r in others), person], joins=5)
    assert got == want
    rows = [len(step.sampled) for step in decode_steps]
    assert rows.count(1) > 40
    assert rows.count(2) > 2
    assert num_ahead(order) > len(rows) / 2


def test_requests_that_stop_leave_a_row_that_nobody_reads(
    base: BaseModel, mixed: dict[str, TestAdapter], ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their slots, blocks and adapters are taken by others at once, in a pool that is too small for all."""
    names = ["vera", "r2", None, "r7", "vera too", "dora", "rope"]
    own = [None if name is None else mixed[name] for name in names]
    requests = mixture(16, own, lambda _: 25, SAMPLING)
    free = expected(monkeypatch, base, list(mixed.values()), requests)
    stops = [tokens[3 + i % 9] for i, tokens in enumerate(free.values())]
    requests = [
        GenerateRequest(r.request_id, r.prompt_ids, r.params.model_copy(update={"stop_token_ids": (stop,)}), r.adapter)
        for r, stop in zip(requests, stops, strict=True)
    ]
    fields: dict[str, Any] = {"max_num_seqs": 6, "pool_bytes": 180 << 10}
    engine = make_engine(base, list(mixed.values()), **fields)
    fill_up(engine)
    decode_steps = decode_steps_of(engine, monkeypatch)
    order.clear()
    got = served(engine, requests, joins=3)
    want = {name: tokens[: tokens.index(stop) + 1] for (name, tokens), stop in zip(free.items(), stops, strict=True)}
    assert got == want
    assert len(ops.replayed) == len(decode_steps)
    assert num_ahead(order) > len(decode_steps) / 3
    rows = [chunk for batch in decode_steps for chunk in batch.sampled]
    assert any(c.start + 1 - c.request.num_prompt_tokens >= len(want[c.request.request_id]) for c in rows)
    stats = engine.stats()
    assert stats.num_preemptions + stats.num_evictions > 0
    assert stats.num_running == stats.num_waiting == 0


def test_a_cancelled_request_gets_nothing_more(
    base: BaseModel, base_ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(str(i), range(3 + i, 9), max_tokens=12) for i in range(3)]
    want = expected(monkeypatch, base, [], requests)
    engine = make_engine(base)
    submit(engine, requests)
    got: dict[str, list[int]] = {r.request_id: [] for r in requests}
    cancelled: int | None = None
    while engine.has_work:
        for token in engine.step():
            assert token.token_id is not None
            got[token.request_id].append(token.token_id)
        if cancelled is None and len(got["1"]) == 5:
            engine.cancel("1")
            cancelled = len(got["1"])
        engine.check_integrity()
    assert got == want | {"1": want["1"][:5]}
    assert num_ahead(order) > 5


def test_logits_that_are_not_finite_fail_their_request_a_step_later(
    base: BaseModel, base_ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token that the next step takes meanwhile is one of the vocabulary."""
    requests = [request(str(i), range(3 + i, 9), max_tokens=8) for i in range(2)]
    want = expected(monkeypatch, base, [], requests)
    engine = make_engine(base)
    forward, drawn = engine._model.forward, list[int]()

    def broken(batch: Any, *arguments: Any) -> Tensor:
        logits_SV = forward(batch, *arguments)
        if any(chunk.request.request_id == "0" and chunk.start == 8 for chunk in batch.sampled):
            row = next(i for i, chunk in enumerate(batch.sampled) if chunk.request.request_id == "0")
            with torch.inference_mode():
                logits_SV[row] = torch.nan
        slots = engine._model.slots(batch)
        drawn.extend([] if slots is None else slots.tokens.tolist())
        return logits_SV

    monkeypatch.setattr(engine._model, "forward", broken)
    submit(engine, requests)
    got: dict[str, list[Any]] = {r.request_id: [] for r in requests}
    while engine.has_work:
        for token in engine.step():
            got[token.request_id].append(type(token.error) if token.error else token.token_id)
    assert got["1"] == want["1"]
    assert got["0"][:-1] == want["0"][: len(got["0"]) - 1]
    assert got["0"][-1].__name__ == "IntegrityError"
    assert all(0 <= token < base.config.vocab_size for token in drawn)
    assert num_ahead(order) > 3


def test_tokens_of_own_embedding_rows_are_read_first(
    base: BaseModel, mixed: dict[str, TestAdapter], ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which row of its own a token has is looked up on the host."""
    every = list(mixed.values())
    requests = [request(str(i), range(3, 9), [mixed["longlora"], None][i], max_tokens=9 - 5 * i) for i in range(2)]
    want = expected(monkeypatch, base, every, requests)
    order.clear()
    assert run(make_engine(base, every), requests, together=True) == want
    assert num_ahead(order) == 0
    assert ops.replayed == [8] * 8


def test_steps_beyond_what_is_recorded_take_drawn_tokens_too(
    base: BaseModel, base_ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed launch by launch, they read the same words."""
    requests = [request(str(i), range(3, 9 + i), max_tokens=7) for i in range(3)]
    want = expected(monkeypatch, base, [], requests)
    order.clear()
    engine: Engine = make_engine(base, graph_record_s=0)
    assert run(engine, requests) == want
    assert base_ops.replayed == []
    assert num_ahead(order) == 5


def test_tokens_that_no_kernel_draws_are_taken_by_the_next_step_too(
    base: BaseModel, base_ops: ShimOps, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch cuts by top-k and top-p where the vocabulary is too large for the kernels."""
    requests = [request(str(i), range(3, 9 + i), max_tokens=7, **SAMPLING[i]) for i in range(4)]
    want = expected(monkeypatch, base, [], requests)
    monkeypatch.setattr(base_ops, "chooser", lambda logits_SV: ReferenceChooser(base_ops.sample))
    order.clear()
    assert run(make_engine(base), requests) == want
    assert len(base_ops.replayed) >= 6


@pytest.fixture
def three_forms(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    return use_three_forms(monkeypatch)


def build(base: BaseModel) -> AsyncEngine:
    spec = ServeSpec(
        base=base.name,
        dtype="float32",
        pool_bytes=8 << 20,
        itl_slo_ms=1e9,
        graph_record_s=1e9,
        max_num_seqs=4,
        num_threads=1,
    )
    return AsyncEngine(build_engine(spec, base, lambda ref, packer: pytest.fail("there are no adapters")))


def test_the_thread_that_steps_compiles_and_captures(
    base: BaseModel, three_forms: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[str]] = {"forward": set(), "capture": set()}

    def watch(name: str) -> None:
        call = getattr(Decoder, name)

        def watched(*arguments: Any) -> Any:
            threads[name].add(threading.current_thread().name)
            return call(*arguments)

        monkeypatch.setattr(Decoder, name, watched)

    for name in threads:
        watch(name)
    stream = build(base)
    stream.start()
    try:
        captured = stream._engine._model.capture_state
        assert captured is not None
        assert captured.num_captured == captured.num_wanted == 3

        async def answer() -> list[Any]:
            return [delta async for delta in stream.generate(request("r", range(3, 9), max_tokens=4))]

        assert asyncio.run(answer())
        assert three_forms.replayed
    finally:
        stream.stop()
    assert threads == {"forward": {"engine"}, "capture": {"engine"}}


def test_an_engine_that_cannot_be_warmed_up_does_not_start(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: Engine) -> None:
        raise EngineError("rank 1 has ended")

    monkeypatch.setattr(Engine, "warm_up", fail)
    stream = build(base)
    with pytest.raises(EngineError, match="rank 1 has ended"):
        stream.start()
    with pytest.raises(EngineError):
        stream.check_health()


def test_an_engine_captures_before_its_first_request_and_never_later(
    base: BaseModel, three_forms: ShimOps, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all is captured, where only the largest size is, and where nothing is."""
    requests = [request(str(i), range(3, 9 + i), max_tokens=3 + i) for i in range(3)]
    limits: list[tuple[dict[str, Any], int, list[int]]] = [
        ({}, 3, [4, 4, 2, 1]),
        ({"graph_bytes": 1}, 1, [4, 4, 4, 4]),
        ({"graph_record_s": 0.0}, 0, []),
    ]
    results = []
    for own, num_captured, replayed in limits:
        three_forms.may_capture, three_forms.replayed = True, []
        caplog.clear()
        with caplog.at_level("INFO"):
            engine = make_engine(base, **({"max_num_seqs": 4, "graph_record_s": 1e9} | own))
        assert f"recorded decode steps: {num_captured} of 3" in caplog.text
        assert ("are not recorded" in caplog.text) == (num_captured < 3)
        assert not engine.scheduler.step_time.is_known
        assert engine.stats().num_steps == 0
        three_forms.may_capture = False
        spy = Spy(engine)
        tokens = run(engine, requests)
        assert three_forms.replayed == replayed
        results.append((tokens, {name: torch.stack(rows) for name, rows in spy.logits.items()}))
    for tokens, logits in results[1:]:
        assert tokens == results[0][0]
        for name, want in results[0][1].items():
            torch.testing.assert_close(logits[name], want, atol=1e-5, rtol=1e-5)
