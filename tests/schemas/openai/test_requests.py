"""Request bodies: every form, every default, tools, and fields that are refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from loray.errors import RequestError
from loray.schemas.openai import ChatCompletionRequest, CompletionRequest, parse
from loray.schemas.openai.requests import for_template
from loray.spec import Tool, ToolUse

PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}}}
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": PARAMETERS}}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "now"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, {"model": "m", "prompt": "p"} | fields)


def chat(*messages: Any, **fields: Any) -> ChatCompletionRequest:
    given = list(messages) or [{"role": "user", "content": "hi"}]
    return parse(ChatCompletionRequest, {"model": "m", "messages": given} | fields)


def refusal(make: Any, *args: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as e:
        make(*args, **fields)
    return e.value


def test_every_form_of_prompt() -> None:
    for prompt, expected in (
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        ("", ("",)),
    ):
        assert completion(prompt=prompt).prompt == expected


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [True], [-1], [1 << 31], {"a": 1}, 3, [[1], "a"], [1.0]])
def test_malformed_prompt_names_the_field(prompt: Any) -> None:
    refused = refusal(completion, prompt=prompt)
    assert ("prompt: must be a string, a list" in str(refused), refused.param) == (True, "prompt")


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


def test_values_of_their_own_meaning() -> None:
    assert completion(top_k=-1).sampling(max_tokens=1, choice=0).top_k == 0
    assert 0 < completion(top_p=0).sampling(max_tokens=1, choice=0).top_p < 1e-6  # the best token alone
    assert completion(temperature=None, stop=None, tools=None, logit_bias=None, n=None).temperature == 1.0  # absent


def test_what_is_not_implemented_is_refused_by_name() -> None:
    wrong = {"functions": [{}], "audio": {}, "modalities": ["text", "audio"], "suffix": "x"}
    assert completion(echo=True).echo
    for make, fields in ((completion, wrong | {"best_of": 3}), (chat, wrong | {"echo": True})):
        for field, value in fields.items():
            refused = refusal(make, **{field: value})
            assert str(refused).startswith(f"{field} is not supported")
            assert refused.param == field


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


def test_unknown_fields_are_named() -> None:
    refused = refusal(completion, colour=1)
    assert re.search(r"unknown field .colour.; known fields: .*temperature", str(refused))
    assert (refused.param, refused.code) == ("colour", "unknown_parameter")


@pytest.mark.parametrize(
    ("param", "values"),
    {
        "temperature": [2.5, "1"],
        "top_p": [-0.1],
        "n": [0, 129, True],
        "max_tokens": [-1],
        "min_tokens": [17],
        "repetition_penalty": [0],
        "stop_token_ids": [["a"], 5, [1] * 129, [1 << 40]],
        "logit_bias": [{"a": 1}, [1], {str(i): 1 for i in range(1025)}, {"-1": 1}],
        "prompt_logprobs": [21],
        "truncate_prompt_tokens": [0],
        "logprobs": [21],
        "stop": [[""], ["a"] * 17, "a" * 257, 3],
        "metadata": ["x"],
        "stream_options": [{"include_usage": True}],
        "model": ["", None],
    }.items(),
)
def test_wrong_values_name_their_field(param: str, values: list[Any]) -> None:
    for value in values:
        refused = refusal(completion, **{param: value})
        assert refused.param == param
        assert param in str(refused)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ],
)
def test_wrong_values_together_name_one_field(fields: dict[str, Any], param: str) -> None:
    refused = refusal(completion, **fields)
    assert refused.param == param
    assert param.split(".")[-1] in str(refused)


def test_messages_about_a_whole_body() -> None:
    for body, said in (
        ({"temperature": -1, "top_p": 2}, r"temperature: .*; top_p: "),  # all mistakes are in one message
        ({"prompt": ["a"] * 128 + [3]}, "has 129 prompts; at most 128"),  # before the prompts
        ({f"x{i}": 1 for i in range(2000)}, r"and 1,992 more mistakes$"),
    ):
        assert re.search(said, str(refusal(completion, **body)))
    with pytest.raises(RequestError, match="JSON object"):
        parse(CompletionRequest, ["model"])


def test_one_message_is_short_whatever_was_sent() -> None:
    for fields in (
        {"x" * 100_000: 1},
        {f"x{i}": 1 for i in range(2000)},
        {"messages": [{"role": "user", "content": [{"type": "x" * 100_000}]}]},
        {"messages": [{}] * 10_000},
        {"messages": [{f"x{i}": 1 for i in range(2000)}]},
        {"stop": ["a"] * 10_000},
    ):
        assert len(str(refusal(chat, **fields))) < 10_000


def test_messages_are_text_or_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert [m.for_template() for m in request.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
    ]


def test_a_response_message_is_accepted_as_a_request_message() -> None:
    nothing = {"refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    request = chat({"role": "assistant", "content": "x"} | nothing)
    assert request.messages[0].for_template() == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"reasoning_content": "hm"}, "hm"),
        ({"reasoning": "hm", "reasoning_content": "hm"}, "hm"),
        ({"reasoning": "hm", "content": None}, "hm"),
        ({"reasoning": {"effort": "low"}}, None),
        ({"reasoning": None, "reasoning_content": ""}, None),
        ({"reasoning": "hm", "role": "user"}, None),
    ],
)
def test_what_was_thought_goes_to_the_template(given: dict[str, Any], kept: str | None) -> None:
    message = chat({"role": "assistant", "content": "x"} | given).messages[0]
    assert message.for_template().get("reasoning_content") == kept
    assert message.num_characters == len(message.content) + len(kept or "")


def test_how_long_a_model_thinks() -> None:
    def asked(**fields: Any) -> tuple[Any, int | None]:
        request = chat(**fields)
        return request.template_variables.get("enable_thinking"), request.thinking_budget

    assert asked() == (None, None)
    assert asked(reasoning_effort="none") == asked(reasoning_effort="minimal") == (False, 0)
    assert asked(reasoning_effort="low") == (None, 1024)
    assert asked(reasoning_effort="medium") == (None, 8192)
    assert asked(reasoning_effort="high") == asked(reasoning_effort="xhigh") == (None, None)
    assert asked(reasoning_effort="low", thinking_token_budget=5) == (None, 5)
    on, off = {"enable_thinking": True}, {"enable_thinking": False}
    assert asked(reasoning_effort="none", chat_template_kwargs=on) == (True, None)
    assert asked(reasoning_effort="high", thinking_token_budget=5, chat_template_kwargs=off) == (False, 0)
    given = chat(reasoning_effort="low", thinking_token_budget=0, chat_template_kwargs=on).thinking_fields
    assert given == ["reasoning_effort", "thinking_token_budget", "chat_template_kwargs.enable_thinking"]
    assert refusal(chat, thinking_token_budget=-1).param == "thinking_token_budget"


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url' are not supported"),
        ({"role": "robot", "content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0: content is required"),
        ({"role": "user", "content": []}, "messages.0.content: must be a string"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "tool_calls.0.function' is required"),
        ({"role": "user", "content": "x", "mood": "good"}, "unknown field 'messages.0.mood'"),
        ("hi", "messages.0"),
        ({"role": "tool", "content": "2"}, "tool_call_id"),
        ({"role": "user", "content": "2", "tool_calls": [CALL]}, "only an assistant's message"),
        ({"role": "assistant"}, "content is required"),
        ({"role": "function", "name": "f", "content": "2"}, "use tools"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "use tools"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {"arguments": "{}"}}]}, "is required"),
    ],
)
def test_invalid_messages(message: Any, match: str) -> None:
    refused = refusal(chat, message)
    assert match in str(refused)
    assert (refused.param or "").startswith("messages.0")


def test_chat_logprobs() -> None:
    assert chat().num_logprobs is None
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).num_logprobs == 4
    assert refusal(chat, top_logprobs=4).param == "top_logprobs"


def test_both_names_of_max_tokens() -> None:
    for fields in ({"max_completion_tokens": 3}, {"max_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        assert chat(**fields).requested_max_tokens == 3
    assert "differ" in str(refusal(chat, max_tokens=3, max_completion_tokens=4))


# -- tools ------------------------------------------------------------------------------------------------------------


def use(**fields: Any) -> ToolUse | None:
    return chat(**fields).tool_use


def test_what_a_request_asks_for() -> None:
    tools = (Tool("add", PARAMETERS, "adds"), Tool("now", {"type": "object", "properties": {}}))
    assert use(tools=[ADD, NOW]) == ToolUse(tools)
    assert use(tools=[ADD, NOW], tool_choice="required", parallel_tool_calls=False) == ToolUse(tools, "required", False)
    named = use(tools=[ADD, NOW], tool_choice=NAMED)
    assert named is not None
    assert (named.callable, named.forced, named.num_calls) == (tools[1:], True, 1)
    allowed = {"mode": "required", "tools": [NAMED]}
    of_two = use(tools=[ADD, NOW], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert of_two == ToolUse(tools[1:], "required")
    strict = use(tools=[{"type": "function", "function": NOW["function"] | {"strict": True, "parameters": None}}])
    assert strict is not None
    assert strict.tools[0].strict
    for nothing in ({}, {"tools": []}, {"tools": [ADD], "tool_choice": "none"}, {"tool_choice": "auto"}):
        assert use(**nothing) is None


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"tool_choice": "required"}, "no tools", "tool_choice"),
        ({"tools": [ADD], "tool_choice": NAMED}, "names 'now'; the tools are add", "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "any"}}, "must be none, auto, required", "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "must be", "tool_choice"),
        ({"tools": [ADD, ADD]}, "two tools are called 'add'", "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools of type 'web_search'", "tools.0"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name: ", "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}, "unknown field", "tools.0.function.x"),
        ({"tools": [NOW] * 129}, "at most 128", "tools"),
        ({"functions": [{"name": "f"}]}, "use tools", "functions"),
        ({"function_call": {"name": "f"}}, "use tools", "function_call"),
        ({"chat_template": "{{ 1 }}"}, "its own", "chat_template"),
        ({"documents": [{"text": "x"}]}, "messages", "documents"),
        ({"chat_template_kwargs": {"tools": []}}, "tools", "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "either", "continue_final_message"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], reason: str, param: str) -> None:
    refused = refusal(use, **fields)
    assert (reason in str(refused), refused.param) == (True, param)


def test_messages_of_an_agents_loop() -> None:
    request = chat(
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "2", "tool_calls": []},
    )
    function = {"name": "add", "arguments": {"a": 1}}
    assert for_template(request.messages) == [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "call_1", "name": "add"},
        {"role": "assistant", "content": "2"},
    ]


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    broken = CALL | {"function": {"name": "add", "arguments": '{"a": oh'}}
    request = chat({"role": "assistant", "tool_calls": [broken]})
    assert for_template(request.messages)[0]["tool_calls"][0]["function"]["arguments"] == '{"a": oh'
