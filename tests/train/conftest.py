"""The base that tests of training share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loray.bases.registry import BaseModel


@pytest.fixture(scope="session")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    """Of larger weights than a fresh model has, so that an adapter changes something at once."""
    return tiny_base(std=0.05)
