"""Recipes from files or JSON, with the folder that their relative paths start at. Quick to import."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from loray.errors import SpecError
from loray.spec import DataSpec, TrainSpec


class Recipe(NamedTuple):
    """`path` is None for a recipe given as JSON. The relative data paths of `spec` start at `folder`."""

    spec: TrainSpec
    path: Path | None
    folder: Path

    def data(self) -> DataSpec:
        """The recipe's data with absolute paths."""
        data = self.spec.data
        paths = {"train": self._absolute(data.train), "eval": data.eval and self._absolute(data.eval)}
        return data.model_copy(update=paths)

    def _absolute(self, source: str) -> str:
        return source if "://" in source else str((self.folder / Path(source).expanduser()).resolve())


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.name for path in _recipes().glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe from a file, from the package by its name, or from a JSON object. Raises SpecError.

    Relative data paths start at the file's folder; those of a shipped recipe and of JSON at the current folder.
    """
    if name.lstrip().startswith("{"):
        return Recipe(_parse(name), None, Path.cwd())
    path = Path(name).expanduser()
    if path.is_file():
        return Recipe(TrainSpec.from_yaml(path), path.resolve(), path.resolve().parent)
    ours = _recipes() / f"{name.removesuffix('.yaml')}.yaml"
    if path.name == name and ours.is_file():
        return Recipe(TrainSpec.from_yaml(ours), ours, Path.cwd())
    raise SpecError(f"recipe {name} does not exist; give a YAML file, or one of {', '.join(shipped())}")


def _parse(text: str) -> TrainSpec:
    try:
        return TrainSpec.parse(json.loads(text), source="the recipe")
    except json.JSONDecodeError as e:
        raise SpecError(f"the recipe is not valid JSON: {e}") from e


def _recipes() -> Path:
    return Path(str(resources.files(__package__)))
