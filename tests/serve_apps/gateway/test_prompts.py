"""The threads that encode: long requests must not block the event loop, and very long ones nobody but each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.errors import ContextLengthExceeded, RequestError
from loray.schemas.openai import ChatCompletionRequest, parse
from loray.spec import AdapterRef
from loray.text.templates import ChatTemplates
from loray.text.tokenizer import Tokenizer
from serve_apps.gateway.bases import PromptEncoder
from tests.fixtures.tiny import CHAT_TEMPLATE, byte_tokenizer

LIMIT = 1 << 20


class Watched(Tokenizer):
    """The tiny tokenizer, with the names of the threads that encode. Encoding "wait…" waits for `release`."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.release = threading.Event()
        super().__init__(byte_tokenizer().backend_tokenizer)
        self.threads.clear()

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        self.threads.append(threading.current_thread().name)
        if text.startswith("wait"):
            self.release.wait(60)
        return super().encode(text, special=special)


@pytest.fixture
def tokenizer() -> Watched:
    return Watched()


@pytest.fixture
def encoder(tokenizer: Watched, tiny_base: Callable[..., BaseModel]) -> PromptEncoder:
    return PromptEncoder(tiny_base(), tokenizer, ChatTemplates({"default": CHAT_TEMPLATE}))


async def encoded(encoder: PromptEncoder, *contents: str, limit: int = LIMIT, **options: Any) -> tuple[int, ...]:
    messages = [{"role": "user", "content": content} for content in contents]
    request = parse(ChatCompletionRequest, {"model": "m", "messages": messages})
    dialect = await encoder.dialect(None, None, "acme", with_tools=False)
    return await encoder.chat(request, dialect, limit, "acme", **options)


def test_short_ones_are_encoded_at_once(encoder: PromptEncoder, tokenizer: Watched) -> None:
    assert asyncio.run(encoder.texts(["ab", (5, 6)], LIMIT, "acme")) == [(64, 65), (5, 6)]
    asyncio.run(encoded(encoder, "hi"))
    assert set(tokenizer.threads) == {"MainThread"}


def test_many_short_ones_are_long_together(encoder: PromptEncoder, tokenizer: Watched) -> None:
    assert len(asyncio.run(encoder.texts(["x" * 4000] * 5, LIMIT, "acme"))) == 5
    assert set(tokenizer.threads) == {"tokenizer_0"}


@pytest.mark.parametrize("contents", [["x" * 20_000], ["x"] * 1000])
def test_long_chats_are_rendered_in_a_thread_too(
    encoder: PromptEncoder, tokenizer: Watched, contents: list[str]
) -> None:
    ids = asyncio.run(encoded(encoder, *contents))
    text = byte_tokenizer().apply_chat_template(
        [{"role": "user", "content": c} for c in contents], tokenize=False, add_generation_prompt=True
    )
    assert list(ids) == byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.threads == ["tokenizer_0"]


def test_very_long_ones_delay_only_each_other(encoder: PromptEncoder, tokenizer: Watched) -> None:
    async def run() -> None:
        very_long = [asyncio.create_task(encoder.texts(["wait" + "x" * 200_000], LIMIT, "acme")) for _ in range(8)]
        await asyncio.sleep(0)
        await asyncio.gather(
            encoder.texts(["x"], LIMIT, "acme"), *(encoder.texts(["x" * 20_000], LIMIT, "acme") for _ in range(4))
        )
        assert not any(task.done() for task in very_long)
        tokenizer.release.set()
        assert [len(ids[0]) for ids in await asyncio.gather(*very_long)] == [200_004] * 8

    asyncio.run(run())


def test_what_cannot_fit_is_not_encoded(encoder: PromptEncoder, tokenizer: Watched) -> None:
    most = 10 * len("<|endoftext|>")  # the longest token
    for ask in (encoder.texts(["x" * (most + 1)], 10, "acme"), encoded(encoder, "x" * most, "x", limit=10)):
        with pytest.raises(ContextLengthExceeded, match=f"10 tokens, which have {most} characters at most"):
            asyncio.run(ask)
    with pytest.raises(ContextLengthExceeded, match="11 messages"):
        asyncio.run(encoded(encoder, *["x"] * 11, limit=10))
    assert tokenizer.threads == []
    assert len(asyncio.run(encoder.texts(["x" * most], 10, "acme"))[0]) == most


def test_of_a_longer_prompt_the_end_is_kept(encoder: PromptEncoder, tokenizer: Watched) -> None:
    most = 10 * len("<|endoftext|>")
    assert asyncio.run(encoder.texts(["x" * 10 * most + "abc", (1, 2, 3, 4), (5,)], 10, "acme", keep=3)) == [
        (64, 65, 66),
        (2, 3, 4),
        (5,),
    ]
    whole = asyncio.run(encoded(encoder, "hi", limit=100))
    assert asyncio.run(encoded(encoder, "hi", limit=100, keep=5)) == whole[-5:]


def test_a_template_that_refuses(tokenizer: Watched, tiny_base: Callable[..., BaseModel]) -> None:
    templates = ChatTemplates({"default": "{{ raise_exception('no users') }}"})
    encoder = PromptEncoder(tiny_base(), tokenizer, templates)
    with pytest.raises(RequestError, match="refuses these messages: no users"):
        asyncio.run(encoded(encoder, "x" * 20_000))
    with pytest.raises(RequestError, match="has no chat template; use /v1/completions"):
        asyncio.run(encoded(PromptEncoder(tiny_base(), tokenizer, ChatTemplates({})), "x"))


def test_an_adapters_template_is_rendered(tokenizer: Watched, encoder: PromptEncoder) -> None:
    adapter = AdapterRef(
        digest="0" * 64,
        name="a",
        version=1,
        method="lora",
        base_fingerprint="0" * 64,
        context_length=9,
        nbytes=1,
        tool_parser="mistral",
    )

    async def ask() -> tuple[int, ...]:
        dialect = await encoder.dialect(adapter, "{{ messages[0].content }}!", "acme", with_tools=False)
        assert dialect.form == "mistral"
        return await encoder.chat(
            parse(ChatCompletionRequest, {"model": "m", "messages": [{"role": "user", "content": "ab"}]}),
            dialect,
            LIMIT,
            "acme",
        )

    assert asyncio.run(ask()) == (64, 65, 0)
    encoder.close()
