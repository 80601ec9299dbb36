"""A tiny random base and a store of adapters for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving.adapters import Library, open_library
from benchmarks.serving.models import bench_base
from loray.bases.registry import BaseModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return bench_base("tiny-random", folder)


@pytest.fixture(scope="module")
def library(folder: Path, base: BaseModel) -> Iterator[Library]:
    with open_library("file", folder, base) as library:
        yield library
