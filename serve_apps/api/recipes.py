"""Reads a recipe from a request's body, as JSON or YAML, and reports one error per wrong field."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Depends, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from loray.bases.presets import shapes_in
from loray.errors import SpecError
from loray.recipes.defaults import complete
from loray.recipes.load import size_of_base
from loray.recipes.plain_yaml import parse_plain
from loray.settings import Settings
from loray.spec import TrainSpec
from loray.spec.fields import mistakes
from serve_apps.api.problems import InvalidFields, fields_of
from serve_apps.bodies import parse_json, read

JSON = ("application/json",)
YAML = ("application/yaml", "application/x-yaml", "text/yaml")


async def _read(request: Request) -> TrainSpec:
    media_type = request.headers.get("content-type", JSON[0]).partition(";")[0].strip().lower()
    if media_type not in JSON + YAML:
        raise HTTPException(415, f"a recipe is {JSON[0]} or {YAML[0]}, not {media_type or 'without a type'}")
    return await read(request, partial(_parse, is_yaml=media_type in YAML))


def _parse(raw: bytes, *, is_yaml: bool) -> TrainSpec:
    try:
        data = parse_plain(raw, source="the recipe") if is_yaml else parse_json(raw)
    except SpecError as e:
        raise InvalidFields(str(e), ()) from e
    except (ValueError, RecursionError) as e:
        raise InvalidFields(f"the recipe is not valid JSON: {e}", ()) from e
    try:
        return TrainSpec.model_validate(_completed(data))
    except ValidationError as e:
        raise InvalidFields("the recipe is not valid", fields_of(mistakes(e))) from e


def _completed(data: object) -> object:
    if not isinstance(data, dict):
        return data
    base = data.get("base", TrainSpec.model_fields["base"].default)
    return complete(data, size_of_base(base, shapes_in(Settings.from_env().home)))


RecipeBody = Annotated[TrainSpec, Depends(_read)]
