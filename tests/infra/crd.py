"""Checks of objects against CustomResourceDefinitions, like those of a Kubernetes API server.

Covered are types, required and unknown fields, enums, bounds, patterns, integer-or-string, keys of list maps.
Rules in CEL are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]
Schemas = dict[tuple[str, str], Schema]

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}
_BITS = {"int32": 31, "int64": 63}
_META = ("apiVersion", "kind", "metadata")


def load_schemas(paths: Iterable[Path]) -> Schemas:
    """(apiVersion, kind) → schema, from files with one definition each."""
    schemas = {}
    for path in paths:
        definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        spec = definition["spec"]
        for version in spec["versions"]:
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            schemas[key] = version["schema"]["openAPIV3Schema"]
    return schemas


def check(document: dict[str, Any], schemas: Schemas) -> list[str]:
    """The errors of an object, one line each with place and reason; empty for a valid object."""
    key = (document.get("apiVersion", ""), document.get("kind", ""))
    if key not in schemas:
        return [f"no definition of {' '.join(key)}"]
    wrong = [] if (document.get("metadata") or {}).get("name") else [".metadata.name: required"]
    body = {name: value for name, value in document.items() if name not in _META}
    return wrong + list(_check(body, schemas[key], ""))


def _check(value: Any, schema: Schema, at: str) -> Iterator[str]:
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{at}: {value!r} is neither an integer nor a string"
        elif isinstance(value, str):
            yield from _check_text(value, schema, at)
        return
    kind = schema.get("type")
    if kind is not None and not _is(value, kind):
        yield f"{at}: {value!r} is not of type {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is not one of {schema['enum']}"
    if isinstance(value, str):
        yield from _check_text(value, schema, at)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _check_number(value, schema, at)
    elif isinstance(value, dict):
        yield from _check_object(value, schema, at)
    elif isinstance(value, list):
        yield from _check_array(value, schema, at)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])


def _check_text(value: str, schema: Schema, at: str) -> Iterator[str]:
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at}: {value!r} does not match {schema['pattern']}"
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"{at}: {value!r} is {len(value)} characters long"


def _check_number(value: float, schema: Schema, at: str) -> Iterator[str]:
    if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{at}: {value} is out of range"
    bits = _BITS.get(schema.get("format", ""))
    if bits is not None and not -(2**bits) <= value < 2**bits:
        yield f"{at}: {value} does not fit into {schema['format']}"


def _check_object(value: dict[str, Any], schema: Schema, at: str) -> Iterator[str]:
    fields: dict[str, Schema] = schema.get("properties", {})
    others = schema.get("additionalProperties")
    # A schema that says nothing about fields, such as that of metadata, allows any.
    is_open = others is True or schema.get("x-kubernetes-preserve-unknown-fields") or (not fields and others is None)
    for name in schema.get("required", ()):
        if value.get(name) is None and "default" not in fields.get(name, {}):
            yield f"{at}.{name}: required"
    for name, part in value.items():
        if part is None:  # the API server drops a null field
            continue
        if name in fields:
            yield from _check(part, fields[name], f"{at}.{name}")
        elif isinstance(others, dict):
            yield from _check(part, others, f"{at}.{name}")
        elif not is_open:
            yield f"{at}.{name}: unknown field"


def _check_array(value: list[Any], schema: Schema, at: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{at}: {len(value)} items"
    items: Schema = schema.get("items", {})
    for i, part in enumerate(value):
        yield from _check(part, items, f"{at}[{i}]")
    keys = schema.get("x-kubernetes-list-map-keys")
    if keys:
        seen = set()
        for i, part in enumerate(p for p in value if isinstance(p, dict)):
            key = tuple(part.get(k, items.get("properties", {}).get(k, {}).get("default")) for k in keys)
            if key in seen:
                yield f"{at}[{i}]: a second {dict(zip(keys, key, strict=True))}"
            seen.add(key)
