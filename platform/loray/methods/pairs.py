"""The numbers of VeRA's pair (A, B) and its SHA-256, without torch, a block at a time: drawn from a key, or read.

Whoever checks an adapter needs the digest alone, and no memory for a pair of any rank.

Shapes: R rank, I input width, O output width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from loray.bases.checkpoint import TensorEntry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAIR_NAMES = ("base_model.vera_A", "base_model.vera_B")  # of a stored pair, in PEFT's files
_BLOCK = 1 << 18  # numbers


class PairKey(NamedTuple):
    """The arguments of a drawn pair."""

    key: int
    rank: int
    max_in: int
    max_out: int

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A, (R, max_in), and of B, (max_out, R)."""
        return (self.rank, self.max_in), (self.max_out, self.rank)


def draw_blocks(pair: PairKey) -> Iterator[NDArray[np.float32]]:
    """Draw A's numbers in row order, then B's: Kaiming-uniform in fan-in, fp32, from one generator. No block has both.

    Kopiczko et al., *VeRA* (ICLR 2024), section 3.2. The generator is the Mersenne Twister of torch's CPU, which takes
    the lower 32 bits of a seed and makes of 24 bits a number u from 0 to 1.
    """
    import numpy as np

    generator = np.random.RandomState(pair.key & 0xFFFFFFFF)  # its numbers stay the same in all versions of numpy
    for shape in pair.shapes:
        # Rounds in PEFT's order: gain/√fan first, then √3 times it.
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        for start in range(0, math.prod(shape), _BLOCK):
            size = min(_BLOCK, math.prod(shape) - start)
            u = (generator.randint(0, 1 << 32, size=size, dtype=np.uint32) & np.uint32(0xFFFFFF)).astype(np.float32)
            u *= np.float32(2**-24)
            # torch's uniform_ computes u · 2b - b, rounded once or twice by the instruction set. Here u - ½ is exact,
            # so that the product's rounding is the only one on each.
            u -= np.float32(0.5)
            u *= np.float32(2 * bound)
            yield u


@lru_cache(maxsize=64)
def drawn_digest(pair: PairKey) -> str:
    """Compute the SHA-256 of the drawn pair, as `vera_module.pair_digest` does."""
    digest = begin_digest(*pair.shapes)
    for block in draw_blocks(pair):
        digest.update(block.data)
    return digest.hexdigest()


def stored_digest(f: BinaryIO, a_RI: TensorEntry, b_OR: TensorEntry) -> str:
    """Compute the SHA-256 of the pair in these tensors of a file, as `vera_module.pair_digest` does."""
    digest = begin_digest(a_RI.shape, b_OR.shape)
    for entry in (a_RI, b_OR):
        item_bytes = (entry.stop - entry.start) // math.prod(entry.shape)
        f.seek(entry.start)
        for start in range(entry.start, entry.stop, _BLOCK * item_bytes):
            data = f.read(min(_BLOCK * item_bytes, entry.stop - start))
            digest.update(_as_fp32(data, entry.dtype).data)
    return digest.hexdigest()


def begin_digest(a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> hashlib._Hash:
    """Begin the digest of a pair, which the fp32 bytes of A and B in row order complete."""
    return hashlib.sha256(f"{a_shape}{b_shape}".encode())


def _as_fp32(data: bytes, dtype: str) -> NDArray[np.float32]:
    import numpy as np

    if dtype == "BF16":  # the upper half of fp32; numpy has no such dtype
        return (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):  # becomes infinite, as in torch
        return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float32)
