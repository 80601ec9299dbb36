"""Preconditions on the ETags of aliases: If-Match and If-None-Match (RFC 9110)."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from fastapi import Depends, Header

from loray.errors import RevisionConflict, SpecError

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_LIST = re.compile(rf"\s*(?:\*|{_TAG}(?:\s*,\s*{_TAG})*)\s*")
_STRONG = re.compile(r'(?<!W/)"(\d{1,18})"')
_WEAK = re.compile(r'"(\d{1,18})"')


class _Tags(NamedTuple):
    any: bool
    revisions: frozenset[int]

    def match(self, revision: int) -> bool:
        """Whether a tag matches `revision`, which is 0 for an alias that is not set."""
        return revision > 0 and (self.any or revision in self.revisions)


class Preconditions(NamedTuple):
    if_match: str | None
    if_none_match: str | None

    def expected_revision(self, current: int, alias: str) -> int | None:
        """The revision that the alias must have when it is written; None without preconditions.

        `current`: the revision now, 0 if the alias is not set. RevisionConflict if it does not satisfy the headers,
        SpecError if a header is malformed.
        """
        self.check_match(current, alias)
        if self.found_unchanged(current):
            raise RevisionConflict(f"alias {alias!r} {_describe(current)}, which If-None-Match rules out")
        return None if self.if_match is None and self.if_none_match is None else current

    def check_match(self, current: int, alias: str) -> None:
        """RevisionConflict if If-Match does not match the alias's revision."""
        if self.if_match is not None and not _parse(self.if_match, "If-Match", _STRONG).match(current):
            raise RevisionConflict(f"alias {alias!r} {_describe(current)}, which is not what If-Match asks for")

    def found_unchanged(self, revision: int) -> bool:
        """Whether a GET gets the response 304."""
        return self.if_none_match is not None and _parse(self.if_none_match, "If-None-Match", _WEAK).match(revision)


def _describe(revision: int) -> str:
    return f"has revision {revision}" if revision else "is not set"


def _parse(header: str, name: str, tag: re.Pattern[str]) -> _Tags:
    if not _LIST.fullmatch(header):
        raise SpecError(f'{name} is neither * nor a list of ETags in quotes, as in {name}: "17"')
    return _Tags(header.strip() == "*", frozenset(int(t) for t in tag.findall(header)))


def _read(
    if_match: Annotated[str | None, Header(description='Only if it has this ETag now, as in `"17"`')] = None,
    if_none_match: Annotated[
        str | None, Header(description="`*`: only if it is not set; for GET, an ETag that the client has")
    ] = None,
) -> Preconditions:
    return Preconditions(if_match, if_none_match)


Conditional = Annotated[Preconditions, Depends(_read)]
