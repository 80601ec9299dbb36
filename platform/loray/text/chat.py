"""Prompts of chats: messages become text by the model's chat template, with the tools that a request offers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from loray.errors import RequestError, SpecError
from loray.spec import Constraint, GenerateRequest, ReasoningParserName, Thinking, ToolParserName, ToolUse
from loray.text import reasoning
from loray.text.detokenizer import RequestText
from loray.text.templates import ChatTemplate, ChatTemplates, IsolatedRenderer
from loray.text.tokenizer import Tokenizer
from loray.text.tools import MARKERS, calls_constraint, detect, parser_for, with_tools

_MISTRAL_ID_LENGTH = 9  # its templates refuse any other


@dataclass(frozen=True)
class Dialect:
    """The form in which a model is spoken to and answers: its chat template, how it writes tool calls, and whether it
    thinks before it answers.

    own  the template is an adapter's, and is rendered in isolation
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    form: ToolParserName
    own: IsolatedRenderer | None = None
    thinks: bool = False

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

    def thinking(self, prompt_ids: Sequence[int], budget: int | None) -> Thinking | None:
        """How the answer to a prompt thinks, for at most `budget` tokens; None: it does not."""
        return reasoning.thinking_after(prompt_ids, self.tokenizer.added_tokens, budget) if self.thinks else None

    def text_of(self, request: GenerateRequest, use: ToolUse | None, **options: Any) -> RequestText:
        """The reader of the answer to `request`. `options` are RequestText's."""
        parser = None if use is None else parser_for(self.form, use)
        kept = frozenset[str]() if use is None else frozenset(MARKERS[self.form])
        return RequestText(self.tokenizer, request, parser, kept, **options)


class Dialects:
    """The dialects of a base and its adapters."""

    def __init__(
        self,
        name: str,
        templates: ChatTemplates,
        tokenizer: Tokenizer,
        form: ToolParserName | None = None,
        reasoning_parser: ReasoningParserName | None = None,
    ) -> None:
        """`form` and `reasoning_parser` are those of the base; None: detected. Raises SpecError if its tokenizer does
        not have the parser's tokens.
        """
        self._name, self._templates, self._tokenizer = name, templates, tokenizer
        self._thinks = reasoning_parser is not None
        markers = (reasoning.START, reasoning.END)
        if self._thinks and not all(marker in tokenizer.added_tokens for marker in markers):
            raise SpecError(
                f"reasoning_parser {reasoning_parser}: {' and '.join(markers)} are no tokens of the base {name!r}, so "
                "its thoughts cannot be told from its answers; leave reasoning_parser out"
            )
        template = templates.find(with_tools=True)
        self._form = form or detect(tokenizer.added_tokens.keys(), "" if template is None else template.source)
        self._isolated = IsolatedRenderer()
        self._own = lru_cache(maxsize=1024)(self._compiled)

    def find(self, form: ToolParserName | None, template: str | None, *, with_tools: bool) -> Dialect:
        """The dialect of the base, or of an adapter that has a form or template of its own. Raises RequestError."""
        if template is not None:
            own = self._own(template)
            return Dialect(self._tokenizer, own, form or self._form, self._isolated, self._is_thinking(own))
        found = self._templates.find(with_tools=with_tools)
        if found is None:
            raise RequestError(f"the base model {self._name!r} has no chat template; use /v1/completions", "messages")
        return Dialect(self._tokenizer, found, form or self._form, thinks=self._is_thinking(found))

    def close(self) -> None:
        self._isolated.close()

    def _is_thinking(self, template: ChatTemplate) -> bool:
        return self._thinks or reasoning.detect(self._tokenizer.added_tokens.keys(), template.source) is not None

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
