"""Attention while training, and the scaling of positions: two choices of a recipe, independent of each other and of
the adapter's method.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from loray.spec.fields import MAX_CONTEXT, Frozen


class AttentionSpec(Frozen):
    """Attention while training; evaluation and serving are dense.

    s2  LongLoRA's shifted sparse attention (Chen et al., ICLR 2024) in groups of `group_size` = G tokens. Unless given,
        G is a quarter of the context that positions are scaled to; without scaling, of the longest row
    """

    type: Literal["dense", "s2"] = "dense"
    group_size: int | None = Field(default=None, ge=2, multiple_of=2)

    @model_validator(mode="after")
    def _groups_are_s2s(self) -> Self:
        if self.type == "dense" and self.group_size is not None:
            raise ValueError("group_size is S2-Attn's: set type: s2, or leave group_size out")
        return self


class RopeScaling(Frozen):
    """Position interpolation by `factor`: positions divided (linear), base stretched (ntk), or by frequency (yarn).

    original_context × factor = the context trained for. `original_context` is the base's own window unless given.
    """

    type: Literal["linear", "ntk", "yarn"] = "linear"
    factor: float = Field(gt=1, le=4096)
    original_context: int | None = Field(default=None, gt=0, le=MAX_CONTEXT)

    def extended_from(self, window: int) -> int:
        """Tokens of the context before it is extended, on a base with a context of `window` tokens."""
        return self.original_context or window

    def context_length(self, window: int) -> int:
        """Tokens that the adapter is trained for, on a base with a context of `window` tokens."""
        return int(self.extended_from(window) * self.factor)
