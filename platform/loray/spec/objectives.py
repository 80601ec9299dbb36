"""Training objectives as a recipe says them: supervised fine-tuning, and preference optimization."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from loray.spec.fields import Frozen

ObjectiveType = Literal["sft", "dpo"]


class SftSpec(Frozen):
    """Supervised fine-tuning: the mean cross-entropy of the targets."""

    type: Literal["sft"] = "sft"


class DpoSpec(Frozen):
    """Direct Preference Optimization (Rafailov et al., 2023) on pairs of a chosen and a rejected answer. The reference
    is the base, with the adapter off. Fields have the names of TRL's DPOConfig.

    loss_type        sigmoid: equation 7 of the paper; robust: its unbiased estimate where labels are noisy (Chowdhury
                     et al., 2024); ipo: a squared distance of mean log-ratios to 1/(2 beta) (Azar et al., 2023);
                     hinge: max(0, 1 − beta · difference) (SLiC, Zhao et al., 2023)
    label_smoothing  of robust: the share of pairs that are labelled the wrong way round
    """

    type: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    loss_type: Literal["sigmoid", "robust", "ipo", "hinge"] = "sigmoid"

    @model_validator(mode="after")
    def _smoothed_is_robust(self) -> Self:
        if (self.label_smoothing > 0) != (self.loss_type == "robust"):
            raise ValueError(
                "loss_type robust and label_smoothing above 0 go together: set both, 0.1 is usual, or none"
            )
        return self


ObjectiveSpec = Annotated[SftSpec | DpoSpec, Field(discriminator="type")]
