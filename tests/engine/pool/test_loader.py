"""Loads in the loader's threads, and how large they say that an adapter is."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loray.engine.pool.loader import AdapterLoads
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.errors import IntegrityError
from loray.spec import AdapterBytes, AdapterRef
from tests.fixtures.packing import packer, weights
from tests.fixtures.scheduling import adapter

REF = adapter("a", nbytes=1 << 20)


class Loads:
    """`error`: what a load raises."""

    def __init__(self) -> None:
        own, self.own = packer(), weights(dict.fromkeys(range(4), 2))
        self.error: Exception | None = None
        pool: Any = SimpleNamespace(
            tensor=SimpleNamespace(device=torch.device("cpu"), nbytes=0),
            geometry=own.geometry,
            block_bytes=1 << 10,
            num_blocks_for=lambda packed: 3,
        )
        self.loads = AdapterLoads(pool, own, self.load)

    def load(self, ref: AdapterRef, packer: Packer) -> PackedAdapter:
        if self.error is not None:
            raise self.error
        return packer.pack(self.own)


@pytest.fixture
def made() -> Iterator[Loads]:
    made = Loads()
    yield made
    made.loads.close()


def test_what_has_been_loaded_is_known_by_its_size(made: Loads) -> None:
    assert (made.loads.num_blocks(REF.digest), made.loads.expected_blocks(REF)) == (None, 20)  # half of the pool
    packed = made.loads.start(REF).result(60)
    assert all(map(torch.equal, packed.layered, packer().pack(made.own).layered))
    assert (made.loads.num_blocks(REF.digest), made.loads.expected_blocks(REF)) == (3, 3)
    assert made.loads.nbytes(REF.digest) == AdapterBytes(packed.nbytes)
    made.loads.forget(REF.digest)
    assert made.loads.nbytes(REF.digest) is None


def test_what_a_load_raises_is_its_result(made: Loads) -> None:
    made.error = IntegrityError("damaged")
    assert made.loads.start(REF).exception(60) is made.error
    assert made.loads.num_blocks(REF.digest) is None
