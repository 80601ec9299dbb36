"""Recipe files: where they are, and what their relative paths mean. Light enough for the command line."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import NamedTuple

from loray.errors import SpecError
from loray.spec import DataSpec, TrainSpec


class Recipe(NamedTuple):
    """`folder` is where the relative data paths of `spec` start."""

    spec: TrainSpec
    path: Path
    folder: Path

    def data(self) -> DataSpec:
        """With paths that hold from any folder."""
        data = self.spec.data
        paths = {"train": self._absolute(data.train), "eval": data.eval and self._absolute(data.eval)}
        return data.model_copy(update=paths)

    def _absolute(self, source: str) -> str:
        return source if "://" in source else str((self.folder / Path(source).expanduser()).resolve())


def shipped() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.name for path in _recipes().glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe file, or a shipped recipe by its name, whose data paths start at the current folder."""
    path = Path(name).expanduser()
    if path.is_file():
        return Recipe(TrainSpec.from_yaml(path), path.resolve(), path.resolve().parent)
    ours = _recipes() / f"{name.removesuffix('.yaml')}.yaml"
    if path.name == name and ours.is_file():
        return Recipe(TrainSpec.from_yaml(ours), ours, Path.cwd())
    raise SpecError(f"recipe {name} does not exist; give a YAML file, or one of {', '.join(shipped())}")


def _recipes() -> Path:
    return Path(str(resources.files("jobs"))) / "recipes"
