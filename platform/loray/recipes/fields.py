"""Fields of a recipe by dotted name, from the command line and as YAML with the reasons of defaults."""

from __future__ import annotations

import difflib
import json
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from yaml.composer import ComposerError

from loray.errors import SpecError
from loray.methods import METHODS
from loray.recipes.defaults import FIRST_OBJECTIVE, alternatives, defaults_of
from loray.spec import OBJECTIVES, BaseSize, Default, Method, ObjectiveType, TrainSpec


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, f"write out what the alias *{event.anchor} stands for", event.start_mark)
        return super().compose_node(parent, index)


def parse_plain(text: str | bytes, *, source: str) -> Any:
    """Parse YAML. Raises SpecError, which begins with `source`, for what is none and for aliases: a few lines of them
    may stand for more than fits in memory.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as e:
        raise SpecError(f"{source} is not valid YAML: {e}") from e


_MAX_NEAR = 3


class RecipeField(NamedTuple):
    """`is_list`: the field takes several values."""

    path: str
    default: object
    is_list: bool


@cache
def fields_of(method: Method, objective: ObjectiveType = FIRST_OBJECTIVE) -> Mapping[str, RecipeField]:
    """List all fields of a recipe of `method` with that objective that are no sections, in their order."""
    chosen = {"adapter": METHODS[method].spec, "objective": OBJECTIVES[objective]}
    return {field.path: field for field in _walk(TrainSpec, "", chosen)}


def given(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `["optimizer.learning_rate=1e-3"]` into {"optimizer": {"learning_rate": "1e-3"}}. The recipe checks types.

    A list is `[a, b]` or `a,b`; `null` is no value. Raises SpecError for an unknown field, naming those that are near.
    """
    known = _all_fields()
    found: dict[str, Any] = {}
    for pair in pairs:
        path, separator, text = (part.strip() for part in pair.partition("="))
        if not separator:
            raise SpecError(f"{pair!r} gives a field no value; write it as optimizer.learning_rate=1e-3")
        check_known(path, known)
        merge(found, _at(path, _value(text, is_list=path in known and known[path].is_list)))
    return found


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Write `{"adapter.rank": 4}` as {"adapter": {"rank": 4}}. Raises SpecError as `given`."""
    known = _all_fields()
    found: dict[str, Any] = {}
    for path, value in fields.items():
        check_known(path, known)
        merge(found, _at(path, value))
    return found


def _all_fields() -> dict[str, RecipeField]:
    kinds = [(method, objective) for method in METHODS for objective in OBJECTIVES]
    return {path: field for kind in kinds for path, field in fields_of(*kind).items()}


def _at(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


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
    """Read the value of a field; None where a section on the way to it is None."""
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
    if text in ("null", "~", "") or (text[:1] in ("[", "{") and text[:2] != "{{"):  # which begins a grader's template
        return parse_plain(text, source=repr(text))
    return text


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
        is_list = any(get_origin(kind) in (tuple, list) for kind in _members(field.annotation))
        yield RecipeField(path, default, is_list=is_list)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, or in `Model | None`."""
    for kind in _members(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    return get_args(annotation) if origin in (Union, types.UnionType) else (annotation,)


# -- a recipe as YAML -------------------------------------------------------------------------------------------------

_WIDTH = 110


def to_yaml(spec: TrainSpec, size: BaseSize, here: Mapping[str, str] = MappingProxyType({})) -> str:
    """Write the recipe as a file from which `load_recipe` makes the same `spec`, on a base of that size.

    `here` says, by field, what a value means on this machine. A field without a value is a comment, except where it
    would have a default if it were left out.
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
        default = usual(field, defaults, size)
        is_another_given = any(value_at(spec, other) is not None for other in alternatives(path))
        is_left_out = value is None and (default is None or is_another_given)
        text = f"# {name}:" if is_left_out else f"{name}: {scalar(value)}"
        why = defaults[path].why if path in defaults else ""
        if not is_left_out and default is not None and scalar(value) != scalar(default):
            why = f"default {scalar(default)}: {why}"
        why = "; ".join(filter(None, (here.get(path), why)))
        lines += _commented(text, why, "  " * len(sections))
    return "\n".join(lines) + "\n"


def usual(field: RecipeField, defaults: Mapping[str, Default], size: BaseSize) -> object:
    """Return the value of a field that a recipe leaves out, on a base of that size; None where it has none."""
    default = defaults.get(field.path)
    value = None if default is None else default.on(size)
    return field.default if value is None else value


def scalar(value: object) -> str:
    """Write a value as YAML in one line, which is JSON but for plain words."""
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json"))
    if isinstance(value, tuple):
        return f"[{', '.join(map(scalar, value))}]"
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
