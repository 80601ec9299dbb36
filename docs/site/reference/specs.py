"""Recipes and serve specs, from their specifications."""

from __future__ import annotations

from typing import Any

from docs.site.markdown import table
from docs.site.reference.schemas import default_of, sentences, type_of
from loray.methods import METHODS
from loray.recipes.defaults import BASE_SIZES, FIRST_OBJECTIVE, defaults_of
from loray.recipes.fields import RecipeField, fields_of, scalar, usual
from loray.recipes.load import purpose, shipped
from loray.spec import OBJECTIVES, Method, ObjectiveType, ServeSpec, TrainSpec


def recipes_page() -> str:
    """The defaults of each method with their reasons, the fields by section, and the shipped recipes."""
    schema = TrainSpec.model_json_schema()
    parts = [
        "# Recipes\n",
        "Fields of a recipe, as YAML or JSON. [Methods, recipes and plans](../guide/methods.md#recipes) explains how "
        "they are given, [training](../guide/training.md) what they do.\n",
    ]
    for objective in OBJECTIVES:
        parts += [f"## Defaults with `objective.type: {objective}`\n", _defaults(objective)]
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


def _defaults(objective: ObjectiveType) -> str:
    """A table of every field, its default by method, and why. A large base's value is behind the slash.

    Of another objective than the first it has the fields that differ from the first one's.
    """
    fields = {method: fields_of(method, objective) for method in METHODS}
    defaults = {method: defaults_of(method, objective) for method in METHODS}
    rows = []
    for path in dict.fromkeys(path for known in fields.values() for path in known):
        having = [method for method in METHODS if path in fields[method]]
        if objective != FIRST_OBJECTIVE and all(
            defaults[method].get(path) == defaults_of(method).get(path) for method in having
        ):
            continue
        cells = [_default(fields[method][path], method, objective) if method in having else "" for method in METHODS]
        reasons = dict.fromkeys(defaults[method][path].why if path in defaults[method] else "" for method in having)
        rows.append((f"`{path}`", *cells, "; ".join(reasons)))
    return table(("field", *METHODS, "why"), rows)


def _default(field: RecipeField, method: Method, objective: ObjectiveType) -> str:
    small, large = (scalar(usual(field, defaults_of(method, objective), size)) for size in BASE_SIZES)
    return (small if small == large else f"{small} / {large}").replace("null", "–")


def _fields(schema: dict[str, Any]) -> str:
    rows = [
        (f"`{name}`", type_of(field), default_of(field), sentences(field.get("description", "")))
        for name, field in schema["properties"].items()
    ]
    return table(("field", "type", "default", "meaning"), rows)
