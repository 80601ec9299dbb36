"""Thoughts in the engine: budgets and constraints, of models that want given tokens, with guesses and resumption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.engine.request import Request
from loray.errors import RequestError
from loray.spec import Constraint, GenerateRequest, Thinking, Tool, ToolUse
from loray.text.tools import calls_constraint
from tests.fixtures.constraints import answers
from tests.fixtures.engines import BLOCK_BYTES, fill_up, make_engine, outputs, request
from tests.fixtures.guesses import Told
from tests.fixtures.thinking import (
    END_THINK,
    END_TOOL_CALL,
    EOS,
    QWEN3,
    THINK,
    TOOL_CALL,
    Wishes,
    text_ids,
    thinking_tokenizer,
)

YES = Constraint.from_choice(["yes", "no"])
SCHEMA = Constraint.from_schema({"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]})
TOKENS = {"<tool_call>": TOOL_CALL, "</tool_call>": END_TOOL_CALL}
CALL = calls_constraint(ToolUse((Tool("add", {"type": "object"}),), "required"), "hermes", TOKENS.get)
HM = text_ids("hm {1}<tool_call>")


@pytest.fixture(scope="module")
def base(thinking_base: Callable[[str], BaseModel]) -> BaseModel:
    return thinking_base("qwen3")


def thought(state: Any = "may be", budget: int | None = None) -> Thinking:
    return Thinking(start_id=THINK, end_id=END_THINK, state=state, budget=budget)


# name → (what is asked, the thought that the model wants, the content that it wants, the tokens that come)
CASES: dict[str, tuple[dict[str, Any], Sequence[int], Sequence[int], Sequence[int]]] = {
    "a choice": (
        {"thinking": thought(), "structured": YES},
        [THINK, *HM, END_THINK],
        text_ids("yes"),
        [THINK, *HM, END_THINK, *text_ids("yes"), EOS],
    ),
    "a choice that it does not want": (
        {"thinking": thought("open"), "structured": YES},
        [*HM, END_THINK],
        text_ids("\nMaybe"),
        [*HM, END_THINK, *text_ids("no"), EOS],
    ),
    "a schema, in a thought that the end of the answer closes": (
        {"thinking": thought(), "structured": SCHEMA, "stop_token_ids": (70,)},
        [THINK, *HM, EOS],
        text_ids('{"a": 2}'),
        [THINK, *HM, END_THINK, *text_ids('{"a": 2}'), EOS],
    ),
    "a stop token closes it as well": (
        {"thinking": thought("open"), "structured": SCHEMA, "stop_token_ids": (70,)},
        [70],
        text_ids('{"a": 2}'),
        [END_THINK, *text_ids('{"a": 2}'), EOS],
    ),
    "no thought": ({"thinking": thought(), "structured": YES}, text_ids("yes"), (), [*text_ids("yes"), EOS]),
    "thinking is off": (
        {"structured": YES},
        [THINK, *text_ids("yes")],
        (),
        [*text_ids("nes")[:1], *text_ids("o"), EOS],
    ),
    "a budget": (
        {"thinking": thought(budget=4)},
        [THINK, *HM, END_THINK],
        text_ids("So"),
        [THINK, *HM[:4], END_THINK, *text_ids("So"), EOS],
    ),
    "a budget of nothing": (
        {"thinking": thought("open", 0)},
        HM,
        text_ids("So"),
        [END_THINK, *text_ids("So"), EOS],
    ),
    "a budget that is not used up": (
        {"thinking": thought("open", len(HM) + 1)},
        [*HM, END_THINK],
        [*text_ids("So"), THINK, *HM, *HM],
        [*HM, END_THINK, *text_ids("So"), THINK, *HM, *HM, EOS],
    ),
    "a budget that is just enough": (
        {"thinking": thought("open", len(HM))},
        [*HM, END_THINK],
        text_ids("So"),
        [*HM, END_THINK, *text_ids("So"), EOS],
    ),
    "a budget before a call": (
        {"thinking": thought(budget=2), "structured": CALL},
        [THINK, *HM, END_THINK],
        [TOOL_CALL, *text_ids('\n{"name": "add", "arguments": {}}\n'), END_TOOL_CALL],
        [THINK, *HM[:2], END_THINK, TOOL_CALL, *text_ids('\n{"name": "add", "arguments": {}}\n'), END_TOOL_CALL, EOS],
    ),
    "the end in a free thought": ({"thinking": thought("open", 99)}, [*HM, EOS], (), [*HM, EOS]),
    "no end": ({"thinking": thought("open"), "structured": YES, "max_tokens": 7}, HM * 9, (), (HM * 9)[:7]),
}


def wanted(request_id: str) -> tuple[Sequence[int], Sequence[int]]:
    return CASES[request_id.partition(":")[0]][1:3]


EXPECTED = {name: (list(ids), "stop" if ids[-1] == EOS else "length") for name, (*_, ids) in CASES.items()}


def asked(**more: Any) -> list[GenerateRequest]:
    defaults: dict[str, Any] = {"max_tokens": 60, "ignore_eos": False}
    return [request(name, range(20, 45), **defaults | params | more) for name, (params, *_) in CASES.items()]


def test_what_a_model_wants_in_its_thought_comes_and_its_content_is_held(base: BaseModel) -> None:
    engine = make_engine(base)
    Wishes(engine, wanted)
    assert answers(engine, asked()) == EXPECTED
    assert not engine._grammars._answers


def test_log_probabilities_are_those_of_each_token(base: BaseModel) -> None:
    """The token that closes a thought against the model's wish has its own, of unchanged logits."""
    engine = make_engine(base)
    Wishes(engine, wanted)
    found: dict[str, list[Any]] = {name: [] for name in CASES}
    tokens: dict[str, list[int]] = {name: [] for name in CASES}
    for out in outputs(engine, *asked(logprobs=1)):
        assert out.token_id is not None
        assert out.logprobs is not None
        tokens[out.request_id].append(out.token_id)
        found[out.request_id].append(out.logprobs)
    assert tokens == {name: ids for name, (ids, _) in EXPECTED.items()}
    cut = found["a budget"][5]
    assert cut.top[0][0] == HM[4]
    assert (cut.rank, math.isclose(cut.top[0][1] - cut.logprob, 1.0 + END_THINK, rel_tol=1e-5)) == (END_THINK + 1, True)


