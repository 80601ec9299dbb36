"""Prompts of chats: messages become text by the model's chat template, with the tools that a request offers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from loray.errors import RequestError
from loray.spec import Constraint, GenerateRequest, ToolParserName, ToolUse
from loray.text.detokenizer import RequestText
from loray.text.templates import ChatTemplate, ChatTemplates, IsolatedRenderer
from loray.text.tokenizer import Tokenizer
from loray.text.tools import MARKERS, calls_constraint, detect, parser_for, with_tools

_MISTRAL_ID_LENGTH = 9  # its templates refuse any other


@dataclass(frozen=True)
class Dialect:
    """The form in which a model is spoken to and answers: its chat template, and how it writes tool calls.

    own  the template is an adapter's, and is rendered in isolation
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    form: ToolParserName
    own: IsolatedRenderer | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        use: ToolUse | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. A template that does not know tools gets them as text. Raises RequestError."""
        tools = None if use is None else [tool.for_template() for tool in use.tools]
        if not self.template.knows_tools and (tools or any("tool_calls" in m or m["role"] == "tool" for m in messages)):
            messages, tools = with_tools(messages, tools or [], self.form), None
        elif self.form == "mistral":
            messages = [_with_short_ids(m) for m in messages]
        options: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "variables": dict(variables or {}),
        }
        if self.own is None:
            return self.template.render(messages, **options)
        return self.own.render(self.template, messages, **options)

    def constraint(self, use: ToolUse | None, answer: Constraint | None) -> Constraint | None:
        """The constraint of the whole answer; `answer` is that of an answer which calls nothing."""
        return answer if use is None else calls_constraint(use, self.form, self.tokenizer.added_tokens.get, answer)

    def text_of(self, request: GenerateRequest, use: ToolUse | None, *, tokens_as_ids: bool = False) -> RequestText:
        """The reader of the answer to `request`. `tokens_as_ids` is RequestText's."""
        parser = None if use is None else parser_for(self.form, use)
        kept = frozenset[str]() if use is None else frozenset(MARKERS[self.form])
        return RequestText(self.tokenizer, request, parser, kept, tokens_as_ids=tokens_as_ids)


class Dialects:
    """The dialects of a base and its adapters."""

    def __init__(
        self, name: str, templates: ChatTemplates, tokenizer: Tokenizer, form: ToolParserName | None = None
    ) -> None:
        """`form` is that of the base; None: detected."""
        self._name, self._templates, self._tokenizer = name, templates, tokenizer
        template = templates.find(with_tools=True)
        self._form = form or detect(tokenizer.added_tokens.keys(), "" if template is None else template.source)
        self._isolated = IsolatedRenderer()
        self._own = lru_cache(maxsize=1024)(self._compiled)

    def find(self, form: ToolParserName | None, template: str | None, *, with_tools: bool) -> Dialect:
        """The dialect of the base, or of an adapter that has a form or template of its own. Raises RequestError."""
        if template is not None:
            return Dialect(self._tokenizer, self._own(template), form or self._form, self._isolated)
        found = self._templates.find(with_tools=with_tools)
        if found is None:
            raise RequestError(f"the base model {self._name!r} has no chat template; use /v1/completions", "messages")
        return Dialect(self._tokenizer, found, form or self._form)

    def close(self) -> None:
        self._isolated.close()

    def _compiled(self, source: str) -> ChatTemplate:
        return ChatTemplate(source, self._templates.special_tokens)


def _with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    """The same ids wherever they occur, as letters and digits of the length that Mistral's templates demand."""
    out = dict(message)
    if "tool_calls" in message:
        out["tool_calls"] = [call | {"id": _short(call["id"])} for call in message["tool_calls"]]
    if "tool_call_id" in message:
        out["tool_call_id"] = _short(message["tool_call_id"])
    return out


def _short(call_id: str) -> str:
    if len(call_id) == _MISTRAL_ID_LENGTH and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_MISTRAL_ID_LENGTH]
