"""The same agent as in openai_tools.py with LangChain: `pip install langchain-openai`.

loray up
python examples/langchain_agent.py
"""

from __future__ import annotations

import os
from typing import Annotated

import httpx
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import Field, SecretStr

Digit = Annotated[int, Field(ge=0, le=9)]


@tool
def add(a: Digit, b: Digit) -> int:
    """Adds two digits."""
    return a + b


with httpx.Client(timeout=120) as http:
    model = ChatOpenAI(
        model=os.environ.get("MODEL", "smollm2"),
        base_url=os.environ.get("LORAY_URL", "http://127.0.0.1:8000") + "/v1",
        api_key=SecretStr(os.environ.get("LORAY_API_KEY", "none")),
        http_client=http,
        max_completion_tokens=100,
    )
    messages: list[BaseMessage] = [HumanMessage("What is 1 + 2?")]
    messages += [answer := model.bind_tools([add], tool_choice="add", parallel_tool_calls=False).invoke(messages)]
    for call in answer.tool_calls:
        print(f"the model calls {call['name']}: {call['args']}")
        messages += [add.invoke(call)]
    print("answer:", model.bind_tools([add], tool_choice="none").invoke(messages).content)
