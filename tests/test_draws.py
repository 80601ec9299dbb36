"""What tests draw by `tests.fixtures.draws`, and by torch where its numbers are equal on every machine too."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from tests.fixtures.draws import Normal


def sha256(t: Tensor) -> str:
    return hashlib.sha256(t.numpy().data).hexdigest()[:16]


def test_numbers_are_equal_on_every_machine() -> None:
    draw = Normal(3)
    assert [sha256(draw(*shape)) for shape in ((), (7,), (40, 50))] == [
        "cb38661f086fb8fe",
        "28d5960c544d3dae",
        "b72b97e853e47dbc",
    ]
    generator = torch.Generator().manual_seed(3)
    whole, order = torch.randint(0, 256, (999,), generator=generator), torch.randperm(999, generator=generator)
    uniform = torch.rand(999, generator=generator)
    assert [sha256(t) for t in (whole, order, uniform)] == ["36b33c076787e8af", "f5ae5bc3f33fc799", "50bfdf006df146c3"]
