"""From text and messages to token ids, with the base's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError

from loray.api.openai import ChatMessage, Prompt
from loray.bases.registry import BaseModel
from loray.errors import RequestError

_LONG = 16_384  # characters of one request; about 5 ms, the longest that the event loop may be held up
_MESSAGE_OVERHEAD = 32  # characters; many short messages take time too
T = TypeVar("T")


class PromptEncoder:
    """Texts that are long are encoded in a thread, so that other requests' tokens flow meanwhile."""

    def __init__(self, base: BaseModel, tokenizer: Any) -> None:
        self._base, self._tokenizer = base, tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        # A fast tokenizer changes itself at its first call only (truncation off); after that threads may share it.
        self._encode("warm", special=True)

    @classmethod
    def load(cls, base: BaseModel) -> PromptEncoder:
        from transformers import AutoTokenizer

        return cls(base, AutoTokenizer.from_pretrained(str(base.path)))

    async def texts(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Texts with the special tokens that the tokenizer puts around one; token ids as they are."""

        def encode() -> list[tuple[int, ...]]:
            return [self._encode(p, special=True) if isinstance(p, str) else p for p in prompts]

        return [
            _not_empty(ids, "prompt")
            for ids in await self._somewhere(encode, sum(len(p) for p in prompts if isinstance(p, str)))
        ]

    def echo(self, prompt: Prompt) -> str:
        """The text of a prompt: its own, or that of its token ids."""
        return prompt if isinstance(prompt, str) else str(self._tokenizer.decode(list(prompt)))

    async def chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """By the base's chat template, up to where the assistant's turn begins."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise RequestError(
                f"the base model {self._base.name!r} has no chat template; use /v1/completions", "messages"
            )

        def encode() -> tuple[int, ...]:
            prompt = self._tokenizer.apply_chat_template(
                [m.for_template() for m in messages], tokenize=False, add_generation_prompt=True
            )
            return self._encode(prompt, special=False)

        num_characters = sum(len(m.content) + _MESSAGE_OVERHEAD for m in messages)
        try:
            ids = await self._somewhere(encode, num_characters)
        except TemplateError as e:
            raise RequestError(f"the model's chat template refuses these messages: {e}", "messages") from e
        return _not_empty(ids, "messages")

    async def _somewhere(self, encode: Callable[[], T], num_characters: int) -> T:
        """Here, or in the thread where it takes long."""
        if num_characters <= _LONG:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode)

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _not_empty(ids: tuple[int, ...], param: str) -> tuple[int, ...]:
    if not ids:
        raise RequestError("the prompt is empty; give at least one token", param)
    return ids
