"""The engine: limits, requests that another engine has begun, failing loads, steps without memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.engine.request import Chunk, TokenOutput
from loray.errors import (
    BaseMismatch,
    ContextLengthExceeded,
    EngineError,
    IntegrityError,
    LorayError,
    Overloaded,
    RequestError,
    SpecError,
)
from loray.methods.weights import LoraWeights
from loray.spec import AdapterRef, Constraint, GenerateRequest
from tests.fixtures.engines import BLOCK_BYTES, empty, ids, make_engine, outputs, request, run
from tests.fixtures.peft_adapters import ATTENTION, Adapters, TestAdapter


def outcomes_of(engine: Engine, *requests: GenerateRequest) -> dict[str, object]:
    """For each its finish reason or its error."""
    return {out.request_id: out.error or out.finish_reason for out in outputs(engine, *requests)}


def test_requests_that_can_never_run_are_refused(base: BaseModel, adapters: Adapters) -> None:
    engine = make_engine(base, list(adapters.values()), max_model_len=64, max_queued=1)
    with pytest.raises(ContextLengthExceeded, match=r"maximum context length is 64 tokens, but 70 were asked for \(60"):
        engine.check(request("a", ids(60), max_tokens=10))
    with pytest.raises(RequestError, match="empty"):
        engine.check(request("a", []))
    with pytest.raises(RequestError, match="vocabulary of 320"):
        engine.check(request("a", [320]))
    other = replace(adapters["r2"], ref=replace(adapters["r2"].ref, base_fingerprint="f" * 64))
    with pytest.raises(BaseMismatch, match="another base"):
        engine.check(request("a", ids(4), other))
    engine.add(request("a", ids(4)))
    with pytest.raises(Overloaded) as refused:
        engine.add(request("b", ids(4)))
    assert refused.value.retry_after_s > 0
    run(engine, [])


def test_an_adapter_that_no_empty_pool_would_hold_fails_its_request_alone(base: BaseModel, adapters: Adapters) -> None:
    engine = make_engine(base, list(adapters.values()), pool_bytes=3 * BLOCK_BYTES)
    outcomes = outcomes_of(engine, request("big", ids(20), adapters["r8"]), request("base", ids(20)))
    assert isinstance(outcomes["big"], ContextLengthExceeded)
    assert "pool has 3" in str(outcomes["big"])
    assert outcomes["base"] == "length"


def test_a_pool_too_small_for_anything_is_refused(base: BaseModel) -> None:
    with pytest.raises(SpecError, match="holds 1 blocks"):
        make_engine(base, pool_bytes=BLOCK_BYTES)


def test_logits_that_overflow_fail_their_request_alone(base: BaseModel, adapters: Adapters) -> None:
    engine = make_engine(base, list(adapters.values()), max_num_batched_tokens=64, max_num_seqs=8)
    broken, fine = adapters["r2"], adapters["r5"]

    def load(ref: AdapterRef, packer: Packer) -> PackedAdapter:
        weights = (broken if ref.digest == broken.ref.digest else fine).load(base)
        for module in weights.modules.values() if ref.digest == broken.ref.digest else ():
            assert isinstance(module, LoraWeights)
            module.b_OR.mul_(1e38)
        return packer.pack(weights)

    engine._loads._load = load
    both = (request(a.ref.name, ids(70), a, temperature=1.0, seed=1) for a in (broken, fine))
    outcomes = outcomes_of(engine, *both)
    assert isinstance(outcomes["r2"], IntegrityError)
    assert outcomes["r5"] == "length"
    known = [engine.scheduler.prefix_cache.match(a.ref.digest, ids(70)) for a in (broken, fine)]
    assert list(map(len, known)) == [0, 4]  # not even the blocks that it filled before


def test_the_smallest_temperature_is_greedy(base: BaseModel) -> None:
    greedy = run(make_engine(base), [request("r", ids(5))])["r"]
    for temperature in (1e-38, 1e-6):
        assert run(make_engine(base), [request("r", ids(5), temperature=temperature, seed=0)])["r"] == greedy


def test_a_first_token_that_cannot_come_in_time_is_refused_and_counted(base: BaseModel, adapters: Adapters) -> None:
    engine = make_engine(base, list(adapters.values()), ttft_slo_s=1e-9)
    engine.add(request("late", ids(5), adapters["r2"]))
    engine.add(replace(request("patient", ids(5), adapters["r2"]), ttft_slo_s=600.0))
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


PROMPT = [(11 * i) % 250 for i in range(21)]
KIND_TOKENS = 20
# A request that another engine has begun goes on as if that engine had ended it.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "seeded penalties": {"temperature": 1.2, "seed": 3, "frequency_penalty": 0.6, "bad_words": ((9, 17), (4,))},
    "minimum": {"min_tokens": 12, "ignore_eos": False, "temperature": 1.0, "seed": 1, "stop_token_ids": (*range(128),)},
    "logprobs": {"temperature": 0.8, "seed": 5, "logprobs": 3},
    "scored prompt": {"prompt_logprobs": 1, "logprobs": 0},
}


def answer(engine: Engine, asked: GenerateRequest) -> list[TokenOutput]:
    """Without the outputs of a part of the prompt."""
    out = [o for o in outputs(engine, asked) if o.token_id is not None or o.error is not None]
    assert [o.error for o in out if o.error is not None] == []
    return out


def tokens(out: list[TokenOutput]) -> tuple[int, ...]:
    return tuple(o.token_id for o in out if o.token_id is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_goes_on_after_any_of_its_tokens(base: BaseModel, kind: str) -> None:
    whole = answer(make_engine(base), request("r", PROMPT, max_tokens=KIND_TOKENS, **KINDS[kind]))
    assert len(set(tokens(whole))) > 3
    asked = request("r", PROMPT, max_tokens=KIND_TOKENS, **KINDS[kind])
    again = make_engine(base)
    for k in (1, 2, 7, len(whole) - 1):
        rest = answer(again, replace(asked, request_id=str(k), output_ids=tokens(whole)[:k]))
        assert tokens(rest) == tokens(whole)[k:]
        assert [o.finish_reason for o in rest] == [o.finish_reason for o in whole[k:]]
        assert all(o.prompt_logprobs is None for o in rest)  # the first engine has given them
        for one, other in zip(rest, whole[k:], strict=True):
            assert (one.logprobs is None) == (other.logprobs is None)
            if one.logprobs is not None and other.logprobs is not None:
                assert one.logprobs.rank == other.logprobs.rank
                assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
                assert [t for t, _ in one.logprobs.top] == [t for t, _ in other.logprobs.top]
    assert all(o.num_cached_tokens <= len(PROMPT) for o in rest)


@pytest.mark.parametrize("name", ["r8", "longlora", "vera-a"])
def test_an_adapter_that_the_other_engine_has_not_loaded_yet(base: BaseModel, adapters: Adapters, name: str) -> None:
    asked = request("r", PROMPT, adapters[name], max_tokens=12, temperature=1.0, seed=2)
    whole = run(make_engine(base, [adapters[name]]), [asked])["r"]
    other = make_engine(base, [adapters[name]])
    assert run(other, [replace(asked, output_ids=tuple(whole[:5]))])["r"] == whole[5:]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "number": {"type": "integer", "maximum": 999}},
    "required": ["name", "number"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4}], ids=["greedy", "seeded"])
def test_json_goes_on_where_it_was(base: BaseModel, sampling: dict[str, Any]) -> None:
    """Also within what the schema leaves no choice about, where the first engine took several tokens in one step."""
    params = {"max_tokens": 80, "structured": Constraint.from_schema(SCHEMA, whitespace=""), **sampling}
    asked = request("r", PROMPT, ignore_eos=False, **params)
    whole = answer(make_engine(base), asked)
    ids = tokens(whole)
    assert whole[-1].finish_reason == "stop"
    again = make_engine(base)
    for k in range(1, len(ids)):
        rest = answer(again, replace(asked, request_id=str(k), output_ids=ids[:k]))
        assert tokens(rest) == ids[k:]
    text = Tokenizer.from_file(str(base.path / "tokenizer.json")).decode(list(ids), skip_special_tokens=True)
    assert json.loads(text).keys() == {"name", "number"}


def test_a_continued_request_is_neither_late_nor_one_too_many(base: BaseModel) -> None:
    engine = make_engine(base, max_queued=1, max_num_seqs=1, ttft_slo_s=1e-9)
    for name in ("a", "b", "c"):
        engine.add(replace(request(name, PROMPT, max_tokens=4), output_ids=(1, 2)))
    with pytest.raises(Overloaded):
        engine.add(request("new", PROMPT))
    assert Counter(o.request_id for o in outputs(engine)) == {"a": 2, "b": 2, "c": 2}
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (3 * len(PROMPT), 6)


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"output_ids": (1, 9999)}, RequestError, "outside the vocabulary"),
        ({"output_ids": (1,) * 8}, RequestError, "nothing to go on with"),
        ({"prompt_ids": (1,) * 510, "output_ids": (1,)}, ContextLengthExceeded, "tokens"),
    ],
)
def test_what_cannot_go_on(base: BaseModel, given: dict[str, Any], error: type[LorayError], why: str) -> None:
    with pytest.raises(error, match=why):
        make_engine(base).check(replace(request("r", PROMPT), **given))


# Steps that need more memory than the device has: each fails its largest request, the others' texts are exact, and
# nothing leaks.
Fails = Callable[[Sequence[Chunk]], bool]


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


def recovered(engine: Engine, *requests: GenerateRequest) -> tuple[dict[str, list[int]], dict[str, Exception]]:
    """Tokens and errors by request. Afterwards the pool is as empty as before."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    errors: dict[str, Exception] = {}
    for out in outputs(engine, *requests):
        if out.error is not None:
            errors[out.request_id] = out.error
        else:
            assert out.token_id is not None
            tokens[out.request_id].append(out.token_id)
    assert not engine._requests
    empty(engine)
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
    base: BaseModel, adapters: Adapters, where: str, caching: bool
) -> None:
    requests = requests_of(adapters["r5"])
    expected = {r.request_id: run(make_engine(base, [adapters["r5"]]), [r])[r.request_id] for r in requests}
    engine = make_engine(base, [adapters["r5"]], max_num_batched_tokens=128, enable_prefix_caching=caching)
    failed = out_of_memory(engine, lambda chunks: any(c.num_tokens > 60 for c in chunks), where)
    tokens, errors = recovered(engine, *requests)
    assert len(failed) == 1
    assert [*errors] == ["long"]
    assert isinstance(errors["long"], EngineError)
    assert "the step needed more memory than the device has; this request had the most of its" in str(errors["long"])
    assert tokens.pop("long") == []
    assert tokens == {name: expected[name] for name in tokens}


