"""A request that another engine has begun: the answer goes on as if that engine had ended it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.engine.engine import Engine
from loray.engine.request import TokenOutput
from loray.errors import ContextLengthExceeded, LorayError, Overloaded, RequestError
from loray.spec import Constraint, GenerateRequest
from tests.engine.adapters import TestAdapter
from tests.engine.harness import make_engine, request, run

PROMPT = [(11 * i) % 250 for i in range(21)]
NUM_TOKENS = 20
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "seeded penalties": {"temperature": 1.2, "seed": 3, "frequency_penalty": 0.6, "bad_words": ((9, 17), (4,))},
    "minimum": {"min_tokens": 12, "ignore_eos": False, "temperature": 1.0, "seed": 1, "stop_token_ids": (*range(128),)},
    "logprobs": {"temperature": 0.8, "seed": 5, "logprobs": 3},
    "scored prompt": {"prompt_logprobs": 1, "logprobs": 0},
}


def outputs(engine: Engine, asked: GenerateRequest) -> list[TokenOutput]:
    engine.add(asked)
    out: list[TokenOutput] = []
    while engine.has_work:
        # Without those of a part of the prompt.
        out += [o for o in engine.step() if o.token_id is not None or o.error is not None]
        engine.check_integrity()
    assert [o.error for o in out if o.error is not None] == []
    return out


def tokens(out: list[TokenOutput]) -> tuple[int, ...]:
    return tuple(o.token_id for o in out if o.token_id is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_goes_on_after_any_of_its_tokens(base: BaseModel, kind: str) -> None:
    whole = outputs(make_engine(base), request("r", PROMPT, max_tokens=NUM_TOKENS, **KINDS[kind]))
    assert len(set(tokens(whole))) > 3
    asked = request("r", PROMPT, max_tokens=NUM_TOKENS, **KINDS[kind])
    again = make_engine(base)
    for k in (1, 2, 7, len(whole) - 1):
        rest = outputs(again, replace(asked, request_id=str(k), output_ids=tokens(whole)[:k]))
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
def test_an_adapter_that_the_other_engine_has_not_loaded_yet(
    base: BaseModel, adapters: dict[str, TestAdapter], name: str
) -> None:
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
    whole = outputs(make_engine(base), asked)
    ids = tokens(whole)
    assert whole[-1].finish_reason == "stop"
    again = make_engine(base)
    for k in range(1, len(ids)):
        rest = outputs(again, replace(asked, request_id=str(k), output_ids=ids[:k]))
        assert tokens(rest) == ids[k:]
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(base.path / "tokenizer.json")).decode(list(ids), skip_special_tokens=True)
    assert json.loads(text).keys() == {"name", "number"}


def test_a_continued_request_is_neither_late_nor_one_too_many(base: BaseModel) -> None:
    engine = make_engine(base, max_queued=1, max_num_seqs=1, ttft_slo_s=1e-9)
    for name in ("a", "b", "c"):
        engine.add(replace(request(name, PROMPT, max_tokens=4), output_ids=(1, 2)))
    with pytest.raises(Overloaded):
        engine.add(request("new", PROMPT))
    out: dict[str, int] = {}
    while engine.has_work:
        for o in engine.step():
            assert o.error is None
            out[o.request_id] = out.get(o.request_id, 0) + 1
    assert out == {"a": 2, "b": 2, "c": 2}
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
