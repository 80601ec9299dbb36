"""Messages of Anthropic's API and their events, as its client reads them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from pydantic import TypeAdapter

from loray.schemas.anthropic import MessageBuilder, MessagesRequest, error_type, model_info
from loray.schemas.openai import Model, parse
from loray.spec import Delta, ToolCallDelta

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
TOOL: dict[str, Any] = {"name": "f", "input_schema": {"type": "object"}}
BEGUN = Delta("", (), None, None, 10, 1, 4)


def builder(**fields: Any) -> MessageBuilder:
    asked = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]} | fields
    return MessageBuilder(parse(MessagesRequest, asked))


def written(answer: MessageBuilder, *deltas: Delta) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events and the message, both of which the client's types take."""
    events = [event for delta in deltas for event in answer.push(delta)] + answer.end()
    for event in events:
        if event["type"] != "ping":
            EVENT.validate_python(event, strict=True)
    Message.model_validate(answer.message, strict=True)
    return events, answer.message


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event.get("delta", {}).get("type") or event["type"].removeprefix("content_block_") for event in events]


def call(index: int, arguments: str = "", name: str | None = None) -> ToolCallDelta:
    return ToolCallDelta(index, None if name is None else f"call_{index}", name, arguments)


def test_a_text() -> None:
    last = BEGUN._replace(text="b", finish_reason="stop", num_output_tokens=3)
    events, message = written(builder(), BEGUN._replace(text="a"), last)
    text = ["start", "ping", "text_delta", "text_delta", "stop"]
    assert kinds(events) == ["message_start", *text, "message_delta", "message_stop"]
    usage = {"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 3}
    assert events[0]["message"] == message | {
        "content": [],
        "stop_reason": None,
        "usage": usage | {"output_tokens": 1},
    }
    assert events[-2]["usage"] == usage
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "ab"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": usage,
    }


def test_a_thought_a_text_and_calls() -> None:
    deltas = [
        BEGUN._replace(reasoning="h"),
        BEGUN._replace(reasoning="m", num_reasoning_tokens=2),
        BEGUN._replace(text="so", tool_calls=(call(0, name="f"), call(0, '{"a"'))),
        BEGUN._replace(tool_calls=(call(0, ":1}"), call(1, name="f"))),
        BEGUN._replace(finish_reason="tool_calls", num_reasoning_tokens=2),
    ]
    events, message = written(builder(), *deltas)
    thought = ["start", "ping", "thinking_delta", "thinking_delta", "signature_delta", "stop"]
    rest = ["start", "text_delta", "stop", *["start", "input_json_delta", "stop"] * 2]
    assert kinds(events) == ["message_start", *thought, *rest, "message_delta", "message_stop"]
    assert [event["index"] for event in events if "index" in event] == [0] * 5 + [1] * 3 + [2] * 3 + [3] * 3
    signature = hashlib.sha256(b"hm").hexdigest()
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": signature},
        {"type": "text", "text": "so"},
        {"type": "tool_use", "id": "call_0", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_1", "name": "f", "input": {}},
    ]
    assert message["stop_reason"] == "tool_use"
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 2}
    hidden, message = written(builder(thinking={"type": "adaptive", "display": "omitted"}), *deltas)
    assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": signature}
    assert kinds(hidden)[:5] == ["message_start", "start", "ping", "signature_delta", "stop"]


@pytest.mark.parametrize("arguments", ['{"a": oops}', "[1]", '{"a":', '{"a": NaN}', r'{"a": "\ud800"}'])
def test_arguments_that_are_no_object(arguments: str) -> None:
    """They are streamed when they are complete, so that a client can parse what it gets."""
    deltas = [
        BEGUN._replace(tool_calls=(call(0, arguments[:3], "f"),)),
        BEGUN._replace(tool_calls=(call(0, arguments[3:]),), finish_reason="tool_calls"),
    ]
    events, message = written(builder(), *deltas)
    assert message["content"][0]["input"] == {"arguments": arguments}
    (piece,) = [event["delta"]["partial_json"] for event in events if "partial_json" in event.get("delta", {})]
    assert json.loads(piece) == {"arguments": arguments}
    early, _ = written(builder(tool_choice={"type": "any"}), *deltas)
    pieces = [event["delta"]["partial_json"] for event in early if "partial_json" in event.get("delta", {})]
    assert "".join(pieces) == arguments


@pytest.mark.parametrize(
    ("last", "reason", "sequence"),
    [
        ({"finish_reason": "stop"}, "end_turn", None),
        ({"finish_reason": "stop", "stop_reason": "\n"}, "stop_sequence", "\n"),
        ({"finish_reason": "stop", "stop_reason": 7}, "end_turn", None),
        ({"finish_reason": "length", "num_output_tokens": 8}, "max_tokens", None),
        ({"finish_reason": "length", "num_output_tokens": 7}, "model_context_window_exceeded", None),
        ({"finish_reason": "length", "num_output_tokens": 7, "stop_reason": "quota"}, "max_tokens", None),
    ],
)
def test_why_an_answer_ended(last: dict[str, Any], reason: str, sequence: str | None) -> None:
    events, message = written(builder(), BEGUN._replace(**last))
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)
    assert message["content"] == []
    assert kinds(events) == ["message_start", "message_delta", "message_stop"]


def test_a_failure() -> None:
    answer = builder()
    answer.push(BEGUN._replace(text="a"))
    assert answer.fail(529, "m") == [{"type": "error", "error": {"type": "overloaded_error", "message": "m"}}]
    assert [error_type(s) for s in (400, 405, 500, 501)] == ["invalid_request_error"] * 2 + ["api_error"] * 2


def test_a_model() -> None:
    card = Model(id="m", object="model", created=0, owned_by="loray", root="m@1", max_model_len=9)
    info = ModelInfo.model_validate_json(model_info(card).to_json())
    assert (info.id, info.max_input_tokens, info.created_at.isoformat()) == ("m", 9, "1970-01-01T00:00:00+00:00")
