"""Tools for templates that do not know them: what such a template gets is text, and the parser reads its own form."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from loray.spec import Tool, ToolCallDelta, ToolParserName, ToolUse
from loray.text.tools import parser_for, with_tools

TOOL = Tool("add", {"type": "object"}, "Adds ü.").for_template()
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": "ü"}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "Well.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c", "name": "add"},
    {"role": "tool", "content": "3", "tool_call_id": "d"},
    {"role": "assistant", "content": "2 or 3"},
]


def test_messages_become_text_of_the_roles_that_every_template_knows() -> None:
    system, user, call, results, answer = with_tools(CHAT, [TOOL], "hermes")
    assert system["content"].startswith("Be brief.\n\n# Tools")
    assert '\n{"type": "function", "function": {"name": "add", "description": "Adds ü.", ' in system["content"]
    assert (user, answer) == (CHAT[1], CHAT[5])
    written = '<tool_call>\n{"name": "add", "arguments": {"a": "ü"}}\n</tool_call>'
    assert call == {"role": "assistant", "content": f"Well.\n{written}\n{written}"}
    results_text = "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    assert results == {"role": "user", "content": results_text}
    assert with_tools(CHAT[1:2], [TOOL], "hermes")[0]["role"] == "system"
    assert CHAT[2]["content"] == "Well."  # the request's own messages stay as they are


@pytest.mark.parametrize("form", get_args(ToolParserName))
def test_the_parser_reads_the_form_in_which_calls_are_written(form: ToolParserName) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    written = with_tools([message], [TOOL], form)[1]["content"]
    begun, *rest = parser_for(form, ToolUse((Tool("add", {}),))).push(written)
    assert isinstance(begun, ToolCallDelta)
    assert begun.name == "add"
    assert "".join(d.arguments for d in rest if isinstance(d, ToolCallDelta)) == '{"a": "ü"}'
