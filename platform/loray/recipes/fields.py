"""Fields of a recipe by their dotted names: which there are, values given as text, and names that are near."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from loray.errors import SpecError
from loray.recipes.defaults import FIRST_OBJECTIVE, METHODS, OBJECTIVES
from loray.recipes.plain_yaml import parse_plain
from loray.spec import (
    DoraSpec,
    DpoSpec,
    LongLoraSpec,
    LoraSpec,
    Method,
    ObjectiveType,
    SftSpec,
    TrainSpec,
    VeraSpec,
)

_ADAPTERS: Mapping[Method, type[BaseModel]] = {
    "lora": LoraSpec,
    "dora": DoraSpec,
    "vera": VeraSpec,
    "longlora": LongLoraSpec,
}
_OBJECTIVES: Mapping[ObjectiveType, type[BaseModel]] = {"sft": SftSpec, "dpo": DpoSpec}
_MAX_NEAR = 3


class RecipeField(NamedTuple):
    """`is_list`: the field takes several values."""

    path: str
    default: object
    is_list: bool


def fields_of(method: Method, objective: ObjectiveType = FIRST_OBJECTIVE) -> dict[str, RecipeField]:
    """All fields of a recipe of `method` with that objective that are no sections, in their order."""
    chosen = {"adapter": _ADAPTERS[method], "objective": _OBJECTIVES[objective]}
    return {field.path: field for field in _walk(TrainSpec, "", chosen)}


def given(pairs: Sequence[str]) -> dict[str, Any]:
    """`["optimizer.learning_rate=1e-3"]` → {"optimizer": {"learning_rate": "1e-3"}}. Types are the recipe's to check.

    A list is `[a, b]` or `a,b`; `null` is no value. Raises SpecError for an unknown field, naming those that are near.
    """
    kinds = [(method, objective) for method in METHODS for objective in OBJECTIVES]
    known = {path: field for kind in kinds for path, field in fields_of(*kind).items()}
    nested: dict[str, Any] = {}
    for pair in pairs:
        path, separator, text = (part.strip() for part in pair.partition("="))
        if not separator:
            raise SpecError(f"{pair!r} gives a field no value; write it as optimizer.learning_rate=1e-3")
        check_known(path, known)
        merge(nested, _nested(path, _value(text, is_list=path in known and known[path].is_list)))
    return nested


def check_known(path: str, known: Mapping[str, object]) -> None:
    """Raise SpecError unless `path` is a field of a recipe, or a section that is given whole."""
    if path in known or any(name.startswith(f"{path}.") for name in known):
        return
    raise SpecError(f"a recipe has no field {path!r}; {_suggestion(path, list(known))}")


def merge(fields: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Put `over` on top of `fields`, section by section. Returns `fields`."""
    for name, value in over.items():
        below = fields.get(name)
        if isinstance(value, Mapping) and isinstance(below, dict):
            merge(below, value)
        else:
            fields[name] = merge({}, value) if isinstance(value, Mapping) else value
    return fields


def value_at(spec: BaseModel, path: str) -> object:
    """The value of a field; None where a section on the way to it is None."""
    at: object = spec
    for name in path.split("."):
        at = None if at is None else getattr(at, name)
    return at


def _suggestion(path: str, known: list[str]) -> str:
    by_name: dict[str, list[str]] = {}
    for name in known:
        by_name.setdefault(name.rpartition(".")[2], []).append(name)
    alike = difflib.get_close_matches(path.rpartition(".")[2], list(by_name), _MAX_NEAR, 0.7)
    near = [name for last in alike for name in by_name[last]] or difflib.get_close_matches(path, known, _MAX_NEAR, 0.7)
    if near:
        return f"did you mean {' or '.join(near[:_MAX_NEAR])}?"
    return "`loray recipes show` has them all"


def _value(text: str, *, is_list: bool) -> Any:
    """Numbers and words stay text, which the recipe's types read; lists, mappings and null are YAML."""
    if is_list and not text.startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    if text[:1] in ("[", "{") or text in ("null", "~", ""):
        return parse_plain(text, source=repr(text))
    return text


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def _walk(model: type[BaseModel], prefix: str, chosen: Mapping[str, type[BaseModel]]) -> Iterator[RecipeField]:
    """`chosen`: the section of each field that may be one of several."""
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] != "method"):  # an adapter's first
        path = f"{prefix}{name}"
        section = chosen.get(path) or _section(field.annotation)
        if section is not None and field.default is None:  # an optional section: as a whole, and by its fields
            yield RecipeField(path, None, is_list=False)
        if section is not None:
            yield from _walk(section, f"{path}.", chosen)
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        yield RecipeField(path, default, is_list=_is_list(field.annotation))


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, or in `Model | None`."""
    for kind in _members(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _is_list(annotation: Any) -> bool:
    return any(get_origin(kind) in (tuple, list) for kind in _members(annotation))


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    return get_args(annotation) if origin in (Union, types.UnionType) else (annotation,)
