"""VeRA's pair in blocks, without torch, against torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loray.adapters.files import read_header
from loray.methods.pairs import PairKey, drawn_digest, stored_digest
from loray.methods.vera_module import draw_pair, pair_digest
from tests.fixtures.draws import Normal


@pytest.mark.parametrize("key", [7, (1 << 40) + 7, (1 << 63) - 1])
def test_draws_are_those_of_torchs_generator(key: int) -> None:
    """More than a block of them, whose seed is 64 bits wide."""
    pair, generator = draw_pair(key, 128, 3000, 1000), torch.Generator().manual_seed(key)
    for mine, fan_in in ((pair.a_RI, 3000), (pair.b_OR, 128)):
        bound = (6 / fan_in) ** 0.5
        theirs = (torch.rand(mine.shape, generator=generator) - 0.5) * (2 * bound)
        torch.testing.assert_close(mine, theirs, rtol=2**-22, atol=0)
    assert drawn_digest(PairKey(key, 128, 3000, 1000)) == pair.digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_stored_pair_is_that_of_its_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two blocks of A, the last of them short; fp64 that fp32 has no number for is infinite in both."""
    draw = Normal(2)
    a_RI, b_OR = (
        t.double().mul(1e39 if dtype == torch.float64 else 1).to(dtype) for t in (draw(8, 40_000), draw(3, 8))
    )
    save_file({"x": torch.zeros(3), "A": a_RI, "B": b_OR}, tmp_path / "pair.safetensors")
    entries = read_header(tmp_path / "pair.safetensors")
    assert stored_digest(tmp_path / "pair.safetensors", entries["A"], entries["B"]) == pair_digest(a_RI, b_OR)
