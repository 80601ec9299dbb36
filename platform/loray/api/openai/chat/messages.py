"""The messages of a chat, as clients send them and as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from loray.api.openai import fields
from loray.api.openai.body import Body
from loray.api.openai.unsupported import NO_AUDIO, NO_FUNCTIONS
from loray.errors import RequestError

# Keys of messages that change no prompt: what answers have and clients send back, and hints of other providers' APIs.
_IGNORED = ("annotations", "cache_control", "provider_specific_fields", "reasoning", "reasoning_content", "refusal")


class CalledFunction(Body):
    name: Annotated[fields.ShortText, Field(min_length=1)]
    arguments: str = Field(default="{}", description="JSON in a string, as the model wrote it")


class ToolCall(Body):
    """A call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _without_index(cls, value: Any) -> Any:
        """Calls that were joined from a stream keep its `index`."""
        return {k: v for k, v in value.items() if k not in ("index", *_IGNORED)} if isinstance(value, dict) else value

    def for_template(self) -> dict[str, Any]:
        """Most templates expect the arguments as an object. What is not JSON stays the text that it was."""
        arguments: Any = self.function.arguments
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(fields.text)] = Field(default="", description="text, or text parts")
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = Field(default=(), strict=False, description="of an assistant")
    tool_call_id: str | None = Field(default=None, description="of a tool: the call that it answers")

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        """Clients send an assistant's message back as they received it, with null and empty fields."""
        if not isinstance(value, dict):
            return value
        if value.get("audio"):
            raise RequestError(f"audio is not supported: {NO_AUDIO}")
        if value.get("function_call") or value.get("role") == "function":
            raise RequestError(f"function_call is not supported: {NO_FUNCTIONS}")
        empty = ("audio", "function_call")
        return {k: v for k, v in value.items() if v is not None and k not in (*empty, *_IGNORED)}

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """The fields that a role needs, and those that it alone has."""
        if self.role == "tool" and self.tool_call_id is None:
            raise RequestError("a message of role tool needs tool_call_id: the id of the call that it answers")
        if self.tool_calls and self.role != "assistant":
            raise RequestError(f"only an assistant's message has tool_calls, this one's role is {self.role}")
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise RequestError("content is required, but for an assistant's message with tool_calls")
        return self

    @property
    def num_characters(self) -> int:
        """Of all that the chat template can read of it."""
        calls = sum(len(c.id) + len(c.function.name) + len(c.function.arguments) for c in self.tool_calls)
        return len(self.content) + len(self.name or "") + len(self.tool_call_id or "") + calls

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it; `developer` is OpenAI's newer name for `system`."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        if self.name:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        return message


def for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """All messages; a tool's gets the name of the function that was called, which some templates need."""
    out, names = [], dict[str | None, str]()
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls}
        written = message.for_template()
        if message.role == "tool" and message.tool_call_id in names:
            written.setdefault("name", names[message.tool_call_id])
        out.append(written)
    return out
