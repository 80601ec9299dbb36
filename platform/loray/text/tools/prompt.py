"""Tools as text, for models whose chat template does not know them: in a system message, in the form of Hermes.

https://github.com/NousResearch/Hermes-Function-Calling describes that form; the words are ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loray.spec import ToolParserName

_FORMS: Mapping[ToolParserName, tuple[str, str, str]] = {  # before the object, the arguments' key, after the object
    "hermes": ("<tool_call>\n", "arguments", "\n</tool_call>"),
    "llama3_json": ("", "parameters", ""),
    "mistral": ("[TOOL_CALLS][", "arguments", "]"),
}
_SYSTEM = """# Tools

You can call functions. Each line between <tools> and </tools> describes one of them, with the JSON schema of its \
parameters:
<tools>
{tools}
</tools>

If a function helps to answer, call it instead of answering. A call has this form and nothing around it:
{call}
Its result comes in the next message, between <tool_response> and </tool_response>."""
Message = Mapping[str, Any]


def with_tools(messages: Sequence[Message], tools: Sequence[Message], form: ToolParserName) -> list[dict[str, Any]]:
    """The messages with nothing in them but text: the tools are described in the system message, calls and results are
    text of the assistant and the user.
    """
    example = _written("<name of the function>", "{<name of an argument>: <its value>, ...}", form)
    system = _SYSTEM.format(tools="\n".join(_json(tool) for tool in tools), call=example)
    out: list[dict[str, Any]] = []
    before = None
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if before == "tool":
                out[-1]["content"] += f"\n{result}"
            else:
                out.append({"role": "user", "content": result})
        else:
            out.append(_plain(message, form))
        before = message["role"]
    if out and out[0]["role"] == "system":
        out[0]["content"] = f"{out[0]['content']}\n\n{system}"
    else:
        out.insert(0, {"role": "system", "content": system})
    return out


def _plain(message: Message, form: ToolParserName) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    written = [_written(c["name"], _arguments(c["arguments"]), form) for c in calls]
    texts = [message["content"], *written] if message["content"] else written or [""]
    return {k: v for k, v in message.items() if k != "tool_calls"} | {"content": "\n".join(texts)}


def _written(name: str, arguments: str, form: ToolParserName) -> str:
    before, key, after = _FORMS[form]
    return f'{before}{{"name": {_json(name)}, "{key}": {arguments}}}{after}'


def _arguments(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
