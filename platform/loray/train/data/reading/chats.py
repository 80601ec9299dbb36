"""Chats as the text that the checkpoint's own template makes of them, and where in it the assistant's answers are.

A server tokenises a prompt whole, so a chat is tokenised whole too, and the answers are found by their characters. Cut
into segments, SentencePiece would begin each with a space that no prompt has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from jinja2 import TemplateError

Message = Mapping[str, Any]
_PROBE = "\ue000"  # of the private use area: stands for an answer, to see what a template writes around it
_FAILURES = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


class Conversation(NamedTuple):
    """`answers` are [start, stop) in characters: what the model learns to write."""

    text: str
    answers: tuple[tuple[int, int], ...]


class _Turn(NamedTuple):
    """A conversation up to the end of one answer, which begins at `start`."""

    text: str
    start: int


def conversations(record: Mapping[str, Any], tokenizer: Any) -> list[Conversation]:
    """What the model learns from one chat. Raises ValueError that says what is wrong with it.

    To find the answers, the chat is rendered up to each assistant turn; the result must be a prefix of the whole. A
    template that changes earlier turns (Qwen3 drops their reasoning) has no such prefixes: then every assistant turn
    becomes a conversation of its own, with the text that a server has at that point.
    """
    messages, tools = _messages(record.get("messages")), _tools(record.get("tools"))
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the conversation has no assistant turn to learn from")
    if turns[0] == 0:
        raise ValueError("the conversation starts with the assistant; put a user or system message first")
    template = _Template(tokenizer, tools)
    template.check(messages)
    found = [template.turn(messages[: i + 1]) for i in turns]
    spans = [(turn.start, _end(turn, tokenizer.eos_token)) for turn in found]
    whole = template.render(messages[: turns[-1] + 1])
    if all(whole.startswith(turn.text) for turn in found):
        return [Conversation(whole[: spans[-1][1]], tuple(spans))]
    return [Conversation(turn.text[: span[1]], (span,)) for turn, span in zip(found, spans, strict=True)]


def answered(record: Mapping[str, Any], answer: str, tokenizer: Any) -> Conversation:
    """The messages of `prompt` and the one of the column `answer`, of which only that is learned. Raises ValueError."""
    prompt, turns = _messages(record.get("prompt"), "prompt"), _messages(record.get(answer), answer)
    if prompt[-1]["role"] == "assistant":
        raise ValueError("`prompt` must end before the answer, not with an assistant message")
    if [message["role"] for message in turns] != ["assistant"]:
        raise ValueError(f"`{answer}` must be one assistant message: put the turns before it into `prompt`")
    template = _Template(tokenizer, _tools(record.get("tools")))
    template.check([*prompt, *turns])
    turn = template.turn([*prompt, *turns])
    end = _end(turn, tokenizer.eos_token)
    return Conversation(turn.text[:end], ((turn.start, end),))


def _end(turn: _Turn, eos: str) -> int:
    """An answer ends with the end-of-sequence token: text that a template adds after it is never generated."""
    at = turn.text.rfind(eos, turn.start)
    return len(turn.text) if at < 0 else at + len(eos)


class _Template:
    """The template that a tokenizer has for chats with these tools."""

    def __init__(self, tokenizer: Any, tools: list[dict[str, Any]] | None) -> None:
        self._tokenizer, self._tools = tokenizer, tools

    def check(self, messages: Sequence[Message]) -> None:
        source = self._tokenizer.get_chat_template(tools=self._tools)
        calls = any("tool_calls" in message for message in messages)
        for name, is_used in (("tools", self._tools is not None), ("tool_calls", calls)):
            if is_used and name not in source:
                raise ValueError(f"the base's chat template does not know {name}: write them into the messages' text")

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """`prompt`: with what a server adds, after which the model answers."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, tokenize=False, add_generation_prompt=prompt
            )
        except _FAILURES as e:
            raise ValueError(f"the base's chat template refuses these messages: {e}") from e
        assert isinstance(text, str)
        return text

    def turn(self, messages: Sequence[Message]) -> _Turn:
        """Up to the last message, which is the assistant's.

        Templates of reasoning models (R1's) open the reasoning in the prompt, and leave it out of a finished turn. An
        answer that begins with what the prompt has opened goes on from there, as a server's does; any other one is
        written as the template has it, and begins where prompt and turn part.
        """
        before, after = self.render(messages[:-1], prompt=True), self.render(messages)
        if after.startswith(before):
            return _Turn(after, len(before))
        probed = self.render([*messages[:-1], {**messages[-1], "content": _PROBE}])
        header = probed.partition(_PROBE)[0]
        is_opened = before.startswith(header) and after.startswith(header)
        if not is_opened or len(header) <= len(self.render(messages[:-1])):
            raise ValueError("the chat template renders an assistant turn differently from its generation prompt")
        opened, answer, eos = before[len(header) :], messages[-1]["content"], self._tokenizer.eos_token
        if answer.startswith(opened) and eos in after[len(header) :]:
            return _Turn(before + answer[len(opened) :] + eos, len(before))
        return _Turn(after, len(header))


# -- messages ---------------------------------------------------------------------------------------------------------


def _messages(given: Any, name: str = "messages") -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"`{name}` must be a list of at least one message")
    return [_message(message) for message in given]


def _message(given: Any) -> dict[str, Any]:
    """Without fields that are null, which tables have wherever another row has a value."""
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise ValueError("every message needs a `role`, as user or assistant, and `content`")
    message = {name: value for name, value in given.items() if value is not None}
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = [_call(call) for call in _list(calls, "tool_calls")]
    content = message.get("content", "" if calls else None)
    message["content"] = content if isinstance(content, str) else _text(content)
    try:
        message["content"].encode()
    except UnicodeEncodeError:
        raise ValueError("`content` holds half of a surrogate pair, which is no text") from None
    return message


def _text(parts: Any) -> str:
    """Text parts are joined by newlines, as the server joins them."""
    given = [part.get("text") if isinstance(part, dict) else part for part in parts] if isinstance(parts, list) else []
    texts = [text for text in given if isinstance(text, str)]
    if not texts or len(texts) < len(given):
        raise ValueError("a message's `content` must be a string or a list of text parts")
    return "\n".join(texts)


def _call(given: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object, which most templates expect. What is not JSON stays a text."""
    function = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError('every one of `tool_calls` needs {"function": {"name": …, "arguments": …}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    call = {name: value for name, value in given.items() if value is not None and name not in ("name", "arguments")}
    return {"type": "function", **call, "function": {"name": function["name"], "arguments": arguments}}


def _tools(given: Any) -> list[dict[str, Any]] | None:
    """The tools that a chat offers: a list, or the same as JSON, which tables need where parameters differ."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as e:
            raise ValueError(f"`tools` is a string that is not JSON: {e}") from e
    if not given:
        return None
    tools = _list(given, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("`tools` must be a list of objects, as in a request")
    return tools


def _list(given: Any, name: str) -> list[Any]:
    if not isinstance(given, list):
        raise ValueError(f"`{name}` must be a list, not {type(given).__name__}")
    return given
