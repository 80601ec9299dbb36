"""What Triton makes of LoRA's kernels for a card: which loads it has put into them.

Collected by name only, in a process that does not interpret; see test_triton.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kernels.compile import triton_kernels
from loray_kernels.cuda.tables import TILE_TOKENS


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    return {name: made for name, made in triton_kernels("sm_90", ["bf16"]) if name.startswith("lora_")}


def test_rows_at_odd_offsets_are_read_by_elements(kernels: dict[str, Any]) -> None:
    """Beside the loop that reads 16 bytes at once there is one that does not: a card refuses such a read elsewhere."""
    for name, made in kernels.items():
        assert "ld.global.b16" in made.asm["ptx"], name


def test_loads_of_the_shrink_are_ahead_of_its_sums(kernels: dict[str, Any]) -> None:
    """Four turns of 64 columns have room in shared memory, and go there 16 bytes at once."""
    for rows in (16, 32, 64):
        made = kernels[f"lora_shrink[bf16, BLOCK_T={TILE_TOKENS}, BLOCK_R={rows}, BLOCK_K=64]"]
        assert made.metadata.shared == 4 * (TILE_TOKENS + rows) * 64 * 2
        assert "cp.async.cg.shared.global" in made.asm["ptx"]
