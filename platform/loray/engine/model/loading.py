"""The tensors of a checkpoint, as they come: layer by layer, so that no more than a layer is in memory twice."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from loray.bases.checkpoint import expected_shapes
from loray.bases.config import ModelConfig
from loray.errors import IntegrityError

_LAYER = re.compile(r"model\.layers\.(\d+)\.")

L = TypeVar("L")


def load_layers(
    tensors: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    take: Callable[[str, Tensor], Tensor],
    make: Callable[[int, Mapping[str, Tensor]], L],
) -> tuple[list[L], Mapping[str, Tensor]]:
    """The layers of the decoder, each made when the last of its tensors has been taken, and the tensors of no layer.

    A layer packs its matrices into other memory; what it was made from is given up with it. In the order of a
    checkpoint, by name, a layer's tensors follow each other. Tensors that the decoder does not read are not taken.
    IntegrityError if one is missing.
    """
    missing = set(expected_shapes(config))
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    left = Counter(_layer_of(name) for name in missing)
    taken: defaultdict[int | None, dict[str, Tensor]] = defaultdict(dict)
    layers: dict[int, L] = {}
    for name, tensor in tensors:
        if name not in missing:
            continue
        missing.remove(name)
        layer = _layer_of(name)
        taken[layer][name] = take(name, tensor)
        left[layer] -= 1
        if layer is not None and not left[layer]:
            layers[layer] = make(layer, taken.pop(layer))
    if missing:
        raise IntegrityError(f"the checkpoint lacks the tensor {min(missing)!r}; add the base again")
    return [layers[i] for i in range(config.num_layers)], taken[None]


def _layer_of(name: str) -> int | None:
    found = _LAYER.match(name)
    return None if found is None else int(found[1])
