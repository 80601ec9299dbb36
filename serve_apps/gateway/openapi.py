"""Describes request bodies in the OpenAPI document. The gateway parses them itself, so FastAPI does not know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serve_apps.http import extend_openapi, schema_reference


def describe_bodies(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Gives the POST operation at each path of `bodies` its body's schema."""

    def add_bodies(document: dict[str, Any]) -> None:
        for path, body in bodies.items():
            document["paths"][path]["post"]["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": schema_reference(body.__name__)}},
            }

    extend_openapi(app, [(body, "validation") for body in bodies.values()], add_bodies)
