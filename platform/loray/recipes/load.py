"""Recipes from files, JSON and the command line, with the folder that their relative paths start at."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from loray.bases.config import ModelConfig
from loray.errors import DataError, SpecError
from loray.recipes.defaults import complete, cut_to_fit, named_method, size_of
from loray.recipes.fields import merge
from loray.recipes.sources import fixed_part
from loray.spec import BaseSize, DataSpec, Name, TrainSpec, read_mapping

ShapeOf = Callable[[str], ModelConfig | None]  # of a base by its name; None where it is not known
STDIN = "-"  # the name of a recipe that is a JSON object on standard input
ADAPTERS = "adapters"  # of a recipe's file: what `recipes/many.py` reads
_SOURCES = ("train", "eval")
_NAME: TypeAdapter[str] = TypeAdapter(Name)


class Recipe(NamedTuple):
    """`path` is None for a recipe that is no file, or not that file alone. The relative data paths of `spec` start at
    `folder`.
    """

    spec: TrainSpec
    path: Path | None
    folder: Path

    def data(self) -> DataSpec:
        """Give the recipe's data absolute paths. Raises DataError for what is no path."""
        return self.spec.data.with_paths(self._absolute)

    def _absolute(self, source: str) -> str:
        if "://" in source:
            return source
        try:
            return str((self.folder / Path(source).expanduser()).resolve())
        except (ValueError, RuntimeError) as e:  # a null character, or the home of a user who is not here
            raise DataError(f"data file {source!r} is no path: {e}") from e


def shipped() -> list[str]:
    """List the names of the recipes in the package."""
    return sorted(path.name for path in _recipes().glob("*.yaml"))


