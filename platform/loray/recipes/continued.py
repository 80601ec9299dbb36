"""A recipe that goes on from a published adapter: what it takes over from that adapter's manifest."""

from __future__ import annotations

from loray.bases.config import ModelConfig
from loray.errors import SpecError
from loray.recipes.resolve import resolve
from loray.spec import AdapterManifest, RopeScaling, TrainSpec


def continued(spec: TrainSpec, parent: AdapterManifest, label: str, model: ModelConfig) -> TrainSpec:
    """`spec` with the version and the RoPE of `parent`, its `init_adapter`, which is called `label`.

    The parent's matrices hold under its own RoPE, so the run has the same. A parent with the base's RoPE may be
    extended, and one that is extended may be extended further: by the same type from the same context, with a larger
    factor. Raises SpecError where `spec` says otherwise.
    """
    if parent.method != spec.adapter.method:
        raise SpecError(
            f"init_adapter {label} is a {parent.method} adapter, and adapter.method is {spec.adapter.method}: train "
            "the same method"
        )
    scaling = spec.rope_scaling
    if parent.rope_parameters is not None and scaling is None:
        scaling = None if parent.recipe is None else parent.recipe.rope_scaling
        if scaling is None:
            raise SpecError(
                f"init_adapter {label} has a RoPE of its own and no recipe that says how it was scaled: give "
                "rope_scaling"
            )
    spec = spec.model_copy(update={"init_adapter": label, "rope_scaling": scaling})
    if parent.rope_parameters is None or resolve(spec, model).rope == parent.rope_parameters:
        return spec
    if not _extends_further(scaling, parent.recipe, model.max_position_embeddings):
        raise SpecError(
            f"rope_scaling gives another RoPE than init_adapter {label} was trained with: leave it out, or "
            "extend it further (its type and original_context, a larger factor)"
        )
    return spec


def _extends_further(scaling: RopeScaling | None, parent: TrainSpec | None, window: int) -> bool:
    before = None if parent is None else parent.rope_scaling
    if scaling is None or before is None:
        return False
    is_same = scaling.type == before.type and scaling.extended_from(window) == before.extended_from(window)
    return is_same and scaling.factor > before.factor
