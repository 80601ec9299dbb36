"""Chat templates render as transformers renders them, and their refusals are the request's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.errors import RequestError
from loray.text import templates
from loray.text.templates import ChatTemplate, ChatTemplates, IsolatedRenderer
from tests.fixtures.tiny import byte_tokenizer
from tests.text.chat_templates import LLAMA, QWEN, TEMPLATES

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": " 2 < 3 & ü? \n"}
CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "add", "arguments": {"a": [1, "é<"]}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "3", "tool_call_id": "a1b2c3d4e", "name": "add"}
TOOL = {"type": "function", "function": {"name": "add", "description": "A <b>", "parameters": {"type": "object"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, {"role": "assistant", "content": " 5 "}, USER],
    "a call": [USER, CALLED, RESULT],
    "to go on": [USER, {"role": "assistant", "content": "It is "}],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [*TEMPLATES, "base"])
def test_every_template_renders_as_in_transformers(template: str, chat: str, smollm2: BaseModel) -> None:
    ours, theirs = prepared(template, smollm2)
    for tools in (None, [TOOL]):
        options: list[dict[str, Any]] = [{"add_generation_prompt": True}, {"add_generation_prompt": False}]
        if chat == "to go on":
            options.append({"add_generation_prompt": False, "continue_final_message": True})
        for option in options:
            variables = {"date_string": "1 May 2026", "enable_thinking": False}
            expected = theirs.apply_chat_template(CHATS[chat], tools=tools, tokenize=False, **option, **variables)
            assert ours.render(CHATS[chat], tools=tools, variables=variables, **option) == expected


def prepared(name: str, base: BaseModel) -> tuple[ChatTemplate, Any]:
    if name == "base":
        from transformers import AutoTokenizer

        found = ChatTemplates.load(base.path).find(with_tools=False)
        assert found is not None
        return found, AutoTokenizer.from_pretrained(str(base.path))
    theirs = byte_tokenizer()
    theirs.chat_template = TEMPLATES[name]
    return ChatTemplate(TEMPLATES[name], theirs.special_tokens_map), theirs


def test_which_templates_know_tools(smollm2: BaseModel) -> None:
    base = ChatTemplates.load(smollm2.path).find(with_tools=True)
    assert base is not None
    assert not base.knows_tools
    assert [ChatTemplate(t).knows_tools for t in TEMPLATES.values()] == [True, True, False, True, True]


def test_a_folders_templates_are_found_wherever_transformers_puts_them(tmp_path: Path) -> None:
    def write(name: str, content: str | dict[str, Any]) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    def rendered() -> list[str]:
        templates = ChatTemplates.load(tmp_path)
        return [t.render([USER]) if t else "" for t in (templates.find(with_tools=w) for w in (False, True))]

    assert rendered() == ["", ""]
    tokens = {
        "eos_token": "</s>",
        "bos_token": {"content": "<s>", "special": True},
        "chat_template": "{{ bos_token }}1",
    }
    write("tokenizer_config.json", tokens)
    assert rendered() == ["<s>1", "<s>1"]
    named = [{"name": "default", "template": "{{ eos_token }}"}, {"name": "tool_use", "template": "tools"}]
    write("tokenizer_config.json", tokens | {"chat_template": named})
    assert rendered() == ["</s>", "tools"]
    write("chat_template.jinja", "file")
    write("additional_chat_templates/tool_use.jinja", "another file")
    assert rendered() == ["file", "another file"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no users') }}", "refuses these messages: no users"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ messages.nothing.more }}", "refuses these messages"),
        ("{% if %}", "not valid"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{% set ns = namespace(__init__=1) %}", "refuses these messages"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "refuses these messages"),
    ],
)
def test_what_a_template_refuses_is_the_requests_mistake(source: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        ChatTemplate(source).render([USER])


def test_a_message_that_the_template_drops_cannot_be_continued() -> None:
    with pytest.raises(RequestError, match="continue_final_message"):
        ChatTemplate("{{ messages|length }}").render([USER], continue_final_message=True)


def test_the_date_is_todays() -> None:
    assert ChatTemplate(LLAMA).render([USER]).startswith("Today: ")


LONG = {"role": "user", "content": "ü" * 10_000}


@pytest.fixture
def renderer() -> Iterator[IsolatedRenderer]:
    renderer = IsolatedRenderer(timeout_s=20.0)
    yield renderer
    renderer.close()


def test_it_renders_what_this_process_would(renderer: IsolatedRenderer) -> None:
    for source in (QWEN, LLAMA, QWEN):
        template = ChatTemplate(source, {"bos_token": "<s>"})
        options = {"tools": [{"type": "function"}], "variables": {"date_string": "today"}}
        for messages in ([LONG], [LONG] * 50):
            assert renderer.render(template, messages, **options) == template.render(messages, **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="refuses these messages: no") as refused:
        renderer.render(ChatTemplate("{{ raise_exception('no') }}"), [LONG])
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 'a'.ljust(100000000) }}",
    ],
)
def test_memory_is_bounded_and_the_next_template_renders(renderer: IsolatedRenderer, source: str) -> None:
    with pytest.raises(RequestError):
        renderer.render(ChatTemplate(source), [LONG])
    assert renderer.render(ChatTemplate("{{ messages|length }}"), [LONG]) == "1"


def test_time_is_bounded_and_a_template_that_was_stopped_waits_for_its_next_try() -> None:
    renderer = IsolatedRenderer(timeout_s=2.0)
    endless = ChatTemplate("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}")
    for _ in range(2):
        with pytest.raises(RequestError, match="too much time"):
            renderer.render(endless, [LONG])
    assert not renderer._idle  # nothing was started for the second try


def test_a_template_that_is_slow_again_and_again_is_refused(
    renderer: IsolatedRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = ChatTemplate("{{ messages|length }}"), ChatTemplate("fast")
    monkeypatch.setattr(templates, "SLOW_S", -1.0)
    for _ in range(3):
        assert renderer.render(slow, [LONG]) == "1"
    monkeypatch.undo()
    with pytest.raises(RequestError, match="too much time"):
        renderer.render(slow, [LONG])
    assert renderer.render(fast, [LONG]) == "fast"
