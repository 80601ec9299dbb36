"""Recipes as published manifests and the records of older runs have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXTRAS = ("train_embeddings", "train_norms")


def upgraded(recipe: Any) -> Any:
    """`adapter.long_context` as `attention`, `rope_scaling`, `adapter.train_embeddings` and `adapter.train_norms`.

    It held all four. Anything else passes through. Raises ValueError where a recipe has both forms.
    """
    adapter = recipe.get("adapter") if isinstance(recipe, Mapping) else None
    if not isinstance(adapter, Mapping) or "long_context" not in adapter:
        return recipe
    adapter = dict(adapter)
    long_context = adapter.pop("long_context")
    if not isinstance(long_context, Mapping):
        return {**recipe, "adapter": adapter} if long_context is None else recipe
    if "attention" in recipe or "rope_scaling" in recipe:
        raise ValueError("adapter.long_context is an older form of attention and rope_scaling: leave it out")
    rest = dict(long_context)
    attention = {"type": "s2", "group_size": rest.pop("group_size", None)}
    adapter |= {name: rest.pop(name, True) for name in _EXTRAS}
    scaling = rest.pop("rope_scaling", {})
    if isinstance(scaling, Mapping):
        scaling = {**scaling, **rest}
    return {**recipe, "adapter": adapter, "attention": attention, "rope_scaling": scaling}
