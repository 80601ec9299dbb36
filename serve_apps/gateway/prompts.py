"""Encodes texts and messages as token ids, with the base's tokenizer and chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from loray.api.openai import ChatCompletionRequest, Prompt
from loray.api.openai.chat.messages import for_template
from loray.bases.registry import BaseModel
from loray.errors import ContextLengthExceeded, RequestError
from loray.spec import AdapterRef, Constraint, ToolParserName
from loray.text.bad_words import bad_word_ids
from loray.text.chat import Dialect, Dialects
from loray.text.templates import ChatTemplates
from loray.text.tokenizer import Tokenizer
from serve_apps.access.places import MostPlaces, Places

LONG = 4096  # characters of one request; they take about 2 ms, for which the event loop may be blocked
VERY_LONG = 131_072  # about 60 ms
LONG_TEXTS = MostPlaces(total=1, of_tenant=1, wait_s=30.0, waiting=None)  # very long texts that are encoded
OWN_TEMPLATES = MostPlaces(total=2, of_tenant=1, wait_s=2.0, waiting=None)  # renderings of adapters, each in a process
_PIECE = 8192  # tokens that are decoded at once; then other threads run
_MESSAGE_OVERHEAD = 32  # characters per message, whose rendering takes time too
T = TypeVar("T")


class PromptEncoder:
    """Encodes texts, the short ones at once, and others in threads, so that they do not delay other requests.

    Very long ones have a thread of their own, and adapters' own templates have others: however many come, they delay
    only each other. Tenants use these threads in turn. `tenant` is who asks; a call that has waited for its turn for
    too long raises Overloaded.
    """

    def __init__(
        self, base: BaseModel, tokenizer: Tokenizer, templates: ChatTemplates, form: ToolParserName | None = None
    ) -> None:
        """`form`: how the base writes tool calls; None: detected."""
        self.tokenizer = tokenizer
        self._dialects = Dialects(base.name, templates, tokenizer, form)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self._long_texts = Places("very long texts", LONG_TEXTS)
        self._own_templates = Places("renderings of adapters' templates", OWN_TEMPLATES)

    @classmethod
    def load(cls, base: BaseModel, form: ToolParserName | None = None) -> PromptEncoder:
        return cls(base, Tokenizer.load(base.path), ChatTemplates.load(base.path), form)

    def close(self) -> None:
        self._long_texts.close()
        self._own_templates.close()
        self._dialects.close()

    async def texts(
        self,
        prompts: Sequence[Prompt],
        limit: int | None,
        tenant: str,
        *,
        special: bool = True,
        keep: int | None = None,
    ) -> list[tuple[int, ...]]:
        """Encodes texts, with the tokenizer's special tokens if `special`. Token ids are returned unchanged.

        `limit` is the model's context length: a text that is certainly longer raises ContextLengthExceeded before it is
        encoded. `keep`: of longer prompts the last so many tokens are taken instead.
        """
        if limit is not None:
            most = limit * self.tokenizer.max_token_characters
            if keep is not None:
                prompts = [p[-most:] if isinstance(p, str) else p for p in prompts]
            _check_characters(max((len(p) for p in prompts if isinstance(p, str)), default=0), most, limit, "prompt")

        def encode() -> list[tuple[int, ...]]:
            ids = [self.tokenizer.encode(p, special=special) if isinstance(p, str) else p for p in prompts]
            return ids if keep is None else [self.tokenizer.cut(i, keep) for i in ids]

        return await self._run(tenant, encode, sum(len(p) for p in prompts if isinstance(p, str)))

    def echo(self, prompt: Prompt) -> str:
        """The text of a prompt; token ids are decoded."""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    async def dialect(
        self, adapter: AdapterRef | None, template: str | None, tenant: str, *, with_tools: bool
    ) -> Dialect:
        """How the model is spoken to; `template` is the adapter's own.

        Raises RequestError if there is no template.
        """
        form = None if adapter is None else adapter.tool_parser
        find = partial(self._dialects.find, form, template, with_tools=with_tools)
        return find() if template is None else await self._own_templates.run(tenant, find)

    async def chat(
        self,
        request: ChatCompletionRequest,
        dialect: Dialect,
        limit: int | None,
        tenant: str,
        *,
        keep: int | None = None,
    ) -> tuple[int, ...]:
        """Encodes the messages by the chat template, up to the beginning of the assistant's turn. As `texts`."""
        use = request.tool_use
        begins = (
            not request.continue_final_message
            if request.add_generation_prompt is None
            else request.add_generation_prompt
        )

        def render() -> str:
            return dialect.render(
                for_template(request.messages),
                use,
                add_generation_prompt=begins,
                continue_final_message=request.continue_final_message,
                variables=request.chat_template_kwargs,
            )

        def encode(prompt: str) -> tuple[int, ...]:
            ids = self.tokenizer.encode(prompt, special=request.add_special_tokens)
            return ids if keep is None else self.tokenizer.cut(ids, keep)

        most = None if keep is not None or limit is None else limit * self.tokenizer.max_token_characters
        if most is not None and limit is not None:
            _check_number(len(request.messages), limit)
            _check_characters(request.num_characters, most, limit, "messages")
        if dialect.own is None:
            characters = request.num_characters + _MESSAGE_OVERHEAD * len(request.messages)
            return await self._run(tenant, lambda: encode(render()), characters)
        prompt = await self._own_templates.run(tenant, render)
        if most is not None and limit is not None:
            _check_characters(len(prompt), most, limit, "messages")
        return await self._run(tenant, partial(encode, prompt), len(prompt))

    async def constraint(self, request: ChatCompletionRequest, dialect: Dialect, tenant: str) -> Constraint | None:
        """What the answer must match, of which the tools are a part: see `Dialect.constraint`."""
        answer = None if request.constraint is None else request.constraint.constraint
        if request.tool_use is None:
            return answer
        return await self._run(tenant, partial(dialect.constraint, request.tool_use, answer), request.num_characters)

    async def bad_words(self, words: Sequence[str], tenant: str) -> tuple[tuple[int, ...], ...]:
        """Their token ids: see `bad_word_ids`."""
        return await self._run(tenant, partial(bad_word_ids, self.tokenizer, words), 2 * sum(map(len, words)))

    async def decode(self, ids: Sequence[int], tenant: str) -> str:
        """The text of token ids, special tokens included. Raises RequestError for ids outside the vocabulary."""
        if max(ids, default=0) >= self.tokenizer.num_tokens:
            raise RequestError(f"a token id is outside the vocabulary of {self.tokenizer.num_tokens}", "tokens")

        def decode() -> str:
            decoder = self.tokenizer.decoder()
            pieces = [decoder.push(ids[i : i + _PIECE]) for i in range(0, len(ids), _PIECE)]
            return "".join(pieces) + decoder.flush()

        return await self._run(tenant, decode, len(ids))

    async def token_strings(self, ids: Sequence[int], tenant: str) -> list[str]:
        """Each token as it stands in the vocabulary."""
        return await self._run(tenant, partial(self.tokenizer.tokens, ids), len(ids))

    async def _run(self, tenant: str, encode: Callable[[], T], num_characters: int) -> T:
        """Calls `encode` at once, or in a thread if the text is long."""
        if num_characters <= LONG:
            return encode()
        if num_characters > VERY_LONG:
            return await self._long_texts.run(tenant, encode)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)


def _check_characters(num: int, most: int, limit: int, param: str) -> None:
    if num > most:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, which have {most:,} characters at most, but the "
            f"prompt has {num:,}; shorten it",
            param,
        )


def _check_number(num_messages: int, limit: int) -> None:
    """No template writes a message in less than one token."""
    if num_messages > limit:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, but the chat has {num_messages:,} messages; send "
            "fewer",
            "messages",
        )
