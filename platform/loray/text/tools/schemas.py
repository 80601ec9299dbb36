"""Which kinds of JSON a schema of a parameter allows, as the forms need to know that write texts without quotes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

ANY_TYPE = frozenset({"string", "number", "boolean", "null", "array", "object"})  # an integer is a number
_MOST_REFERENCES = 16  # one after the other
_MOST_PARTS = 64  # of a schema, which may refer to itself
_KINDS: Mapping[type, str] = {
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    dict: "object",
}
_WORDS = {"True": "true", "False": "false", "None": "null"}  # as templates write them that know no JSON


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """The schema that a local `$ref` of `root` leads to; itself where it has none."""
    for _ in range(_MOST_REFERENCES):
        if not isinstance(schema, Mapping) or not str(schema.get("$ref", "")).startswith("#/"):
            return schema
        found: Any = root
        for name in schema["$ref"][2:].split("/"):
            found = found.get(name) if isinstance(found, Mapping) else None
        schema = found
    return {}


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of an object's members, by name."""
    found = resolved(schema, schema)
    properties = found.get("properties") if isinstance(found, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def types_of(schema: Any, root: Mapping[str, Any], parts_left: Iterator[int] | None = None) -> frozenset[str]:
    """The types of the values that `schema` allows, or more where it says more than this looks at."""
    parts_left = parts_left or iter(range(_MOST_PARTS))
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or next(parts_left, None) is None:
        return ANY_TYPE
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]]
        return frozenset(_KINDS[type(value)] for value in values)
    given = schema.get("type")
    names = given if isinstance(given, list) else [given]
    found = frozenset("number" if name == "integer" else name for name in names if isinstance(name, str)) or ANY_TYPE
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(parts := schema.get(key), list):
            of_parts = [types_of(part, root, parts_left) for part in parts]
            found &= ANY_TYPE.intersection(*of_parts) if key == "allOf" else frozenset[str]().union(*of_parts)
    return found


def as_json(text: str, types: frozenset[str]) -> str:
    """A value that was written without quotes, as JSON: the text itself, unless it is JSON of another type that may
    stand there. What may stand there as neither is passed on as a text.
    """
    if types != {"string"}:
        word = text.strip()
        word = _WORDS.get(word, word)
        try:
            value = json.loads(word, parse_constant=_refuse)
        except (ValueError, RecursionError):
            value = ""
        if not isinstance(value, str) and _KINDS[type(value)] in types:
            return word
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(constant)
