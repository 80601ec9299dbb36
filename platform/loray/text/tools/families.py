"""The parsers of tool calls, one for each way in which families of models write them."""

from __future__ import annotations

import re
from collections.abc import Generator

from loray.text.tools.call_object import ArgumentsObject, CallObject
from loray.text.tools.parser import Char, CharacterParser, Reading

_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")


class HermesParser(CharacterParser):
    """Hermes, Qwen 2.5 and 3, loray's own prompt: `<tool_call>{"name": …, "arguments": …}</tool_call>`, repeated."""

    BEGIN, END = "<tool_call>", "</tool_call>"

    def _read(self) -> Reading:
        c: Char = yield
        called = False
        while True:
            raw = yield from self._until(self.BEGIN, c, after_call=called, end=self.END)
            if raw is None:
                return None
            spaces, c = yield from self._spaces((yield))
            before = self._num_calls
            c = yield from self._object(CallObject(), raw + spaces, c, end=self.END)
            called = self._num_calls > before


class LlamaParser(CharacterParser):
    """Llama 3: the answer *is* `{"name": …, "parameters": …}`, or several with `;` between, or they follow
    `<|python_tag|>`. Only the names of given tools are calls: JSON without a marker may as well be the answer.
    """

    BEGIN = "<|python_tag|>"

    def _read(self) -> Reading:
        raw, c = yield from self._spaces((yield))
        while True:
            called = False
            if c == "{":
                before = self._num_calls
                c = yield from self._object(CallObject(self._names), raw, c)
                called = self._num_calls > before
                if called:
                    raw, c = yield from self._separator(c)
                    if c == "{":
                        continue
                    self._text(raw)
            else:
                self._text(raw)
            found = yield from self._until(self.BEGIN, c, after_call=called)
            if found is None:
                return None
            spaces, c = yield from self._spaces((yield))
            raw = found + spaces

    def _separator(self, c: Char) -> Generator[None, Char, tuple[str, Char]]:
        """What stands between two calls, and the character after it; whitespace after a call counts as nothing."""
        _, c = yield from self._spaces(c)
        if c is None or c not in ";,":
            return "", c
        spaces, after = yield from self._spaces((yield))
        return c + spaces, after


class MistralParser(CharacterParser):
    """Mistral: `[TOOL_CALLS][{"name": …, "arguments": …}, …]`, and since version 11 of its tokenizer
    `[TOOL_CALLS]name[ARGS]{…}`, repeated, maybe with `[CALL_ID]…` after the name.
    """

    BEGIN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"

    def _read(self) -> Reading:
        c: Char = yield
        called = False
        while True:
            raw = yield from self._until(self.BEGIN, c, after_call=called)
            if raw is None:
                return None
            spaces, c = yield from self._spaces((yield))
            before = self._num_calls
            if c == "[":
                c = yield from self._array(raw + spaces)
            elif c == "{":
                c = yield from self._object(CallObject(), raw + spaces, c)
            else:
                c = yield from self._named(raw + spaces, c)
            called = self._num_calls > before

    def _array(self, raw: str) -> Reading:
        """Calls between brackets, of which the first has been read."""
        raw += "["
        while True:
            spaces, c = yield from self._spaces((yield))
            if c is None and raw == ",":
                return None  # cut off between two calls
            if c != "{":
                self._text(raw + spaces)
                return c
            before = self._num_calls
            c = yield from self._object(CallObject(), raw + spaces, c)
            if self._num_calls == before:
                return c
            _, c = yield from self._spaces(c)
            if c == "]":
                return (yield)
            if c != ",":
                return c
            raw = c

    def _named(self, raw: str, c: Char) -> Reading:
        """`name[ARGS]{…}`, or `name{…}`; the first character of the name is `c`."""
        head = ""
        while c is not None and c != "{" and self._may_precede_arguments(head + c):
            head += c
            c = yield
        name = head.partition("[")[0]
        complete = name != "" and (name == head or head.endswith(self.ARGUMENTS))
        spaces, c = yield from self._spaces(c)
        if c != "{" or not complete:
            self._text(raw + head + spaces)
            return c
        return (yield from self._object(ArgumentsObject(name), raw + head + spaces, c))

    def _may_precede_arguments(self, head: str) -> bool:
        """Whether a name and markers could begin with `head`."""
        name, bracket, rest = head.partition("[")
        rest = bracket + rest
        if rest.startswith(self.CALL_ID):
            call_id, bracket, more = rest.removeprefix(self.CALL_ID).partition("[")
            rest = bracket + more if call_id.isalnum() or not call_id + bracket else "?"
        return bool(_NAME.fullmatch(name)) and (self.ARGUMENTS.startswith(rest) or self.CALL_ID.startswith(rest))
