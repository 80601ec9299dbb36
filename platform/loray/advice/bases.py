"""The shape of a base that somebody asks about: it need not be on this machine."""

from __future__ import annotations

from pathlib import Path

from loray.bases.config import ModelConfig
from loray.bases.registry import get_base
from loray.errors import BaseNotFound
from loray.planning.shapes import preset, preset_names


def known_shape(base: str, home: Path) -> ModelConfig:
    """Of the base on this machine, else of the well-known one by that name. BaseNotFound."""
    try:
        return get_base(home, base).config
    except BaseNotFound as e:
        if (known := preset(base)) is not None:
            return known
        raise BaseNotFound(
            f"no base model {base!r} on this machine, and its shape is not among those known "
            f"({', '.join(preset_names())}): give its configuration with --config, or add it with `loray base add`"
        ) from e
