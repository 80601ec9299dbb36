"""Whether a recipe may go on from a published adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator

from loray.adapters.pairs import PairKey, drawn_digest
from loray.adapters.weights import AdapterWeights, LoraWeights
from loray.bases.config import ModelConfig
from loray.errors import SpecError
from loray.spec import AdapterSpec, DoraSpec, VeraSpec


def check_initial(spec: AdapterSpec, weights: AdapterWeights, base: ModelConfig, label: str) -> None:
    """Raise SpecError where training `spec` on `base` could not go on from `weights`, which are called `label`.

    It must have the same matrices. It may train norms and the embedding where they are the base's so far.
    """
    if differences := list(_differences(spec, weights, base)):
        raise SpecError(
            f"init_adapter {label} is another adapter than this recipe trains: {'; '.join(differences)}; write them in "
            "the recipe, or go on from another adapter"
        )


def _differences(spec: AdapterSpec, weights: AdapterWeights, base: ModelConfig) -> Iterator[str]:
    theirs = "vera" if weights.pair is not None else "dora" if weights.has_magnitudes else "lora"
    ours = "vera" if isinstance(spec, VeraSpec) else "dora" if isinstance(spec, DoraSpec) else "lora"
    if theirs != ours:
        yield f"its method is {theirs}"
        return
    modules = {key.module for key in weights.modules}
    if modules != set(spec.target_modules):
        yield f"its target_modules are {', '.join(sorted(modules))}"
    elif len(weights.modules) != len(modules) * base.num_layers:
        yield "it has no weights in some of the layers"
    ranks = {m.a_RI.shape[0] if isinstance(m, LoraWeights) else m.d_R.shape[0] for m in weights.modules.values()}
    if ranks != {spec.rank}:
        yield f"its rank is {', '.join(map(str, sorted(ranks)))}"
    elif isinstance(spec, VeraSpec):
        if modules == set(spec.target_modules) and not _has_pair_of(spec, weights, base):
            yield "its random pair is another one (projection_prng_key)"
    else:
        scale = spec.alpha / (math.sqrt(spec.rank) if spec.use_rslora else spec.rank)
        scales = {m.scale for m in weights.modules.values() if isinstance(m, LoraWeights)}
        if not all(math.isclose(s, scale) for s in scales):
            yield f"its update is scaled by {', '.join(f'{s:g}' for s in sorted(scales))} (alpha, use_rslora)"
    if weights.norms and not spec.train_norms:
        yield "it has norms of its own (train_norms: true)"
    if weights.embedding is not None and not spec.train_embeddings:
        yield "it has an embedding of its own (train_embeddings: true)"


def _has_pair_of(spec: VeraSpec, weights: AdapterWeights, base: ModelConfig) -> bool:
    shapes = [base.module_shape(module) for module in spec.target_modules]
    max_out, max_in = (max(sizes) for sizes in zip(*shapes, strict=True))
    drawn = PairKey(spec.projection_prng_key, spec.rank, max_in, max_out)
    return weights.pair is not None and weights.pair.digest == drawn_digest(drawn)
