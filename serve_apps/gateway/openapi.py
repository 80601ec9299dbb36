"""The request bodies in the OpenAPI document: the gateway parses them itself, so FastAPI does not know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REFERENCE = "#/components/schemas/{model}"


def describe_bodies(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Give the POST operation at each path of `bodies` its body's schema, at /openapi.json and /docs."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _, definitions = models_json_schema([(b, "validation") for b in bodies.values()], ref_template=_REFERENCE)
            document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            for path, body in bodies.items():
                schema = {"$ref": _REFERENCE.format(model=body.__name__)}
                document["paths"][path]["post"]["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                }
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]
