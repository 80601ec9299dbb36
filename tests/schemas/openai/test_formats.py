"""Responses and chunks have OpenAI's fields, which its client reads, and vLLM's additions; templates write the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from loray.schemas.openai import ChatFormat, CompletionFormat, Usage
from loray.schemas.openai.formats import NO_EXTRAS, Choice, Chunks, Extras, assistant_message, chat_delta, usage_of
from loray.spec import Delta, TokenLogprob, ToolCallDelta
from tests.fixtures.answers import collected, delta, fmt

A = TokenLogprob(1, "é", -0.5, ((1, "é", -0.5), (2, "b", float("-inf"))), 1)
B = TokenLogprob(2, "bc", -1.0, ((1, "é", -0.5),), 1)
FIRST = TokenLogprob(5, "x", None, (), 0)
SECOND = TokenLogprob(9, "y", -3.0, ((1, "é", -0.5), (2, "b", -2.0)), 7)
both_formats = pytest.mark.parametrize("cls", [CompletionFormat, ChatFormat])


def whole(cls: Any, *choices: Choice, usage: Usage | None = None, **more: Any) -> Any:
    return json.loads(fmt(cls, **more).whole(choices, usage or Usage.of(3, 3)).to_json())


def test_completion_is_openais() -> None:
    choice = collected(delta("é", (A,)), delta("bc", (B,), "length", 3, 2))
    body = whole(CompletionFormat, choice, collected(delta("", None, "stop")))
    assert body == {
        "id": "x-1",
        "object": "text_completion",
        "created": 7,
        "model": "tone@3",
        "system_fingerprint": "f",
        "choices": [
            {
                "index": 0,
                "text": "ébc",
                "logprobs": {
                    "text_offset": [0, 1],
                    "token_logprobs": [-0.5, -1.0],
                    "tokens": ["é", "bc"],
                    "top_logprobs": [{"é": -0.5, "b": -9999.0}, {"é": -0.5, "bc": -1.0}],
                },
                "finish_reason": "length",
            },
            {"index": 1, "text": "", "logprobs": None, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }
    assert Completion.model_validate(body, strict=True).choices[0].text == "ébc"


def test_chat_completion_is_openais() -> None:
    body = whole(ChatFormat, collected(delta("é", (A,), "stop")))
    best = {"token": "é", "logprob": -0.5, "bytes": [195, 169]}
    other = {"token": "b", "logprob": -9999.0, "bytes": [98]}
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "é", "refusal": None},
            "logprobs": {"content": [best | {"top_logprobs": [best, other]}], "refusal": None},
            "finish_reason": "stop",
        }
    ]
    assert ChatCompletion.model_validate(body, strict=True).choices[0].message.content == "é"


def test_an_echoed_prompt_begins_without_a_logprob() -> None:
    logprobs = whole(CompletionFormat, collected(delta("xy", (FIRST, SECOND), "length")))["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, -3.0]
    assert logprobs["top_logprobs"] == [None, {"é": -0.5, "b": -2.0, "y": -3.0}]
    assert logprobs["text_offset"] == [0, 1]


@both_formats
def test_prompt_logprobs_are_vllms(cls: Any) -> None:
    plain = delta("a", None, "length")
    for one, expected in (
        (plain, "none"),
        (
            plain._replace(prompt_logprobs=(FIRST, SECOND)),
            [
                None,
                {
                    "9": {"logprob": -3.0, "rank": 7, "decoded_token": "y"},
                    "1": {"logprob": -0.5, "rank": 1, "decoded_token": "é"},
                    "2": {"logprob": -2.0, "rank": 2, "decoded_token": "b"},
                },
            ],
        ),
    ):
        body = whole(cls, collected(one))
        assert (body if cls is ChatFormat else body["choices"][0]).get("prompt_logprobs", "none") == expected


def test_text_offsets_continue_over_chunks() -> None:
    answer = fmt(CompletionFormat)
    assert answer.opening(0) is None
    bodies = [json.loads(answer.chunk(0, d).to_json()) for d in (delta("é", (A,)), delta("bc", (B,), "stop"))]
    assert [b["choices"][0]["logprobs"]["text_offset"] for b in bodies] == [[0], [1]]
    assert [b["choices"][0]["finish_reason"] for b in bodies] == [None, "stop"]
    assert "usage" not in bodies[0]


@both_formats
def test_usage_of_a_stream_is_its_last_chunk(cls: Any) -> None:
    answer = fmt(cls, include_usage=True)
    assert json.loads(answer.chunk(0, delta("a")).to_json())["usage"] is None
    last = json.loads(answer.usage_chunk(Usage.of(3, 4)).to_json())
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_chat_chunks_open_with_the_role_and_end_with_an_empty_delta() -> None:
    answer = fmt(ChatFormat)
    bodies = [answer.opening(1), answer.chunk(1, delta("a")), answer.chunk(1, delta("", None, "stop"))]
    choices = [json.loads(b.to_json())["choices"][0] for b in bodies]
    assert [c["delta"] for c in choices] == [{"role": "assistant", "content": ""}, {"content": "a"}, {}]
    assert choices[0] == {"index": 1, "delta": choices[0]["delta"], "logprobs": None, "finish_reason": None}
    assert choices[2]["finish_reason"] == "stop"
    for b in bodies:
        ChatCompletionChunk.model_validate_json(b.to_json(), strict=True)


def test_a_prompt_and_its_cached_tokens_count_once_however_many_choices() -> None:
    counts = ((3, 0), (3, 0), (40, 32), (40, 39))
    choices = [collected(delta("", None, "stop", n, 2)._replace(num_cached_tokens=cached)) for n, cached in counts]
    usage = json.loads(usage_of(choices, 2).to_json())
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (43, 8, 51)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}
    assert usage_of(choices[:2], 2) == Usage.of(3, 4)


# -- templates --------------------------------------------------------------------------------------------------------

LOGPROBS = (TokenLogprob(5, "é", -0.5, ((5, "é", -0.5), (6, "\n", -1.25)), 1),)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ['"', "\\", "\x00\x1f\x7f\u2028"]
)
deltas = st.tuples(
    st.integers(0, 3),
    st.builds(
        lambda text, finish, logprobs: Delta(text, (1,), logprobs, finish, 3, 4),
        texts,
        st.sampled_from([None, None, "stop", "length"]),
        st.sampled_from([None, None, (), LOGPROBS]),
    ),
)


@pytest.mark.parametrize("format_of", [CompletionFormat, ChatFormat])
@settings(max_examples=150, deadline=None)
@given(
    usage=st.booleans(),
    model=st.sampled_from(["base", "tone@3", "@text", 'a"@id"b', "@fingerprint", "ü"]),
    many=st.lists(deltas),
)
def test_templates_write_what_the_models_write(format_of: Any, usage: bool, model: str, many: list[Any]) -> None:
    fields = ("cmpl-0123", 1_700_000_000, model, "loray-0.1-abc", usage)
    chunks, oracle = Chunks(format_of(*fields), "data: ", "\n\n"), format_of(*fields)
    opened = set()
    for index, one in many:
        expected = []
        if index not in opened and (opening := oracle.opening(index)) is not None:
            expected.append(opening)
        opened.add(index)
        if one.text or one.finish_reason or one.logprobs:
            expected.append(oracle.chunk(index, one))
        assert chunks.push(index, one) == "".join(f"data: {chunk.to_json()}\n\n" for chunk in expected)


# -- vLLM's additions -------------------------------------------------------------------------------------------------

PROMPTS = ((1, 2, 3), (4, 5))
DELTAS = [
    Delta("a", (7,), None, None, 3, 1),
    Delta("", (8,), None, None, 3, 2),
    Delta("b", (9,), None, "stop", 3, 3, stop_reason="x"),
]


def chunks_of(cls: Any, extras: Extras, index: int = 0, *, include_usage: bool = False) -> list[Any]:
    chunks = Chunks(cls("id", 1, "m", "f", include_usage, extras), after="\n")
    return [json.loads(line) for d in DELTAS for line in chunks.push(index, d).splitlines()]


def whole_of(cls: Any, extras: Extras) -> Any:
    return whole(cls, collected(*DELTAS), collected(*DELTAS), extras=extras)


def test_token_ids_of_completions() -> None:
    extras = Extras(PROMPTS, token_ids=True)
    choices = whole_of(CompletionFormat, extras)["choices"]
    assert [c["prompt_token_ids"] for c in choices] == [[1, 2, 3], [4, 5]]
    assert [c["token_ids"] for c in choices] == [[7, 8, 9]] * 2
    streamed = [c["choices"][0] for c in chunks_of(CompletionFormat, extras, 1)]
    assert [c["token_ids"] for c in streamed] == [[7], [8], [9]]  # also those whose text comes later
    assert [c.get("prompt_token_ids") for c in streamed] == [[4, 5], None, None]


def test_token_ids_of_chats() -> None:
    extras = Extras(PROMPTS[:1] * 2, token_ids=True)
    body = whole_of(ChatFormat, extras)
    assert body["prompt_token_ids"] == [1, 2, 3]
    assert [c["token_ids"] for c in body["choices"]] == [[7, 8, 9]] * 2
    opening, *streamed = chunks_of(ChatFormat, extras)
    assert opening["prompt_token_ids"] == [1, 2, 3]
    assert [c["choices"][0]["token_ids"] for c in streamed] == [[7], [8], [9]]


@both_formats
def test_what_stopped_an_answer(cls: Any) -> None:
    assert whole_of(cls, NO_EXTRAS)["choices"][0]["stop_reason"] == "x"
    *before, last = chunks_of(cls, NO_EXTRAS)
    assert last["choices"][0]["stop_reason"] == "x"
    assert not any("stop_reason" in c["choices"][0] or "token_ids" in c["choices"][0] for c in before)


@both_formats
def test_usage_in_every_chunk(cls: Any) -> None:
    usages = [c["usage"] for c in chunks_of(cls, Extras(PROMPTS, usage=True), include_usage=True)]
    counts = [(u["prompt_tokens"], u["completion_tokens"]) for u in usages]
    assert counts == ([(3, 0)] if cls is ChatFormat else []) + [(3, 1), (3, 2), (3, 3)]
    assert "usage" not in chunks_of(cls, Extras(PROMPTS, usage=True))[0]  # as in vLLM, include_usage is needed


# -- calls of tools ---------------------------------------------------------------------------------------------------

CALLS = [
    ToolCallDelta(0, "call_1", "add", ""),
    ToolCallDelta(0, None, None, '{"a"'),
    ToolCallDelta(0, None, None, ": 1}"),
    ToolCallDelta(1, "call_2", "now", ""),
    ToolCallDelta(1, None, None, "{}"),
]


def test_calls_in_messages_and_chunks() -> None:
    both = '"tool_calls":[{"id":"call_1","type":"function","function":{"name":"add","arguments":"{\\"a\\": 1}"}},'
    both += '{"id":"call_2","type":"function","function":{"name":"now","arguments":"{}"}}]}'
    called, said = Choice(tool_calls=[*CALLS]), Choice(["So"], tool_calls=[*CALLS])
    assert assistant_message(called).to_json() == f'{{"role":"assistant","content":null,"refusal":null,{both}'
    assert assistant_message(said).content == "So"
    assert assistant_message(Choice()).to_json() == '{"role":"assistant","content":"","refusal":null}'

    def written(text: str = "", *calls: ToolCallDelta) -> str:
        return chat_delta(delta(text)._replace(tool_calls=calls)).to_json()

    begun = '{"tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"add","arguments":""}}]}'
    assert written("", CALLS[0]) == begun
    assert written("", *CALLS[1:3]) == '{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\": 1}"}}]}'
    assert written("a", CALLS[1]).startswith('{"content":"a","tool_calls":')
    assert chat_delta(delta("", None, "tool_calls")).to_json() == "{}"
    assert written() == '{"content":""}'


def test_thoughts_are_apart_from_the_text() -> None:
    thought = delta(output=2)._replace(reasoning="so", num_reasoning_tokens=2)
    last = delta("a", None, "stop", output=4)._replace(num_reasoning_tokens=2)
    whole = fmt(ChatFormat).whole([choice := collected(thought, last)], usage_of([choice], 1))
    message = whole.choices[0].message
    assert message.to_json() == (
        '{"role":"assistant","content":"a","refusal":null,"reasoning":"so","reasoning_content":"so"}'
    )
    assert whole.usage.to_json().endswith('"completion_tokens_details":{"reasoning_tokens":2}}')
    never_ended = fmt(ChatFormat).whole([collected(thought._replace(finish_reason="length"))], whole.usage)
    assert never_ended.choices[0].message.content is None
    hidden = collected(thought._replace(reasoning=""), last)
    assert assistant_message(hidden).to_json() == '{"role":"assistant","content":"a","refusal":null}'


@pytest.mark.parametrize("extras", [Extras(), Extras([(1, 2, 3)], usage=True)], ids=["plain", "usage"])
def test_no_chunk_has_a_thought_and_a_text(extras: Extras) -> None:
    """They are also those that the format itself writes."""
    form = fmt(ChatFormat, include_usage=True, extras=extras)
    chunks = Chunks(form)
    thought = delta(output=2)._replace(reasoning='"so"', num_reasoning_tokens=2)
    begun = chunks.push(0, thought)
    assert begun == form.opening(0).to_json() + form.chunk(0, thought).to_json()
    assert '"delta":{"reasoning":"\\"so\\"","reasoning_content":"\\"so\\""}' in begun
    both = thought._replace(text="a")
    first, second = (json.loads(part) for part in chunks.push(0, both).replace("}{", "}\n{").split("\n"))
    assert first["choices"][0]["delta"] == {"reasoning": '"so"', "reasoning_content": '"so"'}
    assert second["choices"][0]["delta"] == {"content": "a"}
    ended = thought._replace(finish_reason="length")
    assert chunks.push(0, ended) == form.chunk(0, ended).to_json()
