"""Arguments of a call with Python's literals, as JSON, while they arrive.

The grammar is that of literals in https://docs.python.org/3/reference/lexical_analysis.html: strings without prefixes,
numbers, True, False and None, lists and dictionaries. JSON's true, false and null are taken too. Nothing is evaluated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator
from contextlib import suppress

from loray.text.tools.json_calls import CallState

_DEEPEST = 64
_LONGEST_WORD = 1000
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_ESCAPES = {"\n": "", "\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_ESCAPES["v"] = "\v"
_NUM_DIGITS = {"x": 2, "u": 4, "U": 8}  # of characters by their code
_NO_NAME = frozenset("=(),[]{}'\" \t\r\n")
_OCTAL = "01234567"
_INTEGER = re.compile(r"[+-]?(0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|[0-9][0-9_]*)")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)  # JSON's
_HIGH, _LOW = range(0xD800, 0xDC00), range(0xDC00, 0xE000)
_Writing = Generator[None, str, str]  # receives characters; returns the first one that it did not use


class _Malformed(Exception):
    """No literal goes on with the last character. `args`: what has been read before it and not been written."""


class PythonArguments:
    """Reads what stands between the parentheses of a call, `name=value, …`, up to the closing one, and writes it as a
    JSON object. After DONE or MALFORMED it takes no more characters.

    in_string  characters that neither end a text nor escape may be given to `take_text` together
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._quote = ""
        self._reading = self._arguments()
        next(self._reading)

    @property
    def in_string(self) -> bool:
        return self._quote != ""

    def take_text(self, text: str) -> None:
        self._write(_escaped(text))

    def feed(self, c: str) -> CallState:
        try:
            self._reading.send(c)
        except StopIteration:
            return CallState.DONE
        except _Malformed as e:
            self._write("".join(e.args))
            return CallState.MALFORMED
        return CallState.MORE

    def _arguments(self) -> Generator[None, str, None]:
        before, c = "{", (yield from self._spaces((yield)))
        while c != ")":
            name = ""
            while c not in _NO_NAME:
                name += c
                c = yield
            c = yield from self._spaces(c)
            if not name or c != "=":
                raise _Malformed(name)
            self._write(f"{before}{json.dumps(name, ensure_ascii=False)}: ")
            c = yield from self._value((yield from self._spaces((yield))), 0)
            c = yield from self._spaces(c)
            if c == ",":
                c = yield from self._spaces((yield))
            elif c != ")":
                raise _Malformed
            before = ", "
        self._write("{}" if before == "{" else "}")

    def _spaces(self, c: str) -> _Writing:
        while c in " \t\r\n":
            c = yield
        return c

    def _value(self, c: str, depth: int) -> _Writing:
        if c == "[":
            return (yield from self._items(depth + 1))
        if c == "{":
            return (yield from self._members(depth + 1))
        if c in "\"'":
            return (yield from self._strings(c))
        word, c = yield from self._word(c)
        self._write(_WORDS[word] if word in _WORDS else _number(word))
        return c

    def _items(self, depth: int) -> _Writing:
        if depth > _DEEPEST:
            raise _Malformed
        before, c = "[", (yield from self._spaces((yield)))
        while c != "]":
            self._write(before)
            c = yield from self._spaces((yield from self._value(c, depth)))
            before = ", "
            if c == ",":
                c = yield from self._spaces((yield))
            elif c != "]":
                raise _Malformed
        self._write("[]" if before == "[" else "]")
        return (yield)

    def _members(self, depth: int) -> _Writing:
        if depth > _DEEPEST:
            raise _Malformed
        before, c = "{", (yield from self._spaces((yield)))
        while c != "}":
            self._write(before)
            if c in "\"'":
                c = yield from self._strings(c)
            else:
                word, c = yield from self._word(c)
                self._write(f'"{_WORDS[word] if word in _WORDS else _number(word)}"')  # as json.dumps has such keys
            if (yield from self._spaces(c)) != ":":
                raise _Malformed
            self._write(": ")
            c = yield from self._value((yield from self._spaces((yield))), depth)
            c = yield from self._spaces(c)
            before = ", "
            if c == ",":
                c = yield from self._spaces((yield))
            elif c != "}":
                raise _Malformed
        self._write("{}" if before == "{" else "}")
        return (yield)

    def _word(self, c: str) -> Generator[None, str, tuple[str, str]]:
        word = ""
        while c.isalnum() or c in "+-._":
            word += c
            if len(word) > _LONGEST_WORD:
                raise _Malformed(word[:-1])
            c = yield
        return word, c

    def _strings(self, c: str) -> _Writing:
        """A string, or several one after the other, which are one. The first begins with the quote `c`."""
        self._write('"')
        while c in ("'", '"'):
            quote, c = c, (yield)
            if c == quote:
                c = yield
                if c != quote:  # it was empty
                    c = yield from self._spaces(c)
                    continue
                yield from self._characters((yield), quote * 3)
            else:
                yield from self._characters(c, quote)
            c = yield from self._spaces((yield))
        self._write('"')
        return c

    def _characters(self, c: str, end: str) -> Generator[None, str, None]:
        num = 0  # of quotes that may be the end
        while True:
            after = ""
            if c == end[0]:
                num += 1
                if num == len(end):
                    return
            else:
                self._write(_escaped(end[0] * num))
                num = 0
                if c == "\\":
                    after = yield from self._escape()
                elif c == "\n" and len(end) == 1:
                    raise _Malformed
                else:
                    self._write(_escaped(c))
            if after:
                c = after
                continue
            self._quote = end if len(end) == 1 else ""
            c = yield
            self._quote = ""

    def _escape(self) -> _Writing:
        """Write what the characters after a backslash mean. Returns nothing where all that was read belongs to them."""
        c = yield
        if c in _NUM_DIGITS:
            code = yield from self._digits(_NUM_DIGITS[c])
            # A half of a pair stays as it is: with the other one it is a character in JSON.
            self._write(f"\\u{code:04x}" if code in _HIGH or code in _LOW else _escaped(_character(code)))
        elif c in _OCTAL:
            digits = ""
            while c in _OCTAL and len(digits) < 3:
                digits += c
                c = yield
            self._write(_escaped(chr(int(digits, 8))))
            return c
        else:
            self._write(_escaped(_ESCAPES.get(c, f"\\{c}")))
        return ""

    def _digits(self, number: int) -> Generator[None, str, int]:
        digits = ""
        for _ in range(number):
            digits += yield
        with suppress(ValueError):
            if digits.isalnum():
                return int(digits, 16)
        raise _Malformed


def _character(code: int) -> str:
    if code > 0x10FFFF:
        raise _Malformed
    return chr(code)


def _number(word: str) -> str:
    """A number as JSON. What JSON cannot write is malformed, like what is no number."""
    if _NUMBER.fullmatch(word):
        return word
    if _INTEGER.fullmatch(word):
        with suppress(ValueError):
            return str(int(word, 0))
    with suppress(ValueError):
        value = float(word)
        if math.isfinite(value):
            return repr(value)
    raise _Malformed(word)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
