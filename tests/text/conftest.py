"""A tiny base for the tests of text."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loray.bases.registry import BaseModel


@pytest.fixture(scope="session")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()
