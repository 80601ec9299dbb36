"""Recipes and serve specs, from their specifications."""

from __future__ import annotations

from typing import Any

from docs.site.markdown import table
from docs.site.reference.schemas import default_of, sentences, type_of
from loray.recipes.fields import defaults_table
from loray.recipes.load import purpose, shipped
from loray.spec import OBJECTIVES, ServeSpec, TrainSpec


def recipes_page() -> str:
    """The defaults of each method with their reasons, the fields by section, and the shipped recipes."""
    schema = TrainSpec.model_json_schema()
    parts = [
        "# Recipes\n",
        "Fields of a recipe, as YAML or JSON. [Methods, recipes and plans](../guide/methods.md#recipes) explains how "
        "they are given, [training](../guide/training.md) what they do.\n",
    ]
    for objective in OBJECTIVES:
        parts += [f"## Defaults with `objective.type: {objective}`\n", defaults_table(objective)]
    parts += ["## Fields\n", _fields(schema)]
    parts += [
        f"### {name}\n\n{sentences(section.get('description', ''))}\n\n{_fields(section)}"
        for name, section in schema["$defs"].items()
        if section.get("properties")
    ]
    rows = [(f"`{file.removesuffix('.yaml')}`", purpose(file)) for file in shipped()]
    return "\n".join([*parts, "## Shipped recipes\n", table(("recipe", "for"), rows)])


def serve_page() -> str:
    """Fields of a serve spec."""
    schema = ServeSpec.model_json_schema()
    parts = [
        "# Serve spec\n",
        "What `loray serve --spec` and `loray up --spec` read, as YAML. `loray up` also reads [several of them]"
        "(../howto/several-bases.md).\n",
        _fields(schema),
    ]
    for name, section in schema["$defs"].items():
        parts += [f"## {name}\n\n{sentences(section.get('description', ''))}\n", _fields(section)]
    return "\n".join(parts)


def _fields(schema: dict[str, Any]) -> str:
    rows = [
        (f"`{name}`", type_of(field), default_of(field), sentences(field.get("description", "")))
        for name, field in schema["properties"].items()
    ]
    return table(("field", "type", "default", "meaning"), rows)
