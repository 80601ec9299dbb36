"""Follows one JSON object character by character: what each character is part of, and where the text stops being JSON.

RFC 8259. A parser that streams the arguments of a call must know where they end before it has read them.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Literal

_WHITESPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_CLOSED_BY = {"{": "}", "[": "]"}


class Part(Enum):
    """What a character of the object is: of its own keys, of its own values (all that is nested counts as such), its
    closing brace, or anything between. BAD: no JSON object goes on with this character.
    """

    BETWEEN = auto()
    KEY = auto()
    VALUE = auto()
    END = auto()
    BAD = auto()


_State = Literal[
    "value", "value or ]", "key", "key or }", ":", ", or end", "string", "escape", "hex", "literal", "number"
]


class JsonScanner:
    """Starts before the opening brace. After END or BAD it takes no more characters."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._state: _State = "value"
        self._is_key = False
        self._num_hex = 0
        self._word = ""  # of a number, or what is left of a literal

    @property
    def depth(self) -> int:
        """Objects and arrays that are open."""
        return len(self._open)

    @property
    def in_string(self) -> bool:
        return self._state == "string"

    def feed(self, c: str) -> Part:
        if not self._open:
            if c != "{":
                return Part.BAD
            self._enter(c)
            return Part.BETWEEN
        depth, in_key = len(self._open), self._is_key
        was_token = self._state in ("string", "escape", "hex", "literal", "number")
        ends_number = self._state == "number" and c not in "0123456789+-.eE"
        if not self._next(c):
            return Part.BAD
        if not self._open:
            return Part.END
        if depth > 1 or len(self._open) > 1:
            return Part.VALUE
        if ends_number or not (was_token or self._state in ("string", "literal", "number")):
            return Part.BETWEEN
        return Part.KEY if in_key or self._is_key else Part.VALUE

    def _next(self, c: str) -> bool:
        """Takes one character inside the object; False if it cannot follow."""
        match self._state:
            case "string":
                return self._in_string(c)
            case "escape":
                self._state, self._num_hex = ("hex", 4) if c == "u" else ("string", 0)
                return c in '"\\/bfnrtu'
            case "hex":
                self._num_hex -= 1
                self._state = "hex" if self._num_hex else "string"
                return c in "0123456789abcdefABCDEF"
            case "literal":
                expected, self._word = self._word[0], self._word[1:]
                self._state = "literal" if self._word else ", or end"
                return c == expected
            case "number":
                if c in "0123456789+-.eE":
                    self._word += c
                    return len(self._word) < 1000
                self._state = ", or end"
                return _NUMBER.fullmatch(self._word) is not None and self._next(c)
        return c in _WHITESPACE or self._punctuation(c)

    def _in_string(self, c: str) -> bool:
        if c == '"':
            self._state = ":" if self._is_key else ", or end"
            self._is_key = False
        elif c == "\\":
            self._state = "escape"
        return c >= " "

    def _punctuation(self, c: str) -> bool:
        match self._state, c:
            case (":", ":"):
                self._state = "value"
            case (", or end", ","):
                self._state = "key" if self._open[-1] == "{" else "value"
            case ((", or end" | "key or }"), "}") | ((", or end" | "value or ]"), "]"):
                if _CLOSED_BY[self._open.pop()] != c:
                    return False
                self._state = ", or end"
            case (("key" | "key or }"), '"'):
                self._state, self._is_key = "string", True
            case (("value" | "value or ]"), _):
                return self._begin_value(c)
            case _:
                return False
        return True

    def _begin_value(self, c: str) -> bool:
        if c in _CLOSED_BY:
            self._enter(c)
        elif c == '"':
            self._state = "string"
        elif c in _LITERALS:
            self._state, self._word = "literal", _LITERALS[c][1:]
        elif c in "-0123456789":
            self._state, self._word = "number", c
        else:
            return False
        return True

    def _enter(self, c: str) -> None:
        self._open.append(c)
        self._state = "key or }" if c == "{" else "value or ]"
