"""Two tools, and the loop of an agent that has them, with OpenAI's client.

A model may write at random, so `tool_choice` says when it calls and when it stops.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import openai
from pydantic import BaseModel, Field

ASK: Any = [{"role": "user", "content": "What is 1 + 2?"}]
Digit = Annotated[int, Field(ge=0, le=9)]


class Add(BaseModel):
    """Adds two digits."""

    a: Digit
    b: Digit


class Paint(BaseModel):
    """Paints."""

    color: Literal["red", "blue"]


ADD, PAINT = openai.pydantic_function_tool(Add, name="add"), openai.pydantic_function_tool(Paint, name="paint")
NAMED_ADD: Any = {"type": "function", "function": {"name": "add"}}
_TOOLS: dict[str, Callable[[str], object]] = {
    "add": lambda arguments: sum(Add.model_validate_json(arguments).model_dump().values()),
    "paint": lambda arguments: f"{Paint.model_validate_json(arguments).color} it is",
}


def loop(client: openai.OpenAI, model: str, choices: Iterable[Any], **fields: Any) -> tuple[list[str], str]:
    """Asks until an answer calls nothing, with the next of `choices` as tool_choice of each request. Returns the names
    of the tools that were called, and the last answer.
    """
    messages, called, left = list(ASK), list[str](), iter(choices)
    while True:
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[ADD, PAINT],
            tool_choice=next(left),
            parallel_tool_calls=False,
            **fields,
        ).choices[0]
        messages.append(answer.message)
        if not answer.message.tool_calls:
            assert next(left, None) is None
            assert answer.message.content is not None
            return called, answer.message.content
        assert answer.finish_reason == "tool_calls"
        for call in answer.message.tool_calls:
            assert call.type == "function"
            called.append(call.function.name)
            result = json.dumps(_TOOLS[call.function.name](call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
