"""The ranks that tests of sequence parallelism share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.train.sequence.ranks import Ranks


@pytest.fixture(scope="package")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()
