"""JSON schemas in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_LENGTHS = {"minLength": "at least {} characters", "maxLength": "at most {} characters"}


def sentences(text: str) -> str:
    """A docstring as running text."""
    return " ".join(text.split())


def default_of(schema: dict[str, Any]) -> str:
    return f"`{schema['default']}`" if schema.get("default") is not None else ""


def references(schema: Any) -> Iterator[str]:
    """Names of the schemas that `schema` refers to, at any depth."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield _name(schema)
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def type_of(schema: dict[str, Any]) -> str:
    """The type and bounds of values, with links to the schemas of the same page."""
    return " or ".join(dict.fromkeys(_types(schema)))


def _name(schema: dict[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _types(schema: dict[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        yield f"[{_name(schema)}](#{_name(schema).lower()})"
    for group in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(group, ()):
            yield from _types(one)
    if "enum" in schema:
        yield ", ".join(f"`{value}`" for value in schema["enum"])
    elif "const" in schema:
        yield f"`{schema['const']}`"
    elif schema.get("type") == "array":
        yield f"list of {type_of(schema.get('items', {})) or 'anything'}"
    elif isinstance(schema.get("type"), str):
        yield schema["type"] + _limits(schema)


def _limits(schema: dict[str, Any]) -> str:
    limits = [f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
    limits += [text.format(schema[name]) for name, text in _LENGTHS.items() if name in schema]
    return f" ({', '.join(limits)})" if limits else ""
