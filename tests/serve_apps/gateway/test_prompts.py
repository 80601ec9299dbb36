"""The thread that encodes: long requests must not block the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from loray.api.openai import ChatMessage
from loray.bases.registry import BaseModel
from loray.errors import RequestError
from loray.text.tokenizer import Tokenizer
from serve_apps.gateway.prompts import PromptEncoder
from tests.tiny import byte_tokenizer


class Watched:
    """The tiny tokenizer, with the names of the threads that used it."""

    def __init__(self) -> None:
        self._tokenizer = byte_tokenizer()
        self.chat_template = self._tokenizer.chat_template
        self.backend_tokenizer = self._tokenizer.backend_tokenizer
        self.threads: set[str] = set()

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        return self._tokenizer(*args, **options)

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        return self._tokenizer.apply_chat_template(*args, **options)


@pytest.fixture
def tokenizer() -> Watched:
    return Watched()


@pytest.fixture
def encoder(tokenizer: Watched, tiny_base: Callable[..., BaseModel]) -> PromptEncoder:
    encoder = PromptEncoder(tiny_base(), Tokenizer(tokenizer))
    tokenizer.threads.clear()
    return encoder


def message(content: str) -> ChatMessage:
    return ChatMessage(role="user", content=content)


def test_short_ones_are_encoded_at_once(encoder: PromptEncoder, tokenizer: Watched) -> None:
    assert asyncio.run(encoder.texts(["ab", (5, 6)])) == [(64, 65), (5, 6)]
    asyncio.run(encoder.chat([message("hi")]))
    assert tokenizer.threads == {"MainThread"}


def test_many_short_ones_are_long_together(encoder: PromptEncoder, tokenizer: Watched) -> None:
    assert len(asyncio.run(encoder.texts(["x" * 4000] * 5))) == 5
    assert tokenizer.threads == {"tokenizer_0"}


@pytest.mark.parametrize("contents", [["x" * 20_000], ["x"] * 1000])
def test_long_chats_are_rendered_in_the_thread_too(
    encoder: PromptEncoder, tokenizer: Watched, contents: list[str]
) -> None:
    ids = asyncio.run(encoder.chat([message(c) for c in contents]))
    assert ids == asyncio.run(
        PromptEncoder(encoder._base, Tokenizer(byte_tokenizer())).chat([message(c) for c in contents])
    )
    assert tokenizer.threads == {"tokenizer_0"}


def test_empty_prompts_and_templates_that_refuse(encoder: PromptEncoder, tokenizer: Watched) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        asyncio.run(encoder.texts(["a", ""]))
    tokenizer._tokenizer.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(RequestError, match="refuses these messages: no users"):
        asyncio.run(encoder.chat([message("x" * 20_000)]))