def test_guesses_change_no_token(base: BaseModel) -> None:
    engine = make_engine(base)
    Wishes(engine, wanted)
    Told(engine, {name: ids for name, (ids, _) in EXPECTED.items()}, wrong=0.1)
    assert answers(engine, asked()) == EXPECTED
    assert engine.stats().num_accepted_tokens > 20


def test_it_goes_on_after_preemption_in_the_middle(base: BaseModel) -> None:
    engine = make_engine(base, pool_bytes=8 * BLOCK_BYTES, max_num_seqs=5, enable_prefix_caching=False)
    fill_up(engine)
    Wishes(engine, wanted)
    assert answers(engine, asked()) == EXPECTED
    assert engine.stats().num_preemptions > 0


def test_it_goes_on_at_another_engine_after_any_token(base: BaseModel) -> None:
    engine = make_engine(base)
    Wishes(engine, wanted)
    for one in asked():
        ids, how = EXPECTED[one.request_id]
        parts = [
            replace(one, request_id=f"{one.request_id}:{k}", output_ids=tuple(ids[:k])) for k in range(1, len(ids))
        ]
        got = answers(engine, parts)
        assert got == {f"{one.request_id}:{k}": (ids[k:], how) for k in range(1, len(ids))}


def test_choices_of_one_request_think_for_as_long_as_they_like(base: BaseModel) -> None:
    engine = make_engine(base)
    own = {f"r-{i}": ([THINK, *HM * i, END_THINK], text_ids(["yes", "no"][i % 2])) for i in range(4)}
    Wishes(engine, own.__getitem__)
    params: dict[str, Any] = {"max_tokens": 80, "ignore_eos": False, "thinking": thought(), "structured": YES}
    got = answers(engine, [request(f"r-{i}", range(20, 45), **params) for i in range(4)])
    assert got == {name: ([*first, *then, EOS], "stop") for name, (first, then) in own.items()}


def test_a_random_models_content_is_held(base: BaseModel) -> None:
    """Whatever it thinks, within its budget: beside others, which get what they get without it."""
    number = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    hot: dict[str, Any] = {"temperature": 1.5, "max_tokens": 90, "ignore_eos": False}
    hot["structured"] = Constraint.from_schema(number, whitespace="")
    free = [request(f"free-{i}", range(9, 30), temperature=1.0, seed=i, max_tokens=40) for i in range(3)]
    held = [
        request(f"held-{i}", range(20, 45), seed=i, thinking=thought(["open", "may be"][i % 2], i), **hot)
        for i in range(12)
    ]
    got = answers(make_engine(base), [*held[:4], *free, *held[4:]])
    assert {n: a for n, a in got.items() if n[:4] == "free"} == answers(make_engine(base), free)
    num_thoughts = 0
    for i in range(12):
        ids, how = got[f"held-{i}"]
        assert how == "stop"
        content = ids
        if END_THINK in ids:
            at = ids.index(END_THINK)
            num_thoughts += 1
            assert at - (ids[0] == THINK) <= i
            assert EOS not in ids[:at]
            content = ids[at + 1 :]
        assert json.loads(thinking_tokenizer(QWEN3).decode(content[:-1]))["a"] in (1, 2)
    assert num_thoughts >= 6


def test_a_token_that_closes_a_thought_is_known_beforehand(base: BaseModel) -> None:
    """While one of the next tokens may close it, steps are not launched before the last one has been read."""
    engine = make_engine(base)
    Wishes(engine, lambda _: ([THINK, *HM, END_THINK], text_ids("So")))
    engine.add(request("r", range(20, 45), max_tokens=60, ignore_eos=False, thinking=thought(budget=5)))
    (made,) = engine._requests.values()
    noted: dict[int, bool] = {}
    while engine.has_work:
        noted[len(made.output_ids)] = made.ends_thought
        engine.step()
    assert noted == {n: 4 <= n <= 6 for n in range(len(noted))}


def test_markers_are_of_the_vocabulary(base: BaseModel) -> None:
    outside = Thinking(start_id=THINK, end_id=10**6)
    with pytest.raises(RequestError, match="thinking: a token id is outside the vocabulary"):
        make_engine(base).check(request("r", (1, 2), thinking=outside))
    assert not Request(request("r", (1, 2), thinking=thought()), 0).ends_thought
