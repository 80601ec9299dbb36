"""Names that callers give: each malformed one is refused with the rule that it breaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loray.errors import SpecError, shown
from loray.spec import Alias, JobId, Name, QualifiedName, TagKey, TagValue, TenantName


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


def _check(kind: Any, value: str, what: str, rule: str) -> None:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        raise SpecError(f"{shown(value)} is not a valid {what}: {rule}") from e
