"""One call as models write it, read while it arrives: `{"name": "f", "arguments": {...}}`, or the arguments alone."""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto

from loray.text.tools.json_scanner import JsonScanner, Part

_ARGUMENTS = ("arguments", "parameters")


class Progress(Enum):
    """MALFORMED: the last character does not belong to a call; what came before it does, if the call has begun."""

    MORE = auto()
    DONE = auto()
    MALFORMED = auto()


class CallObject:
    """Reads the keys in any order; other keys are ignored. Without arguments, they are `{}`.

    name       as soon as the call has begun: name and arguments are known to be there
    complete   the arguments have ended
    `names`    the only names that are calls; None: any
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self.name: str | None = None
        self.complete = False
        self._names = names
        self._scanner = JsonScanner()
        self._before = Part.BETWEEN
        self._key = self._value = ""
        self._found_name: str | None = None
        self._has_arguments = False
        self._new: list[str] = []  # of the arguments

    def feed(self, c: str) -> Progress:
        part = self._scanner.feed(c)
        ends_value = self._before is Part.VALUE and part is not Part.VALUE
        before, self._before = self._before, part
        if part is Part.BAD or (ends_value and not self._end_value()):
            return Progress.MALFORMED
        if part is Part.KEY:
            self._key = c if before is not Part.KEY else self._key + c
        elif part is Part.VALUE:
            return self._value_goes_on(c, first=before is not Part.VALUE)
        elif part is Part.END:
            return self._end()
        return Progress.MORE

    @property
    def in_string(self) -> bool:
        """Whether a string of the arguments goes on, of which `feed` needs not see what neither ends nor escapes."""
        return self._has_arguments and not self.complete and self.name is not None and self._scanner.in_string

    def take(self) -> str:
        """The arguments that have come since the last call; nothing before the call has begun."""
        if self.name is None:
            return ""
        new, self._new = "".join(self._new), []
        return new

    def _value_goes_on(self, c: str, *, first: bool) -> Progress:
        if first:
            self._key, self._value = json.loads(self._key), ""
        if self._key in _ARGUMENTS and not self.complete:
            if first:
                if c not in "{n":
                    return Progress.MALFORMED
                self._has_arguments = c == "{"
            if self._has_arguments:
                self._new.append(c)
                self._begin()
                self.complete = self._scanner.depth == 1
        elif self._key == "name":
            self._value += c
        return Progress.MORE

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

    def _end(self) -> Progress:
        if not self._has_arguments:
            self._new, self.complete = ["{}"], True
        self._begin()
        return Progress.MALFORMED if self.name is None else Progress.DONE

    def _begin(self) -> None:
        if self.name is None:
            self.name = self._found_name


class ArgumentsObject:
    """The arguments alone, of a call whose name is known. As CallObject; the call begins with the opening brace."""

    def __init__(self, name: str) -> None:
        self.name: str | None = None
        self.complete = False
        self._known_name = name
        self._scanner = JsonScanner()
        self._new = ""

    def feed(self, c: str) -> Progress:
        part = self._scanner.feed(c)
        if part is Part.BAD:
            return Progress.MALFORMED
        self.name = self._known_name
        self._new += c
        self.complete = part is Part.END
        return Progress.DONE if self.complete else Progress.MORE

    @property
    def in_string(self) -> bool:
        return self.name is not None and self._scanner.in_string

    def take(self) -> str:
        new, self._new = self._new, ""
        return new
