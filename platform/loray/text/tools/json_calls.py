"""Readers of the JSON of a tool call while it arrives.

RFC 8259. A parser that streams the arguments of a call must know where they end before it has read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum, auto
from typing import Literal

_WHITESPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_CLOSED_BY = {"{": "}", "[": "]"}


class JsonToken(Enum):
    """The kind of a character of the object: of its own keys, of its own values (all that is nested counts as such),
    its closing brace, or anything between. BAD: no JSON object goes on with this character.
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
    """A scanner of one object, from its opening brace on. After END or BAD it takes no more characters."""

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

    def feed(self, c: str) -> JsonToken:
        if not self._open:
            if c != "{":
                return JsonToken.BAD
            self._enter(c)
            return JsonToken.BETWEEN
        depth, in_key = len(self._open), self._is_key
        was_token = self._state in ("string", "escape", "hex", "literal", "number")
        ends_number = self._state == "number" and c not in "0123456789+-.eE"
        if not self._next(c):
            return JsonToken.BAD
        if not self._open:
            return JsonToken.END
        if depth > 1 or len(self._open) > 1:
            return JsonToken.VALUE
        if ends_number or not (was_token or self._state in ("string", "literal", "number")):
            return JsonToken.BETWEEN
        return JsonToken.KEY if in_key or self._is_key else JsonToken.VALUE

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


# -- calls ------------------------------------------------------------------------------------------------------------

_ARGUMENTS = ("arguments", "parameters")


class CallState(Enum):
    """The state of a call that is read. MALFORMED: the last character does not belong to a call; what came before it
    does, if the call has begun.
    """

    MORE = auto()
    DONE = auto()
    MALFORMED = auto()


class CallObject:
    """An object with the name and the arguments of a call, in any order. Other keys are ignored; arguments that are not
    there are `{}`.

    name       as soon as the call has begun: name and arguments are known to be there
    complete   the arguments have ended
    `names`    the only names that are calls; None: any
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self.name: str | None = None
        self.complete = False
        self._names = names
        self._scanner = JsonScanner()
        self._before = JsonToken.BETWEEN
        self._key = self._value = ""
        self._found_name: str | None = None
        self._has_arguments = False
        self._new: list[str] = []  # of the arguments

    def feed(self, c: str) -> CallState:
        part = self._scanner.feed(c)
        ends_value = self._before is JsonToken.VALUE and part is not JsonToken.VALUE
        before, self._before = self._before, part
        if part is JsonToken.BAD or (ends_value and not self._end_value()):
            return CallState.MALFORMED
        if part is JsonToken.KEY:
            self._key = c if before is not JsonToken.KEY else self._key + c
        elif part is JsonToken.VALUE:
            return self._value_goes_on(c, first=before is not JsonToken.VALUE)
        elif part is JsonToken.END:
            return self._end()
        return CallState.MORE

    @property
    def in_string(self) -> bool:
        """A string of the arguments goes on, of which `feed` needs not see what neither ends nor escapes."""
        return self._has_arguments and not self.complete and self.name is not None and self._scanner.in_string

    def take(self) -> str:
        """The arguments that have come since the last call; nothing before the call has begun."""
        if self.name is None:
            return ""
        new, self._new = "".join(self._new), []
        return new

    def _value_goes_on(self, c: str, *, first: bool) -> CallState:
        if first:
            self._key, self._value = json.loads(self._key), ""
        if self._key in _ARGUMENTS and not self.complete:
            if first:
                if c not in "{n":
                    return CallState.MALFORMED
                self._has_arguments = c == "{"
            if self._has_arguments:
                self._new.append(c)
                self._begin()
                self.complete = self._scanner.depth == 1
        elif self._key == "name":
            self._value += c
        return CallState.MORE

    def _end_value(self) -> bool:
        """Called with the first character after a value; False if the value cannot be that of a call."""
        if self._key == "name" and self._found_name is None:
            name = json.loads(self._value)
            if not isinstance(name, str) or not name or (self._names is not None and name not in self._names):
                return False
            self._found_name = name
            if self._new:
                self._begin()
        self._key = ""
        return True

    def _end(self) -> CallState:
        if not self._has_arguments:
            self._new, self.complete = ["{}"], True
        self._begin()
        return CallState.MALFORMED if self.name is None else CallState.DONE

    def _begin(self) -> None:
        if self.name is None:
            self.name = self._found_name


class ArgumentsObject:
    """The arguments of a call whose name is known, read as by CallObject; the call begins with the opening brace."""

    def __init__(self, name: str) -> None:
        self.name: str | None = None
        self.complete = False
        self._known_name = name
        self._scanner = JsonScanner()
        self._new = ""

    def feed(self, c: str) -> CallState:
        part = self._scanner.feed(c)
        if part is JsonToken.BAD:
            return CallState.MALFORMED
        self.name = self._known_name
        self._new += c
        self.complete = part is JsonToken.END
        return CallState.DONE if self.complete else CallState.MORE

    @property
    def in_string(self) -> bool:
        return self.name is not None and self._scanner.in_string

    def take(self) -> str:
        new, self._new = self._new, ""
        return new
