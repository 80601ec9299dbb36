"""Loads in the loader's threads: from a place where an adapter is stored, from memory, and what fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loray.engine.pool.loader import AdapterLoads
from loray.engine.pool.packed import PackedAdapter, Packer
from loray.errors import IntegrityError
from loray.methods.weights import AdapterWeights
from loray.spec import AdapterBytes, AdapterRef
from tests.fixtures.packing import packer, weights
from tests.fixtures.scheduling import adapter

REF = adapter("a", nbytes=1 << 20)


@dataclass
class Stored:
    own: AdapterWeights

    def pack(self, packer: Packer) -> PackedAdapter:
        return packer.pack(self.own)


class Loads:
    """`give`: what a load gets, or the error that it raises."""

    def __init__(self) -> None:
        own, self.give = packer(), Any
        pool: Any = SimpleNamespace(
            tensor=SimpleNamespace(device=torch.device("cpu"), nbytes=0),
            geometry=own.geometry,
            block_bytes=1 << 10,
            num_blocks_for=lambda packed: 3,
        )
        self.loads = AdapterLoads(pool, own, self.load)

    def load(self, ref: AdapterRef) -> Any:
        if isinstance(self.give, Exception):
            raise self.give
        return self.give


@pytest.fixture
def made() -> Iterator[Loads]:
    made = Loads()
    yield made
    made.loads.close()


@pytest.mark.parametrize("is_stored", [True, False])
def test_an_adapter_comes_complete_from_where_it_is_stored_or_from_memory(made: Loads, is_stored: bool) -> None:
    own = weights(dict.fromkeys(range(4), 2))
    made.give = Stored(own) if is_stored else own
    assert (made.loads.num_blocks(REF.digest), made.loads.expected_blocks(REF)) == (None, 20)  # half of the pool
    packed = made.loads.start(REF).result(60)
    assert all(map(torch.equal, packed.layered, packer().pack(own).layered))
    assert (made.loads.num_blocks(REF.digest), made.loads.expected_blocks(REF)) == (3, 3)
    assert made.loads.nbytes(REF.digest) == AdapterBytes(packed.nbytes)
    made.loads.forget(REF.digest)
    assert made.loads.nbytes(REF.digest) is None


def test_what_a_load_raises_is_its_result(made: Loads) -> None:
    made.give = IntegrityError("damaged")
    assert made.loads.start(REF).exception(60) is made.give
    assert made.loads.num_blocks(REF.digest) is None
