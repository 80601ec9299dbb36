"""Bodies of a request model, each with one string that is far too long, for every string of its schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

LONG = "a " * 450_000  # less than the largest body
Schema = dict[str, Any]


def bodies(model: type[BaseModel], **required: Any) -> Iterator[tuple[str, Schema]]:
    """The path of the string, and the body. `required` are fields that every body has unless the string is in them."""
    schema = model.model_json_schema(mode="validation")
    for path, body in _Long(schema.get("$defs", {})).values(schema, model.__name__):
        field = path.removeprefix(f"{model.__name__}.").partition(".")[0].partition("[")[0]
        yield path, body | {name: value for name, value in required.items() if name != field}


class _Long:
    def __init__(self, definitions: Schema) -> None:
        self._definitions = definitions

    def values(self, schema: Schema, path: str) -> Iterator[tuple[str, Any]]:
        """Values of `schema` with one long string, as the least that is valid otherwise."""
        schema = self._resolved(schema)
        for option in schema.get("anyOf", schema.get("oneOf", ())):
            yield from self.values(option, path)
        if schema.get("type") == "string" or not schema.keys() - {"title", "description"}:
            yield path, LONG
        elif schema.get("type") == "array":
            for at, value in self.values(schema.get("items", {}), f"{path}[]"):
                yield at, [value]
        elif schema.get("type") == "object":
            least = self._least(schema)
            for name, part in schema.get("properties", {}).items():
                for at, value in self.values(part, f"{path}.{name}"):
                    yield at, least | {name: value}
            if schema.get("additionalProperties") and "properties" not in schema:
                yield f"{path}.*", {"x": LONG}
                yield f"{path}.key", {LONG: "x"}

    def _least(self, schema: Schema) -> Any:
        schema = self._resolved(schema)
        for name in ("const", "default"):
            if name in schema:
                return schema[name]
        if "enum" in schema:
            return schema["enum"][0]
        if options := schema.get("anyOf", schema.get("oneOf")):
            return self._least(options[0])
        kind = schema.get("type")
        if kind == "object":
            properties = schema.get("properties", {})
            return {name: self._least(properties[name]) for name in schema.get("required", ())}
        if kind == "array":
            return [self._least(schema["items"])] if schema.get("minItems") else []
        return {"string": "a", "integer": 1, "number": 1.0, "boolean": False}.get(kind or "")

    def _resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self._definitions[schema["$ref"].rpartition("/")[2]]
        if len(schema.get("allOf", ())) == 1:
            return self._resolved(schema["allOf"][0])
        return schema
