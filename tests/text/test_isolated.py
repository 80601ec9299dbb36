"""Templates of adapters: the same text as in this process, and an end to those that would not end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loray.errors import RequestError
from loray.text import templates
from loray.text.templates import ChatTemplate, IsolatedRenderer
from tests.text.chat_templates import LLAMA, QWEN

USER = {"role": "user", "content": "ü" * 10_000}


@pytest.fixture
def renderer() -> Iterator[IsolatedRenderer]:
    renderer = IsolatedRenderer(timeout_s=20.0)
    yield renderer
    renderer.close()


def test_it_renders_what_this_process_would(renderer: IsolatedRenderer) -> None:
    for source in (QWEN, LLAMA, QWEN):
        template = ChatTemplate(source, {"bos_token": "<s>"})
        options = {"tools": [{"type": "function"}], "variables": {"date_string": "today"}}
        for messages in ([USER], [USER] * 50):
            assert renderer.render(template, messages, **options) == template.render(messages, **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="refuses these messages: no") as refused:
        renderer.render(ChatTemplate("{{ raise_exception('no') }}"), [USER])
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
        renderer.render(ChatTemplate(source), [USER])
    assert renderer.render(ChatTemplate("{{ messages|length }}"), [USER]) == "1"


def test_time_is_bounded_and_a_template_that_was_stopped_waits_for_its_next_try() -> None:
    renderer = IsolatedRenderer(timeout_s=2.0)
    endless = ChatTemplate("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}")
    with pytest.raises(RequestError, match="too much time"):
        renderer.render(endless, [USER])
    with pytest.raises(RequestError, match="too much time"):
        renderer.render(endless, [USER])
    assert not renderer._idle  # nothing was started for the second try


def test_a_template_that_is_slow_again_and_again_is_refused(
    renderer: IsolatedRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = ChatTemplate("{{ messages|length }}"), ChatTemplate("fast")
    monkeypatch.setattr(templates, "SLOW_S", -1.0)
    for _ in range(3):
        assert renderer.render(slow, [USER]) == "1"
    monkeypatch.undo()
    with pytest.raises(RequestError, match="too much time"):
        renderer.render(slow, [USER])
    assert renderer.render(fast, [USER]) == "fast"
