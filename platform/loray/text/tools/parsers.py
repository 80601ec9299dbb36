"""Parsers of tool calls as Hermes, Llama, Mistral and Qwen3-Coder write them.

A parser runs a generator that receives one character after the other, and None at the end. So the result cannot depend
on how the text was cut.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, Protocol

from loray.spec import Tool, ToolCallDelta, ToolParserName, ToolUse
from loray.text.tools.json_calls import ArgumentsObject, CallObject, CallState
from loray.text.tools.python_calls import PythonArguments
from loray.text.tools.schemas import as_json, properties_of, types_of

Piece = str | ToolCallDelta
Char = str | None  # None: the text has ended
Reading = Generator[None, Char, Char]  # receives characters; returns the first one that it did not use


class ToolParser(Protocol):
    """A parser that splits generated text into what is said and what is called.

    A call's first delta has its id, its name and no arguments. A call that is malformed before its arguments begin is
    text; from there on everything up to the call's end marker is arguments, be they valid JSON or not.
    """

    def push(self, text: str) -> Sequence[Piece]:
        """The pieces that have become certain with `text`."""

    def finish(self) -> Sequence[Piece]:
        """The rest, when no more text comes."""


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class _Shortcut(NamedTuple):
    """The way past a generator that waits: a text that matches `plain` is given to `emit`, and needs not be read."""

    plain: re.Pattern[str]
    emit: Callable[[str], None]


_IN_STRING = re.compile(r'[^"\\\x00-\x1f]+')
_IN_PYTHON_STRING = re.compile(r"""[^'"\\\x00-\x1f]+""")


@lru_cache
def _without(first: str) -> re.Pattern[str]:
    """Text without `first`, with which markers begin, and without whitespace at its end, which may belong to one."""
    return re.compile(rf"[^{re.escape(first)}]*[^{re.escape(first)}\s]")


class CharacterParser:
    """A parser that runs `_read`, the family's generator, over the text."""

    def __init__(self, tools: Sequence[Tool], new_id: Callable[[], str] = new_call_id) -> None:
        """`tools`: those that may be called."""
        self._tools, self._names, self._new_id = tools, [tool.name for tool in tools], new_id
        self._num_calls = 0
        self._out: list[Piece] = []
        self._shortcut: _Shortcut | None = None
        self._reading = self._read()
        next(self._reading)

    def push(self, text: str) -> Sequence[Piece]:
        take = self._shortcut
        if take is not None and take.plain.fullmatch(text):
            take.emit(text)
        else:
            for c in text:
                self._reading.send(c)
        return self._taken()

    def finish(self) -> Sequence[Piece]:
        try:
            self._reading.send(None)
        except StopIteration:
            pass
        else:
            raise AssertionError("the parser went on after the end")
        return self._taken()

    def _read(self) -> Reading:
        raise NotImplementedError

    # -- output -------------------------------------------------------------------------------------------------------

    def _taken(self) -> Sequence[Piece]:
        out, self._out = self._out, []
        return out

    def _text(self, text: str) -> None:
        if text and self._out and isinstance(self._out[-1], str):
            self._out[-1] += text
        elif text:
            self._out.append(text)

    def _call(self, name: str) -> None:
        self._out.append(ToolCallDelta(self._num_calls, self._new_id(), name, ""))
        self._num_calls += 1

    def _arguments(self, text: str) -> None:
        index, last = self._num_calls - 1, self._out[-1] if self._out else None
        if text and isinstance(last, ToolCallDelta) and last.id is None:
            self._out[-1] = replace(last, arguments=last.arguments + text)
        elif text:
            self._out.append(ToolCallDelta(index, None, None, text))

    # -- reading ------------------------------------------------------------------------------------------------------

    def _spaces(self, c: Char) -> Generator[None, Char, tuple[str, Char]]:
        """Whitespace, and the character after it."""
        spaces = ""
        while c is not None and c.isspace():
            spaces += c
            c = yield
        return spaces, c

    def _until(
        self, begin: str, c: Char, *, after_call: bool, end: str = ""
    ) -> Generator[None, Char, tuple[str, Char] | None]:
        """Emit text until the marker `begin`. Returns it with the whitespace around it, and the character after that;
        None where the text ends before it.

        Directly after a call, whitespace and the call's marker `end` are not text.
        """
        pending, markers = "", [m for m in (begin, end) if m]
        while c is not None:
            pending = (pending + c).lstrip() if after_call else pending + c
            if pending.endswith(begin):
                certain = pending[: -len(begin)].rstrip()
                self._text(certain)
                spaces, c = yield from self._spaces((yield))
                return pending[len(certain) :] + spaces, c
            if after_call and pending == end:
                pending = ""
            else:
                keep = max(overlap(pending, m) for m in markers)
                certain = pending[: len(pending) - keep].rstrip()
                if certain:
                    self._text(certain)
                    pending, markers, after_call = pending[len(certain) :], [begin], False
            if not pending and not after_call:
                self._shortcut = _Shortcut(_without(begin[0]), self._text)
            c = yield
            self._shortcut = None
        self._text(pending)
        return None

    def _object(self, call: CallObject | ArgumentsObject, raw: str, c: Char, *, end: str = "") -> Reading:
        """One call whose object begins with `c`. `raw` came before it, and is text if it turns out to be no call."""
        begun = False
        while c is not None:
            progress = call.feed(c)
            if not begun and call.name is not None:
                begun = True
                self._call(call.name)
            self._arguments(call.take())
            if progress is CallState.DONE:
                return (yield)
            if progress is CallState.MALFORMED:
                if begun and not call.complete:
                    return (yield from self._raw_arguments(c, end))
                if not begun:
                    self._text(raw)
                return c
            if not begun:
                raw += c
            if call.in_string:
                self._shortcut = _Shortcut(_IN_STRING, self._arguments)
            c = yield
            self._shortcut = None
        if not begun:
            self._text(raw)
        return None

    def _raw_arguments(self, c: Char, end: str) -> Reading:
        """Arguments that are not JSON: everything up to the marker `end`, which is taken too."""
        pending = ""
        while c is not None:
            pending += c
            if end and pending.endswith(end):
                self._arguments(pending[: -len(end)].rstrip())
                return (yield)
            certain = pending[: len(pending) - overlap(pending, end)].rstrip()
            self._arguments(certain)
            pending = pending[len(certain) :]
            c = yield
        self._arguments(pending)
        return None


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `marker`."""
    for n in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:n]):
            return n
    return 0


_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")


class HermesParser(CharacterParser):
    """Hermes, Qwen 2.5 and 3, loray's own prompt: `<tool_call>{"name": …, "arguments": …}</tool_call>`, repeated."""

    BEGIN, END = "<tool_call>", "</tool_call>"

    def _read(self) -> Reading:
        c: Char = yield
        called = False
        while True:
            found = yield from self._until(self.BEGIN, c, after_call=called, end=self.END)
            if found is None:
                return None
            raw, c = found
            before = self._num_calls
            c = yield from self._object(CallObject(), raw, c, end=self.END)
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
            raw, c = found

    def _separator(self, c: Char) -> Generator[None, Char, tuple[str, Char]]:
        """The text between two calls, and the character after it; whitespace after a call counts as nothing."""
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
            found = yield from self._until(self.BEGIN, c, after_call=called)
            if found is None:
                return None
            raw, c = found
            before = self._num_calls
            if c == "[":
                c = yield from self._array(raw)
            elif c == "{":
                c = yield from self._object(CallObject(), raw, c)
            else:
                c = yield from self._named(raw, c)
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
        """A name and markers could begin with `head`."""
        name, bracket, rest = head.partition("[")
        rest = bracket + rest
        if rest.startswith(self.CALL_ID):
            call_id, bracket, more = rest.removeprefix(self.CALL_ID).partition("[")
            rest = bracket + more if call_id.isalnum() or not call_id + bracket else "?"
        return bool(_NAME.fullmatch(name)) and (self.ARGUMENTS.startswith(rest) or self.CALL_ID.startswith(rest))


class QwenCoderParser(CharacterParser):
    """Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>`, repeated.

    A value is a text as it stands, or JSON where the function's schema wants another type. One newline at each of its
    ends is not a part of it. What stands between parameters is nothing.
    """

    BEGIN, END = HermesParser.BEGIN, HermesParser.END
    FUNCTION, PARAMETER, END_FUNCTION, END_PARAMETER = "<function=", "<parameter=", "</function>", "</parameter>"

    def _read(self) -> Reading:
        c: Char = yield
        called = False
        while True:
            found = yield from self._until(self.BEGIN, c, after_call=called, end=self.END)
            if found is None:
                return None
            raw, c = found
            head = ""
            while c is not None and self._may_begin(head + c):
                head += c
                if c == ">":
                    break
                c = yield
            called = head.endswith(">")
            if not called:
                self._text(raw + head)
                continue
            name = head[len(self.FUNCTION) : -1]
            self._call(name)
            c = yield from self._parameters(name)

    def _may_begin(self, head: str) -> bool:
        name = head[len(self.FUNCTION) :]
        return self.FUNCTION.startswith(head) or (
            head.startswith(self.FUNCTION) and _NAME.fullmatch(name.removesuffix(">")) is not None
        )

    def _parameters(self, function: str) -> Reading:
        schema = next((tool.parameters for tool in self._tools if tool.name == function), {})
        properties = properties_of(schema)
        before, pending = "{", ""
        while (c := (yield)) is not None:
            pending += c
            if pending.endswith((self.END_FUNCTION, self.END)):
                self._arguments("{}" if before == "{" else "}")
                return (yield)
            if c != ">":
                continue
            _, found, key = pending[:-1].rpartition(self.PARAMETER)
            pending = ""
            if found:
                self._arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
                before = ", "
                if not (yield from self._value(types_of(properties.get(key, {}), schema))):
                    return None
        return None

    def _value(self, types: frozenset[str]) -> Generator[None, Char, bool]:
        """One value up to its end marker, where its function may go on. A text is passed on while it comes."""
        is_text, last = types == {"string"}, f"\n{self.END_PARAMETER}"
        if is_text:
            self._arguments('"')
        c = yield
        pending = "" if c == "\n" or c is None else c
        while c is not None:
            if is_text and not pending:
                self._shortcut = _Shortcut(_without("<"), self._quoted)
            c = yield
            self._shortcut = None
            pending += c or ""
            ends = pending.endswith(self.END_PARAMETER)
            if ends:
                pending = pending[: -len(self.END_PARAMETER)].removesuffix("\n")
            if is_text:
                keep = 0 if ends or c is None else max(overlap(pending, m) for m in (self.END_PARAMETER, last))
                self._quoted(pending[: len(pending) - keep])
                pending = pending[len(pending) - keep :]
            if ends:
                self._arguments('"' if is_text else as_json(pending, types))
                return True
        self._arguments(pending)
        return False

    def _quoted(self, text: str) -> None:
        self._arguments(json.dumps(text, ensure_ascii=False)[1:-1])


class PythonicParser(CharacterParser):
    """Llama 3.2 and 4 with the prompt of Meta's cards: the answer *is* `[f(a=1), g(b="x")]`, calls of given tools with
    literals of Python, which become JSON as they come and are never evaluated. Llama 4 may put them between markers.
    """

    BEGIN, END = "<|python_start|>", "<|python_end|>"

    def _read(self) -> Reading:
        raw, c = yield from self._spaces((yield))
        while True:
            before = self._num_calls
            if c == "[":
                c = yield from self._calls(raw)
            else:
                self._text(raw)
            found = yield from self._until(self.BEGIN, c, after_call=self._num_calls > before, end=self.END)
            if found is None:
                return None
            raw, c = found

    def _calls(self, raw: str) -> Reading:
        """Calls between brackets, of which the first one has been read."""
        raw += "["
        while True:
            spaces, c = yield from self._spaces((yield))
            name = ""
            while c is not None and self._may_be_called(name + c):
                name += c
                c = yield
            if c != "(" or name not in self._names:
                if c is not None or raw != ",":  # else it is cut off between two calls
                    self._text(raw + spaces + name)
                return c
            self._call(name)
            writer, progress = PythonArguments(self._arguments), CallState.MORE
            while progress is CallState.MORE:
                if writer.in_string:
                    self._shortcut = _Shortcut(_IN_PYTHON_STRING, writer.take_text)
                c = yield
                self._shortcut = None
                if c is None:
                    return None
                progress = writer.feed(c)
            if progress is CallState.MALFORMED:
                return (yield from self._raw_arguments(c, ""))
            _, c = yield from self._spaces((yield))
            if c == "]":
                return (yield)
            if c != ",":
                return c
            raw = ","

    def _may_be_called(self, name: str) -> bool:
        return any(known.startswith(name) for known in self._names)


_PARSERS: Mapping[ToolParserName, type[CharacterParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "qwen3_coder": QwenCoderParser,
}
# What a parser looks for. Where it is a token of the tokenizer, that token must become text.
MARKERS: Mapping[ToolParserName, Sequence[str]] = {
    "hermes": (HermesParser.BEGIN, HermesParser.END),
    "llama3_json": (LlamaParser.BEGIN,),
    "mistral": (MistralParser.BEGIN, MistralParser.ARGUMENTS, MistralParser.CALL_ID),
    "pythonic": (PythonicParser.BEGIN, PythonicParser.END),
    "qwen3_coder": (QwenCoderParser.BEGIN, QwenCoderParser.END),
}


def parser_for(name: ToolParserName, use: ToolUse) -> ToolParser:
    """A parser for one answer."""
    return _PARSERS[name](use.callable)


_PYTHON_CALL = re.compile(r"\[\w+\(\w+=")  # in Meta's prompt: "[func_name1(params_name1=params_value1, …"


def detect(added_tokens: Collection[str], template: str = "") -> ToolParserName:
    """The form in which a base writes calls, by its tokenizer's added tokens and the text of its chat template. A base
    that shows no sign of one gets loray's own prompt, which asks for that of Hermes.
    """
    if QwenCoderParser.FUNCTION in template and QwenCoderParser.PARAMETER in template:
        return "qwen3_coder"
    if _PYTHON_CALL.search(template) and "tools" in template:
        return "pythonic"
    for known in (added_tokens, template):
        if MistralParser.BEGIN in known:
            return "mistral"
        if HermesParser.BEGIN in known:
            return "hermes"
        if LlamaParser.BEGIN in known and "tools" in template:
            return "llama3_json"
    return "hermes"
