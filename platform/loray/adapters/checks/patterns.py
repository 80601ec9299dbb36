"""PEFT's `alpha_pattern` and `rank_pattern`: values by patterns of module paths, in bounded time.

In PEFT a pattern is a regular expression, and Python's may run for ever. Here it is a subset, matched by following all
of its positions in the path at once: characters, `.`, `\\d`, `\\w`, escapes, sets, each with `*`, `+` or `?`; groups
of alternatives without groups in them; `^` at the beginning and `$` at the end. The number of steps is limited.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterator, Set
from itertools import pairwise
from typing import NamedTuple

from loray.errors import UnsupportedError, shown
from loray.spec import LINEAR_MODULES

MAX_LITERALS = 1 << 14
MAX_PATTERNS = 64  # that are not plain paths
MAX_CHARACTERS = 512
MAX_STEPS = 1 << 20  # of one adapter

_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_PARTS = {"model", "layers", "self_attn", "mlp", *LINEAR_MODULES}
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES = {"d": frozenset(string.digits), "w": _WORD}
_ANY = frozenset(map(chr, range(32, 127)))  # of which the paths of modules consist
_QUANTIFIERS = {"*": (True, True), "+": (False, True), "?": (True, False)}  # may be absent, may be repeated


class _Atom(NamedTuple):
    characters: Set[str]
    optional: bool = False
    repeated: bool = False


class _Group(NamedTuple):
    alternatives: tuple[tuple[_Atom, ...], ...]
    optional: bool = False


class _Pattern(NamedTuple):
    """Alternatives; `from_start`: the pattern begins with ^."""

    sequences: tuple[tuple[_Atom | _Group, ...], ...]
    from_start: bool


class ModulePatterns:
    """Values of modules. Raises UnsupportedError, which names `source`, for what is not in the subset."""

    def __init__(self, option: str, raw: object, *, source: str) -> None:
        self._where = f"{source}: {option}"
        if raw is not None and not isinstance(raw, dict):
            raise UnsupportedError(f"{self._where} is {shown(raw)}, not an object of patterns and numbers")
        self._literals: dict[str, tuple[int, float]] = {}
        self._patterns: list[tuple[int, float, _Pattern]] = []
        self._steps_left = MAX_STEPS
        for i, (pattern, value) in enumerate((raw or {}).items()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
                raise UnsupportedError(f"{self._where} of {shown(pattern)} is {shown(value)}, not a finite number")
            if len(pattern) > MAX_CHARACTERS:
                raise UnsupportedError(f"{self._where}: a pattern has more than {MAX_CHARACTERS} characters")
            if _is_path(pattern):
                self._literals.setdefault(pattern, (i, float(value)))
            else:
                self._patterns.append((i, float(value), _Parser(pattern, self._where).parse()))
        if len(self._literals) > MAX_LITERALS or len(self._patterns) > MAX_PATTERNS:
            raise UnsupportedError(
                f"{self._where} has too many patterns; {MAX_LITERALS:,} paths and {MAX_PATTERNS} others may be in it"
            )

    def value(self, path: str, default: float) -> float:
        """PEFT's rule: the value of the first pattern that matches `path` or a dotted suffix of it."""
        starts = [0, *(i + 1 for i, character in enumerate(path) if character == ".")]
        found = [self._literals[path[s:]] for s in starts if path[s:] in self._literals]
        first = min(found, default=None)
        for i, value, pattern in self._patterns:
            if first is not None and first[0] < i:
                break
            if self._matches(pattern, path, {0} if pattern.from_start else set(starts)):
                return value
        return default if first is None else first[1]

    def _matches(self, pattern: _Pattern, path: str, starts: set[int]) -> bool:
        return any(len(path) in self._ends(sequence, path, starts) for sequence in pattern.sequences)

    def _ends(self, sequence: tuple[_Atom | _Group, ...], path: str, positions: set[int]) -> set[int]:
        """Where a match of `sequence` that begins at one of `positions` may end."""
        for element in sequence:
            if not positions:
                return positions
            self._count(len(positions))
            if isinstance(element, _Atom):
                positions = self._step(element, path, positions)
            else:
                ends = [self._ends(alternative, path, positions) for alternative in element.alternatives]
                positions = set().union(*ends, positions if element.optional else ())
        return positions

    def _step(self, atom: _Atom, path: str, positions: set[int]) -> set[int]:
        ends = {p + 1 for p in positions if p < len(path) and path[p] in atom.characters}
        if atom.repeated:
            for p in range(min(ends, default=len(path)), len(path)):
                if p in ends and path[p] in atom.characters:
                    ends.add(p + 1)
            self._count(len(path))
        return ends | positions if atom.optional else ends

    def _count(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise UnsupportedError(f"{self._where} needs too many steps; name the modules by their paths instead")


class _Parser:
    def __init__(self, pattern: str, where: str) -> None:
        self._rest, self._pattern, self._where = list(reversed(pattern)), pattern, where

    def parse(self) -> _Pattern:
        from_start = self._take("^")
        sequences = tuple(self._sequences(end=None))
        if from_start and len(sequences) > 1:
            raise self._refused("^ with alternatives")
        return _Pattern(sequences, from_start)

    def _sequences(self, end: str | None) -> Iterator[tuple[_Atom | _Group, ...]]:
        """Alternatives up to `end`."""
        current: list[_Atom | _Group] = []
        while self._rest and self._rest[-1] != end:
            if self._take("|"):
                yield tuple(current)
                current = []
            elif self._rest == ["$"] and end is None:
                self._rest.pop()
            else:
                current.append(self._element(in_group=end is not None))
        yield tuple(current)

    def _element(self, *, in_group: bool) -> _Atom | _Group:
        character = self._rest.pop()
        if character == "(":
            if in_group:
                raise self._refused("a group in a group")
            return self._group()
        if character == "[":
            characters: Set[str] = self._set()
        elif character == "\\":
            characters = self._escaped()
        elif character == ".":
            characters = _ANY
        elif character in "*+?{}^$)]" or character not in _ANY:
            raise self._refused(shown(character))
        else:
            characters = {character}
        return _Atom(characters, *self._quantifier())

    def _group(self) -> _Group:
        if self._take("?") and not self._take(":"):
            raise self._refused("(?")
        alternatives = tuple(tuple(a for a in s if isinstance(a, _Atom)) for s in self._sequences(end=")"))
        if not self._take(")"):
            raise self._refused("a group without an end")
        optional, repeated = self._quantifier()
        if repeated:
            raise self._refused("a repeated group")
        return _Group(alternatives, optional)

    def _set(self) -> Set[str]:
        text = ""
        while self._rest and self._rest[-1] != "]":
            text += self._rest.pop()
        if not self._take("]") or not re.fullmatch(r"(?:\w-\w|\w|[.-](?=$)|\.)+", text, re.ASCII):
            raise self._refused(f"the set [{text}]")
        ranges = re.findall(r"(\w)-(\w)|(.)", text)
        return {c for a, b, one in ranges for c in ([one] if one else map(chr, range(ord(a), ord(b) + 1)))}

    def _escaped(self) -> Set[str]:
        character = self._rest.pop() if self._rest else ""
        if character in _CLASSES:
            return _CLASSES[character]
        if not character or character in _WORD or character not in _ANY:
            raise self._refused(f"\\{character}")
        return {character}

    def _quantifier(self) -> tuple[bool, bool]:
        if not self._rest or self._rest[-1] not in _QUANTIFIERS:
            return False, False
        found = _QUANTIFIERS[self._rest.pop()]
        self._take("?")  # lazy: it matches the same paths
        return found

    def _take(self, character: str) -> bool:
        if self._rest and self._rest[-1] == character:
            self._rest.pop()
            return True
        return False

    def _refused(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._where}: the pattern {shown(self._pattern)} is not supported ({what}); name the modules by their "
            "paths, as q_proj or layers.3.self_attn.q_proj"
        )


def _is_path(pattern: str) -> bool:
    """Whether `.` in it can only match a dot of a module's path: then it matches as text."""
    parts = pattern.split(".")
    return (
        _PLAIN.fullmatch(pattern) is not None
        and all(part in _PARTS or part.isdigit() for part in parts)
        and not any(a.isdigit() and b.isdigit() for a, b in pairwise(parts))
    )


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
