"""From text and messages to token ids, with the base's own tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError

from loray.bases.registry import BaseModel
from loray.errors import RequestError
from loray.serving.openai import ChatMessage

_LONG = 16_384  # characters; about 5 ms, the longest that the event loop may be held up


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

    async def text(self, prompt: str) -> tuple[int, ...]:
        """With the special tokens that the tokenizer puts around a text."""
        return await self._encode_somewhere(prompt, special=True, param="prompt")

    async def chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """By the base's chat template, up to where the assistant's turn begins."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise RequestError(
                f"the base model {self._base.name!r} has no chat template; use /v1/completions", "messages"
            )
        try:
            prompt = self._tokenizer.apply_chat_template(
                [m.for_template() for m in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as e:
            raise RequestError(f"the model's chat template refuses these messages: {e}", "messages") from e
        return await self._encode_somewhere(prompt, special=False, param="messages")

    async def _encode_somewhere(self, text: str, *, special: bool, param: str) -> tuple[int, ...]:
        if len(text) <= _LONG:
            ids = self._encode(text, special=special)
        else:
            loop = asyncio.get_running_loop()
            ids = await loop.run_in_executor(self._thread, lambda: self._encode(text, special=special))
        if not ids:
            raise RequestError("the prompt is empty; give at least one token", param)
        return ids

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
