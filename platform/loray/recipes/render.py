"""A recipe as YAML with the reason of each value, and the same reasons as a table for the reference."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import yaml
from pydantic import BaseModel

from loray.recipes.defaults import (
    BASE_SIZES,
    FIRST_OBJECTIVE,
    METHODS,
    BaseSize,
    Default,
    alternatives,
    defaults_of,
)
from loray.recipes.fields import RecipeField, fields_of, value_at
from loray.spec import Method, ObjectiveType, TrainSpec

_WIDTH = 110
_NONE = "–"


def to_yaml(spec: TrainSpec, size: BaseSize, here: Mapping[str, str] = MappingProxyType({})) -> str:
    """The recipe as a file from which `load_recipe` makes the same `spec`, on a base of that size. `here`: by field,
    what a value means on this machine.

    A field without a value is a comment, except where it would have a default if it were left out.
    """
    kind = spec.adapter.method, spec.objective.type
    defaults = defaults_of(*kind, is_continued=spec.init_adapter is not None)
    lines: list[str] = []
    at: list[str] = []
    for path, field in fields_of(*kind).items():
        *sections, name = path.split(".")
        value = value_at(spec, path)
        if isinstance(value, BaseModel) or (sections and value_at(spec, ".".join(sections)) is None):
            continue  # a section's fields follow, or it has none
        shared = next((i for i, pair in enumerate(zip(at, sections, strict=False)) if pair[0] != pair[1]), None)
        for depth in range(min(len(at), len(sections)) if shared is None else shared, len(sections)):
            lines.append(f"{'  ' * depth}{sections[depth]}:")
        at = sections
        usual = _usual(field, defaults, size)
        is_another_given = any(value_at(spec, other) is not None for other in alternatives(path))
        is_left_out = value is None and (usual is None or is_another_given)
        text = f"# {name}:" if is_left_out else f"{name}: {_scalar(value)}"
        why = _why(path, defaults)
        if not is_left_out and usual is not None and _scalar(value) != _scalar(usual):
            why = f"default {_scalar(usual)}: {why}"
        why = "; ".join(filter(None, (here.get(path), why)))
        lines += _commented(text, why, "  " * len(sections))
    return "\n".join(lines) + "\n"


def defaults_table(objective: ObjectiveType = FIRST_OBJECTIVE) -> str:
    """Markdown: every field, its default by method, and why. The value on a large base is behind the slash. Of another
    objective than the first, the fields that differ from the first one's.
    """
    fields = {method: fields_of(method, objective) for method in METHODS}
    rows = [f"| field | {' | '.join(METHODS)} | why |", f"|---|{'---|' * (len(METHODS) + 1)}"]
    for path in dict.fromkeys(path for known in fields.values() for path in known):
        having = [method for method in METHODS if path in fields[method]]
        if objective != FIRST_OBJECTIVE and not any(_differs(path, method, objective) for method in having):
            continue
        cells = [_cell(fields[method][path], method, objective) if method in having else "" for method in METHODS]
        reasons = dict.fromkeys(_why(path, defaults_of(method, objective)) for method in having)
        rows.append(f"| `{path}` | {' | '.join(cells)} | {'; '.join(reasons)} |")
    return "\n".join(rows) + "\n"


def _differs(path: str, method: Method, objective: ObjectiveType) -> bool:
    return defaults_of(method, objective).get(path) != defaults_of(method).get(path)


def _cell(field: RecipeField, method: Method, objective: ObjectiveType) -> str:
    defaults = defaults_of(method, objective)
    small, large = (_scalar(_usual(field, defaults, size)) for size in BASE_SIZES)
    return (small if small == large else f"{small} / {large}").replace("null", _NONE)


def _usual(field: RecipeField, defaults: dict[str, Default], size: BaseSize) -> object:
    default = defaults.get(field.path)
    value = None if default is None else default.on(size)
    return field.default if value is None else value


def _why(path: str, defaults: dict[str, Default]) -> str:
    default = defaults.get(path)
    return "" if default is None else default.why


def _scalar(value: object) -> str:
    """As YAML in one line, which is JSON but for plain words."""
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json"))
    if isinstance(value, tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, str) and value.replace("_", "").isalnum() and yaml.safe_load(value) == value:
        return value
    return json.dumps(value)


def _commented(text: str, why: str, indent: str) -> Iterator[str]:
    line = f"{indent}{text}"
    if not why:
        yield line
    elif len(line) + len(why) + 4 <= _WIDTH:
        yield f"{line}  # {why}" if not text.startswith("#") else f"{line}  ({why})"
    else:
        yield from (f"{indent}# {part}" for part in textwrap.wrap(why, _WIDTH - len(indent) - 2))
        yield line
