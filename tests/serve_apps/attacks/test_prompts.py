"""Requests whose text is long in a place that nobody thinks of do not stop the streams of others: what cannot fit is
refused, and what is long is rendered and encoded beside the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.schemas.anthropic import MessagesRequest
from loray.schemas.openai import ChatCompletionRequest, CompletionRequest, parse
from loray.schemas.openai.responses_api import ResponsesRequest
from loray.text.chat import Dialect
from loray.text.templates import ChatTemplates
from loray.text.tokenizer import Tokenizer, bad_word_ids
from serve_apps.gateway import bases
from serve_apps.gateway.bases import PromptEncoder
from tests.fixtures.gateway import ScriptedEngines, delta
from tests.fixtures.tiny import CHAT_TEMPLATE, byte_tokenizer
from tests.serve_apps.attacks.front import Front, front
from tests.serve_apps.attacks.long_fields import LONG, bodies

USER = {"role": "user", "content": "x"}
CHAT: dict[str, Any] = {"messages": [USER]}
INLINE = 5_000  # characters that the event loop may render or encode itself, with what a template adds


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


def called(text: str, **fields: str) -> dict[str, Any]:
    call = {"id": "c", "function": {"name": "f", "arguments": text}} | fields
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


REACHING: dict[str, Callable[[str], dict[str, Any]]] = {
    "the description of a tool": lambda text: tool(description=text),
    "the parameters of a tool": lambda text: tool(parameters={"type": "object", "description": text}),
    "a key of the parameters": lambda text: tool(parameters={"type": "object", "properties": {text: {}}}),
    "a variable of the template": lambda text: {"chat_template_kwargs": {"custom_tools": text}},
    "the name of a message": lambda text: {"messages": [USER | {"name": text}]},
    "the arguments of a call": called,
    "the id of a call": lambda text: called("{}", id=text),
    "the id of an answered call": lambda text: {
        "messages": [USER, {"role": "tool", "content": "x", "tool_call_id": text}]
    },
}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Thread → the most characters that it has rendered, encoded, or made a grammar of at once."""
    found: dict[int, int] = {}

    def note(text: object) -> None:
        thread = threading.get_ident()
        found[thread] = max(found.get(thread, 0), len(str(text)))

    def watched(owner: Any, name: str, of: Callable[..., object]) -> None:
        call = getattr(owner, name)

        def noted(*args: Any, **options: Any) -> Any:
            note(of(*args, **options))
            return call(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    watched(Dialect, "render", lambda self, messages, use=None, **options: (messages, use, options))
    watched(Tokenizer, "encode", lambda self, text, **options: text)
    watched(Dialect, "constraint", lambda self, use, answer: use)
    watched(bases, "bad_word_ids", lambda tokenizer, words: "".join(words))
    return found


@pytest.fixture
def gateway(tiny_base: Callable[..., BaseModel], tmp_path: Path, threads: dict[int, int]) -> Iterator[Front]:
    engines = ScriptedEngines([delta("a", "stop")])
    with front(tiny_base(max_position_embeddings=2048), tmp_path, ("acme",), engines) as made:
        threads.clear()
        yield made


def check_loop(gateway: Front, threads: dict[int, int]) -> None:
    assert gateway.client.portal is not None
    loop = gateway.client.portal.call(threading.get_ident)
    assert threads.get(loop, 0) <= INLINE


@pytest.mark.parametrize(
    ("path", "model", "required"),
    [
        ("/v1/chat/completions", ChatCompletionRequest, CHAT),
        ("/v1/completions", CompletionRequest, {"prompt": "x"}),
        ("/v1/responses", ResponsesRequest, {"input": "x"}),
        ("/v1/messages", MessagesRequest, {"max_tokens": 1, "messages": [USER]}),
    ],
)
def test_a_long_text_in_any_field_is_refused(
    gateway: Front, threads: dict[int, int], path: str, model: type[Any], required: dict[str, Any]
) -> None:
    num = 0
    for place, body in bodies(model, **required):
        if place != f"{model.__name__}.model":
            body = body | {"model": gateway.base}
        answer = gateway.post("acme", path, **body)
        assert answer.status_code == 400, (place, answer.text[:500])
        assert len(answer.text) < 5_000, place
        num += 1
    assert num > 15
    assert not gateway.engines.requests
    check_loop(gateway, threads)


@pytest.mark.parametrize("body", REACHING.values(), ids=REACHING.keys())
def test_what_reaches_the_template_counts_for_the_context(
    gateway: Front, threads: dict[int, int], body: Callable[[str], dict[str, Any]]
) -> None:
    assert gateway.post("acme", "/v1/chat/completions", **CHAT | body("x")).status_code == 200
    answer = gateway.post("acme", "/v1/chat/completions", **CHAT | body(LONG))
    assert answer.status_code == 400, answer.text[:500]
    check_loop(gateway, threads)


@pytest.mark.parametrize("body", REACHING.values(), ids=REACHING.keys())
def test_what_reaches_the_template_is_rendered_in_a_thread(
    tiny_base: Callable[..., BaseModel], threads: dict[int, int], body: Callable[[str], dict[str, Any]]
) -> None:
    tokenizer = Tokenizer(byte_tokenizer().backend_tokenizer)
    encoder = PromptEncoder(tiny_base(), tokenizer, ChatTemplates({"default": CHAT_TEMPLATE}))
    threads.clear()
    fields = {"model": "m"} | CHAT | body("a " * 8_000)
    request = parse(ChatCompletionRequest, fields | {"tool_choice": "required" if "tools" in fields else "auto"})

    async def ask() -> None:
        dialect = await encoder.dialect(None, None, "acme", with_tools=request.tool_use is not None)
        await encoder.chat(request, dialect, 1 << 20, "acme")
        await encoder.constraint(request, dialect, "acme")

    asyncio.run(ask())
    assert threads.pop(threading.get_ident(), 0) <= INLINE
    assert max(threads.values()) >= 16_000
    encoder.close()


def test_many_bad_words_are_encoded_in_a_thread(gateway: Front, threads: dict[int, int]) -> None:
    words = [f"{i:0256d}" for i in range(128)]
    answer = gateway.post("acme", "/v1/completions", prompt="x", bad_words=words)
    assert answer.status_code == 200
    (asked,) = gateway.engines.requests
    tokenizer = Tokenizer(byte_tokenizer().backend_tokenizer)
    assert asked.params.bad_words == bad_word_ids(tokenizer, words)
    check_loop(gateway, threads)
