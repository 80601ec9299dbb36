"""An agent with one tool and OpenAI's client: the model calls it, this program answers, the model has the last word.

loray up
python examples/openai_tools.py
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import openai
from pydantic import BaseModel, Field


class Add(BaseModel):
    """Adds two digits."""

    a: Annotated[int, Field(ge=0, le=9)]
    b: Annotated[int, Field(ge=0, le=9)]


with openai.OpenAI(
    base_url=os.environ.get("LORAY_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("LORAY_API_KEY", "none"),
) as client:
    messages: list[Any] = [{"role": "user", "content": "What is 1 + 2?"}]
    given: dict[str, Any] = {"model": os.environ.get("MODEL", "smollm2"), "max_tokens": 100}
    given["tools"] = [openai.pydantic_function_tool(Add, name="add")]
    # A small model decides badly whether to call (`auto`): so the first answer is a call, and the second is none.
    first = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **given
    ).choices[0]
    messages.append(first.message)
    for call in first.message.tool_calls or ():
        digits = Add.model_validate_json(call.function.arguments)
        print(f"the model calls {call.function.name}: {digits.a} + {digits.b}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(digits.a + digits.b)})
    last = client.chat.completions.create(messages=messages, tool_choice="none", **given)
    print("answer:", last.choices[0].message.content)
