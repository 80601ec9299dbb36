"""Request bodies: every form, every default, and fields that are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from loray.errors import RequestError
from loray.schemas.openai import ChatCompletionRequest, CompletionRequest, parse


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, {"model": "m", "prompt": "p"} | fields)


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        ("", ("",)),
    ],
)
def test_every_form_of_prompt(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [True], [-1], [1 << 31], {"a": 1}, 3, [[1], "a"], [1.0]])
def test_malformed_prompt_names_the_field(prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt: must be a string, a list") as e:
        completion(prompt=prompt)
    assert e.value.param == "prompt"


def test_defaults_are_openais() -> None:
    request = completion()
    assert request.requested_max_tokens is None
    assert request.default_max_tokens == 16
    params = request.sampling(max_tokens=16, choice=0)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.seed, params.stop, params.ignore_eos, params.logprobs) == (None, (), False, None)
    assert chat().default_max_tokens is None


def test_every_field_reaches_the_sampling_parameters() -> None:
    given = {"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1}
    given |= {"repetition_penalty": 1.2, "min_tokens": 2, "skip_special_tokens": False, "prompt_logprobs": 4}
    request = completion(
        **given, seed=5, stop="x", ignore_eos=True, logprobs=3, stop_token_ids=[4, 5], logit_bias={"5": -1, "7": 2.5}
    )
    params = request.sampling(max_tokens=9, choice=2)
    assert (params.stop_token_ids, params.logit_bias) == ((4, 5), {5: -1.0, 7: 2.5})
    assert {k: getattr(params, k) for k in given} == given
    assert (params.max_tokens, params.seed, params.stop, params.ignore_eos, params.logprobs) == (9, 7, ("x",), True, 3)


def test_top_k_minus_one_is_off() -> None:
    assert completion(top_k=-1).sampling(max_tokens=1, choice=0).top_k == 0


def test_null_is_absent() -> None:
    assert completion(temperature=None, stop=None, tools=None, logit_bias=None, n=None).temperature == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]),
        ("audio", {}),
        ("modalities", ["text", "audio"]),
        ("suffix", "x"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(field: str, value: Any) -> None:
    for make in (completion, chat):
        with pytest.raises(RequestError, match=f"^{field} is not supported: ") as e:
            make(**{field: value})
        assert e.value.param == field


def test_only_completions_echo() -> None:
    assert completion(echo=True).echo
    with pytest.raises(RequestError, match=r"^echo is not supported: ") as e:
        chat(echo=True)
    assert e.value.param == "echo"


def test_an_echo_with_logprobs_asks_for_those_of_the_prompt() -> None:
    for fields, expected in (
        ({}, None),
        ({"logprobs": 1}, None),
        ({"echo": True}, None),
        ({"echo": True, "logprobs": 0}, 0),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 3}, 3),
        ({"prompt_logprobs": 2}, 2),
    ):
        assert completion(**fields).sampling(max_tokens=0, choice=0).prompt_logprobs == expected


def test_values_without_effect_are_accepted() -> None:
    completion(spaces_between_special_tokens=True, logits_processors=[])
    completion(echo=False, suffix="", best_of=2, n=2, logit_bias={}, repetition_penalty=1)
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, store=False, metadata={}, user="me")


def test_fields_that_clients_send_by_default_are_accepted() -> None:
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": False}
    hints = {"prompt_cache_key": "k", "safety_identifier": "s", "metadata": {"run": "7"}, "store": True}
    hints |= {"reasoning_effort": "low", "verbosity": "low", "service_tier": "flex", "include_reasoning": False}
    assert completion(stream=True, stream_options=options, **hints).include_usage
    request = chat(tool_choice="auto", stream=True, stream_options={"include_obfuscation": True}, **hints)
    assert not request.include_usage


def test_top_p_zero_is_the_best_token_alone() -> None:
    assert 0 < completion(top_p=0).sampling(max_tokens=1, choice=0).top_p < 1e-6


def test_best_of_beyond_n() -> None:
    with pytest.raises(RequestError, match="best_of is not supported") as e:
        completion(best_of=3)
    assert e.value.param == "best_of"


def test_unknown_fields_are_named() -> None:
    with pytest.raises(RequestError, match=r"unknown field .temperatur.; known fields: .*temperature") as e:
        completion(temperatur=1)
    assert e.value.param == "temperatur"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"stop_token_ids": [1 << 40]}, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"metadata": "x"}, "metadata"),
        ({"stop": 3}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_wrong_values_name_their_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as e:
        completion(**fields)
    assert e.value.param == param
    assert param.split(".")[-1] in str(e.value)


def test_all_mistakes_are_in_one_message() -> None:
    with pytest.raises(RequestError, match=r"temperature: .*; top_p: "):
        completion(temperature=-1, top_p=2)


def test_the_number_of_prompts_is_checked_before_the_prompts() -> None:
    with pytest.raises(RequestError, match="has 129 prompts; at most 128"):
        completion(prompt=["a"] * 128 + [3])


def test_one_message_is_short_whatever_was_sent() -> None:
    for fields in (
        {"x" * 100_000: 1},
        {f"x{i}": 1 for i in range(2000)},
        {"messages": [{"role": "user", "content": [{"type": "x" * 100_000}]}]},
        {"messages": [{}] * 10_000},
        {"messages": [{f"x{i}": 1 for i in range(2000)}]},
        {"stop": ["a"] * 10_000},
    ):
        with pytest.raises(RequestError) as e:
            chat(**fields)
        assert len(str(e.value)) < 10_000
    with pytest.raises(RequestError, match=r"and 1,992 more mistakes$"):
        completion(**{f"x{i}": 1 for i in range(2000)})


def test_body_must_be_an_object() -> None:
    with pytest.raises(RequestError, match="JSON object"):
        parse(CompletionRequest, ["model"])


def test_messages_are_text_or_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert [m.for_template() for m in request.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
    ]


def test_a_response_message_is_accepted_as_a_request_message() -> None:
    answer = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
        "reasoning_content": "I thought",
    }
    assert chat(messages=[answer]).messages[0].for_template() == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "'image_url' are not supported",
        ),
        ({"role": "robot", "content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0: content is required"),
        ({"role": "user", "content": []}, "messages.0.content: must be a string"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "tool_calls.0.function' is required"),
        ({"role": "user", "content": "x", "mood": "good"}, "unknown field 'messages.0.mood'"),
        ("hi", "messages.0"),
    ],
)
def test_invalid_messages(message: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match) as e:
        chat(messages=[message])
    assert (e.value.param or "").startswith("messages.0")


def test_no_messages() -> None:
    with pytest.raises(RequestError, match="messages"):
        chat(messages=[])


def test_chat_logprobs() -> None:
    assert chat().num_logprobs is None
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).num_logprobs == 4
    with pytest.raises(RequestError, match="logprobs: true") as e:
        chat(top_logprobs=4)
    assert e.value.param == "top_logprobs"


def test_both_names_of_max_tokens() -> None:
    assert chat(max_completion_tokens=3).requested_max_tokens == 3
    assert chat(max_tokens=3).requested_max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=3).requested_max_tokens == 3
    with pytest.raises(RequestError, match="differ"):
        chat(max_tokens=3, max_completion_tokens=4)
