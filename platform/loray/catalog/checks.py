"""Names that callers give: the rule that a malformed one breaks, and names that are like an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loray.errors import AdapterNotFound, SpecError, shown
from loray.spec import Alias, JobId, Name, QualifiedName, TagKey, TagValue, TenantName

NUM_COMPARED = 32
_LONGEST_COMPARED = 192  # characters; a name has at most 96


def check_name(name: str, what: str = "adapter name") -> None:
    _check(Name, name, what, "letters, digits, '.', '_' and '-', at most 96")


def check_qualified(name: str) -> None:
    _check(QualifiedName, name, "adapter name", "tenant/name, of letters, digits, '.', '_' and '-', at most 96")


def check_tenant(name: str) -> None:
    _check(TenantName, name, "tenant's name", "letters, digits, '.', '_' and '-', at most 32")


def check_alias(alias: str) -> None:
    _check(Alias, alias, "alias", "a letter, then letters, digits, '_', '-'")


def check_job_id(job_id: str) -> None:
    _check(JobId, job_id, "job id", "letters, digits, '.', '_' and '-', at most 128")


def check_tag(key: str, value: str) -> None:
    _check(TagKey, key, "tag's key", "letters, digits, '.', '_', '-' and ':', at most 96")
    _check(TagValue, value, "tag's value", "at most 5000 characters, without control characters")


def parse_tags(given: Sequence[str]) -> dict[str, str | None]:
    """`KEY=VALUE` → the value; `KEY` → None, which is any value. Raises SpecError."""
    tags = {key: value if equals else None for key, equals, value in (tag.partition("=") for tag in given)}
    if "" in tags:
        raise SpecError("a tag is KEY or KEY=VALUE, and its key is not empty")
    return tags


def unknown_adapter(name: str, near: Mapping[str, Collection[str]], bases: Collection[str]) -> AdapterNotFound:
    """The error about a name that is none of an adapter for the caller.

    `near`: catalog's name that the caller may mean → names that exist for the caller, beside it in the order of all
    names. Their beginnings are alike; NUM_COMPARED are compared in half a millisecond, which servers spend for each
    unknown name.
    """
    if name in bases:
        return AdapterNotFound(f"{name!r} is a base model, not an adapter")
    found = list(dict.fromkeys(alike for meant, beside in near.items() for alike in similar(meant, beside)))[:3]
    hint = f"; did you mean {' or '.join(repr(n) for n in found)}?" if found else "; `loray adapters ls` lists them"
    return AdapterNotFound(f"no adapter {shown(name)}{hint}")


def similar(name: str, names: Collection[str]) -> list[str]:
    """At most three of `names` that resemble `name`, the nearest first."""
    if len(name) > _LONGEST_COMPARED:
        return []
    return difflib.get_close_matches(name, names, n=3, cutoff=0.6)


def _check(kind: Any, value: str, what: str, rule: str) -> None:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        raise SpecError(f"{shown(value)} is not a valid {what}: {rule}") from e
