"""Encodes texts and messages as token ids, with the base's tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jinja2 import TemplateError

from loray.api.openai import ChatMessage, Prompt
from loray.bases.registry import BaseModel
from loray.errors import RequestError
from loray.text.tokenizer import Tokenizer

_LONG = 16_384  # characters of one request; they take about 5 ms, for which the event loop may be blocked
_MESSAGE_OVERHEAD = 32  # characters per message, whose rendering takes time too
T = TypeVar("T")


class PromptEncoder:
    """Encodes long texts in a thread, so that they do not delay the tokens of other requests."""

    def __init__(self, base: BaseModel, tokenizer: Tokenizer) -> None:
        self._base, self.tokenizer = base, tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @classmethod
    def load(cls, base: BaseModel) -> PromptEncoder:
        return cls(base, Tokenizer.load(base.path))

    async def texts(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Encodes texts, with the tokenizer's special tokens. Token ids are returned unchanged."""

        def encode() -> list[tuple[int, ...]]:
            return [self.tokenizer.encode(p, special=True) if isinstance(p, str) else p for p in prompts]

        return [
            _not_empty(ids, "prompt")
            for ids in await self._run(encode, sum(len(p) for p in prompts if isinstance(p, str)))
        ]

    def echo(self, prompt: Prompt) -> str:
        """The text of a prompt; token ids are decoded."""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    async def chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Encodes messages by the base's chat template, up to the beginning of the assistant's turn."""
        if not self.tokenizer.transformers.chat_template:
            raise RequestError(
                f"the base model {self._base.name!r} has no chat template; use /v1/completions", "messages"
            )

        def encode() -> tuple[int, ...]:
            prompt = self.tokenizer.transformers.apply_chat_template(
                [m.for_template() for m in messages], tokenize=False, add_generation_prompt=True
            )
            return self.tokenizer.encode(prompt, special=False)

        num_characters = sum(len(m.content) + _MESSAGE_OVERHEAD for m in messages)
        try:
            ids = await self._run(encode, num_characters)
        except TemplateError as e:
            raise RequestError(f"the model's chat template refuses these messages: {e}", "messages") from e
        return _not_empty(ids, "messages")

    async def _run(self, encode: Callable[[], T], num_characters: int) -> T:
        """Calls `encode` at once, or in the thread if the text is long."""
        if num_characters <= _LONG:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode)


def _not_empty(ids: tuple[int, ...], param: str) -> tuple[int, ...]:
    if not ids:
        raise RequestError("the prompt is empty; give at least one token", param)
    return ids
