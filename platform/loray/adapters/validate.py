"""A folder that PEFT saved, checked as a whole before it is published: what it says, and that its values are finite.

Servers check what anybody sends: shapes are those of the header, values and VeRA's pair pass in blocks. Works without
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from loray.adapters.checks.files import PAIR_NAMES, check_declared, check_finite, own_bytes, read_header
from loray.adapters.pairs import PairKey, drawn_digest, stored_digest
from loray.adapters.peft_format import parse_adapter, read_config, weights_path, without_prefix
from loray.adapters.weights import AdapterWeights, ProjectionPair
from loray.bases.config import ModelConfig
from loray.bases.safetensors import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

    from loray.spec import AdapterManifest


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """`weights` has the shapes of the tensors and no values. `entries` is the file's header."""

    weights: AdapterWeights
    entries: Mapping[str, TensorEntry]
    prng_key: int

    @property
    def num_parameters(self) -> int:
        """Without VeRA's shared pair, as `nbytes`."""
        return sum(math.prod(entry.shape) for name, entry in self.entries.items() if name not in PAIR_NAMES)

    @property
    def nbytes(self) -> int:
        return own_bytes(self.entries)


def validate_folder(folder: Path, base: ModelConfig, manifest: AdapterManifest | None = None) -> CheckedFolder:
    """Check the adapter in `folder`, which may be anybody's, for a base of this configuration.

    `manifest` is that of a published adapter; it must not say less than the file has. Raises UnsupportedError,
    BaseMismatch or IntegrityError. Costs one pass over the file, and memory for a part of it.
    """
    config = read_config(folder)
    path = weights_path(folder)
    entries = read_header(path)
    if manifest is not None:
        check_declared(entries, manifest, source=str(path))
    shapes = cast("dict[str, Tensor]", without_prefix(entries))
    weights = parse_adapter(folder, config, shapes, base, partial(_pair_in_blocks, path))
    check_finite(path, entries)
    return CheckedFolder(weights, entries, int(config.get("projection_prng_key", 0)))


def _pair_in_blocks(path: Path, drawn: PairKey, stored: Mapping[str, Tensor]) -> ProjectionPair:
    """VeRA's pair by its shapes and its digest."""
    if stored:
        a, b = (cast(TensorEntry, stored[name]) for name in ("A", "B"))
        digest = stored_digest(path, a, b)
    else:
        a, b = (TensorEntry("F32", shape, 0, 0) for shape in drawn.shapes)
        digest = drawn_digest(drawn)
    return ProjectionPair(cast("Tensor", a), cast("Tensor", b), digest)
