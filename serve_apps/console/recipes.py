"""A recipe as its pages show it."""

from __future__ import annotations

from pathlib import Path

from loray.bases.presets import shapes_in
from loray.recipes.load import size_of_base
from loray.recipes.render import to_yaml
from loray.spec import TrainSpec


def recipe_text(spec: TrainSpec, home: Path) -> str:
    """YAML with the reason of each value, from which the same recipe is made again. `home` has this node's bases."""
    return to_yaml(spec, size_of_base(spec.base, shapes_in(home)))