@pytest.mark.parametrize("where", ["forward", "sampler"])
def test_who_took_what_the_failed_step_should_have_written_computes_it(base: BaseModel, where: str) -> None:
    """All begin alike. The one that computes most of it fails with the step; one of the others lacks a token alone."""
    prompt = ids(100, 2)
    lengths = ((97, 3), (80, 5), (49, 0), (49, 0), (40, 3))
    asked = [request(str(i), [*prompt[:n], *ids(own, i)], max_tokens=9) for i, (n, own) in enumerate(lengths)]
    expected = {r.request_id: run(make_engine(base), [r])[r.request_id] for r in asked}
    engine = make_engine(base, max_num_batched_tokens=512)
    sizes: list[int] = []

    def fails(chunks: Sequence[Chunk]) -> bool:
        sizes.extend(chunk.num_tokens for chunk in chunks)
        return len(sizes) == len(chunks)  # the first one

    assert out_of_memory(engine, fails, where) == []
    tokens, errors = recovered(engine, *asked)
    assert sizes[:5] == [43, 17, 1, 37, 20]  # shortest first
    assert [*errors] == ["4"]
    assert {name: tokens[name] for name in expected.keys() - errors.keys()} == {
        name: answer for name, answer in expected.items() if name not in errors
    }


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
    tokens, errors = recovered(engine, *requests)
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
    _, errors = recovered(engine, *(request(str(i), ids(5 + i, i)) for i in range(3)))
    assert [*errors] == ["2", "1", "0"]
    assert len(failed) == 3
    low[0] = False
    after = request("after", ids(9))
    tokens, errors = recovered(engine, after)
    assert not errors
    assert tokens == run(make_engine(base), [after])


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),  # libraries without an error of their own
        ("CUBLAS_STATUS_ALLOC_FAILED", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_errors_of_a_step_are_the_engines_but_for_memory(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, message: str, is_memory: bool
) -> None:
    engine = make_engine(base)
    monkeypatch.setattr(engine._model, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError(message)))
    if is_memory:
        assert [*recovered(engine, request("one", ids(5)))[1]] == ["one"]
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run(engine, [request("one", ids(5))])


def test_where_no_request_is_left_to_end_the_error_is_the_engines(base: BaseModel) -> None:
    engine, error = make_engine(base), torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        engine._undo(error, [])