def purpose(name: str) -> str:
    """Read the sentences at the beginning of a shipped recipe, which say its purpose."""
    words = []
    for line in (_recipes() / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        if not line.startswith("#  "):  # not a command
            words.append(line[2:])
    return " ".join(words)


def load_recipe(
    name: str | None = None,
    *,
    over: Mapping[str, Any] | None = None,
    shape_of: ShapeOf = lambda base: None,
    is_example: bool = False,
) -> Recipe:
    """Load a recipe from a file, from the package by its name, or from a JSON object (STDIN: that on standard input),
    with `over` on top of it; from `over` alone where `name` is None. Fields that are left out have their defaults,
    which may depend on the size of the base. Raises SpecError.

    Relative data paths of a file start at its folder; those of a shipped recipe, of JSON and of `over` at the current
    folder. An example may lack name and data.
    """
    fields, path, folder = read_recipe(name, over or {})
    if ADAPTERS in fields:
        raise SpecError(f"{path or 'the recipe'} lists several adapters, which `loray train` and `loray plan` take")
    return complete_recipe(fields, path, folder, over=over, shape_of=shape_of, is_example=is_example, is_alone=not name)


def read_recipe(name: str | None, over: Mapping[str, Any]) -> tuple[dict[str, Any], Path | None, Path]:
    """Read (fields, file, folder of relative paths) of what `load_recipe` takes, without defaults."""
    return ({}, None, _folder_of_data(over)) if name is None else _read(name)


def complete_recipe(
    fields: dict[str, Any],
    path: Path | None,
    folder: Path,
    *,
    over: Mapping[str, Any] | None = None,
    shape_of: ShapeOf = lambda base: None,
    is_example: bool = False,
    is_alone: bool = False,
) -> Recipe:
    """Put `over` on top of what was read, and fill in defaults. `is_alone`: nothing was read. Raises SpecError."""
    is_cut_to_fit = False
    if over and over.get("batch") == "auto" and isinstance(fields.get("batch"), dict):
        is_cut_to_fit = True  # the rows of a step stay those that the file says
        over = {field: value for field, value in over.items() if field != "batch"}
        path = None
    if over:
        merge(fields, _moved(over, folder, is_alone=is_alone))
        path = None
    if is_example:
        fields = merge(
            {"name": f"my-{named_method(fields) or 'adapter'}", "data": {"train": "data/train.jsonl"}}, fields
        )
    elif is_alone:
        _check_named(fields)
    size = size_of_base(fields.get("base", TrainSpec.model_fields["base"].default), shape_of)
    completed = complete(fields, size)
    if is_cut_to_fit:
        completed["batch"] = cut_to_fit(completed["batch"])
    return Recipe(TrainSpec.parse(completed, source=str(path or "the recipe")), path, folder)


def size_of_base(base: object, shape_of: ShapeOf) -> BaseSize:
    """Find the size of a base. `base` may be anything that a recipe has in that place; only names are looked for."""
    try:
        return size_of(shape_of(_NAME.validate_python(base)))
    except ValidationError:
        return size_of(None)


def _read(name: str) -> tuple[dict[str, Any], Path | None, Path]:
    """(fields, file, folder of relative paths)."""
    if name == STDIN:
        name = sys.stdin.read()
        if not name.lstrip().startswith("{"):
            raise SpecError("the recipe on standard input is no JSON object")
    if name.lstrip().startswith("{"):
        try:
            fields = json.loads(name)
        except json.JSONDecodeError as e:
            raise SpecError(f"the recipe is not valid JSON: {e}") from e
        return fields, None, Path.cwd()
    path = Path(name).expanduser()
    if path.is_file():
        return read_mapping(path), path.resolve(), path.resolve().parent
    ours = _recipes() / f"{name.removesuffix('.yaml')}.yaml"
    if path.name == name and ours.is_file():
        return read_mapping(ours), ours, Path.cwd()
    raise SpecError(f"recipe {name} does not exist; give a YAML file, or one of {', '.join(shipped())}")


def _moved(over: Mapping[str, Any], folder: Path, *, is_alone: bool) -> dict[str, Any]:
    """`over` with its data paths, which start at the current folder, as paths from `folder`; absolute ones only where
    `folder` is that of these files.
    """

    def moved(source: str) -> str:
        is_kept = "://" in source or (Path(source).expanduser().is_absolute() and not is_alone)
        return source if is_kept else os.path.relpath(Path(source).expanduser().absolute(), folder)

    fields = merge({}, over)
    for name, sources in _data_of(over).items():
        fields["data"][name] = _with_paths(sources, moved)
    return fields


def _folder_of_data(over: Mapping[str, Any]) -> Path:
    """The folder in which all local data is; without any, the current one."""
    folders: list[Path] = []

    def found(source: str) -> str:
        if "://" not in source:
            folders.append(Path(fixed_part(source)).expanduser().absolute().parent)
        return source

    for sources in _data_of(over).values():
        _with_paths(sources, found)
    return Path(os.path.commonpath(folders)) if folders else Path.cwd()


def _data_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sources of data that are given, by field."""
    data = fields.get("data")
    return {name: data[name] for name in _SOURCES if name in data} if isinstance(data, Mapping) else {}


def _with_paths(sources: Any, change: Callable[[str], str]) -> Any:
    """`sources`, which no parser has seen, with every path changed."""
    if isinstance(sources, str):
        return change(sources)
    if isinstance(sources, Mapping):
        return {
            name: change(value) if name == "path" and isinstance(value, str) else value
            for name, value in sources.items()
        }
    return [_with_paths(source, change) for source in sources] if isinstance(sources, list | tuple) else sources


def _check_named(fields: Mapping[str, Any]) -> None:
    """Raise SpecError where a recipe without a file has no name or no data: what it cannot do without."""
    data = fields.get("data")
    has_data = isinstance(data, Mapping) and data.get("train") is not None
    missing = [*([] if fields.get("name") else ["--name NAME"]), *([] if has_data else ["--data FILE"])]
    if missing:
        raise SpecError(f"without a recipe, {' and '.join(missing)} is needed; `loray recipes ls` has recipes")


def _recipes() -> Path:
    return Path(str(resources.files(__package__)))
