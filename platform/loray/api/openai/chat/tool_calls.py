"""Tool calls in the messages of answers and in the deltas of streams."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loray.api.openai.responses import (
    AssistantMessage,
    ChatDelta,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallChunk,
)
from loray.spec import Delta, ToolCallDelta


def assistant_message(text: str, deltas: Iterable[ToolCallDelta]) -> AssistantMessage:
    calls = [
        ToolCall(id=d.id or "", type="function", function=FunctionCall(name=d.name or "", arguments=d.arguments))
        for d in _joined(deltas)
    ]
    message = AssistantMessage(role="assistant", content=text or None if calls else text, refusal=None)
    return message.model_copy(update={"tool_calls": calls}) if calls else message


def chat_delta(delta: Delta) -> ChatDelta:
    """What a step added. Only a last one may have neither text nor calls."""
    fields: dict[str, object] = {}
    if delta.text or not (delta.finish_reason or delta.tool_calls):
        fields["content"] = delta.text
    if delta.tool_calls:
        fields["tool_calls"] = [_chunk(d) for d in _joined(delta.tool_calls)]
    return ChatDelta.model_validate(fields)


def _joined(deltas: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """One delta for each call: clients join chunks by index, but not always within one chunk."""
    found: dict[int, ToolCallDelta] = {}
    for d in deltas:
        before = found.get(d.index)
        found[d.index] = d if before is None else replace(before, arguments=before.arguments + d.arguments)
    return list(found.values())


def _chunk(d: ToolCallDelta) -> ToolCallChunk:
    if d.id is None:
        return ToolCallChunk(index=d.index, function=FunctionCallDelta(arguments=d.arguments))
    function = FunctionCallDelta(name=d.name, arguments=d.arguments)
    return ToolCallChunk(index=d.index, id=d.id, type="function", function=function)
