"""Checks of objects against CustomResourceDefinitions, like those of a Kubernetes API server. Rules in CEL are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

Schema = dict[str, Any]
Schemas = dict[tuple[str, str], Any]

_BITS = {"int32": 31, "int64": 63}
_META = ("apiVersion", "kind", "metadata")
_KEPT = ("default", "enum", "items", "maxItems", "maxLength", "maximum", "minItems", "minLength", "minimum", "pattern")


def load_schemas(paths: Iterable[Path]) -> Schemas:
    """(apiVersion, kind) → validator, from files with one definition each."""
    schemas = {}
    for path in paths:
        definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        spec = definition["spec"]
        for version in spec["versions"]:
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            schemas[key] = _Validator(_as_json_schema(version["schema"]["openAPIV3Schema"]))
    return schemas


def check(document: dict[str, Any], schemas: Schemas) -> list[str]:
    """The errors of an object, one line each with place and reason; empty for a valid object."""
    key = (document.get("apiVersion", ""), document.get("kind", ""))
    if key not in schemas:
        return [f"no definition of {' '.join(key)}"]
    wrong = [] if (document.get("metadata") or {}).get("name") else [".metadata.name: required"]
    body = {name: _without_null(value) for name, value in document.items() if name not in _META}
    return wrong + [f"{e.json_path[1:]}: {e.message}" for e in schemas[key].iter_errors(body)]


def _without_null(value: Any) -> Any:
    """The API server drops a null field."""
    if isinstance(value, list):
        return [_without_null(part) for part in value]
    return {k: _without_null(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _as_json_schema(schema: Schema) -> Schema:
    """Fields that are not named are errors, and what has a default is not required."""
    made = {key: schema[key] for key in _KEPT if key in schema}
    fields: dict[str, Schema] = {name: _as_json_schema(part) for name, part in schema.get("properties", {}).items()}
    others = schema.get("additionalProperties")
    # A schema that says nothing about fields, such as that of metadata, allows any.
    is_open = others is True or schema.get("x-kubernetes-preserve-unknown-fields") or (not fields and others is None)
    made["properties"] = fields
    made["additionalProperties"] = _as_json_schema(others) if isinstance(others, dict) else bool(is_open)
    made["required"] = [name for name in schema.get("required", ()) if "default" not in fields.get(name, {})]
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    elif "type" in schema:
        made["type"] = schema["type"]
    if "items" in schema:
        made["items"] = _as_json_schema(schema["items"])
    if (bits := _BITS.get(schema.get("format", ""))) is not None:
        made |= {"minimum": max(schema.get("minimum", -(2**bits)), -(2**bits))}
        made |= {"maximum": min(schema.get("maximum", 2**bits - 1), 2**bits - 1)}
    return made | {key: schema[key] for key in ("x-kubernetes-list-map-keys",) if key in schema}


def _keys_once(_: Any, keys: list[str], items: Any, schema: Schema) -> Iterator[ValidationError]:
    fields, seen = schema.get("items", {}).get("properties", {}), set()
    for part in (part for part in items if isinstance(part, dict)):
        key = tuple(part.get(name, fields.get(name, {}).get("default")) for name in keys)
        if key in seen:
            yield ValidationError(f"a second {dict(zip(keys, key, strict=True))}")
        seen.add(key)


_Validator = validators.extend(Draft202012Validator, {"x-kubernetes-list-map-keys": _keys_once})
