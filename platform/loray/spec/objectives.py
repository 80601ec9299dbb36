"""Training objectives as a recipe says them: supervised fine-tuning, and preference optimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from loray.spec.fields import Default, Frozen

ObjectiveType = Literal["sft", "dpo"]


# Of pairs, by TRL's names: means of the answers' rewards, the share told apart, the mean difference.
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


class _ObjectiveSpec(Frozen):
    """The section `objective` of a recipe. Its class says what data, planning and reports ask of an objective.

    sequences_per_row  two where a row is a pair of answers
    has_reference      its loss compares with what the model says of a row before the first step
    metrics            names of further figures beside the loss, means over its terms: events, gauges and trackers have
                       them by these
    shown              those that a line for people has, and what they are called there
    defaults           of a recipe's fields, with their reasons, where they are not those of every recipe
    """

    sequences_per_row: ClassVar[int] = 1
    has_reference: ClassVar[bool] = False
    metrics: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[Mapping[str, Default]] = {}


class SftSpec(_ObjectiveSpec):
    """Supervised fine-tuning: the mean cross-entropy of the targets."""

    type: Literal["sft"] = "sft"


class DpoSpec(_ObjectiveSpec):
    """Direct Preference Optimization (Rafailov et al., 2023) on pairs of a chosen and a rejected answer. The reference
    is what training goes on from: `init_adapter`, or the base. Fields have the names of TRL's DPOConfig.

    loss_type        sigmoid: equation 7 of the paper; robust: its unbiased estimate where labels are noisy (Chowdhury
                     et al., 2024); ipo: a squared distance of mean log-ratios to 1/(2 beta) (Azar et al., 2023);
                     hinge: max(0, 1 − beta · difference) (SLiC, Zhao et al., 2023)
    label_smoothing  of robust: the share of pairs that are labelled the wrong way round
    """

    sequences_per_row: ClassVar[int] = 2
    has_reference: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = REWARDS
    shown: ClassVar[Mapping[str, str]] = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    defaults: ClassVar[Mapping[str, Default]] = {
        "objective.type": Default("pairs against what training goes on from, the base or `init_adapter`", "dpo"),
        "objective.beta": Default("the paper's; higher stays nearer to the base"),
        "objective.label_smoothing": Default("of robust: the share of pairs that are labelled the wrong way round"),
        "objective.loss_type": Default("the paper's; robust where labels are noisy, ipo where sigmoid overfits, hinge"),
        "data.train": Default("files, folders or globs with `prompt`, `chosen` and `rejected`"),
        "data.max_length": Default(
            "of prompt and answer, in tokens: 1024 or the base's shorter window; cut at the end"
        ),
        "batch.rows": Default("pairs of a worker at once, two sequences each; halve it where memory is short", 4),
        "batch.order": Default("shuffled; length_grouped pads less"),
    }

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


OBJECTIVES: Mapping[ObjectiveType, type[SftSpec | DpoSpec]] = {"sft": SftSpec, "dpo": DpoSpec}
ObjectiveSpec = Annotated[SftSpec | DpoSpec, Field(discriminator="type")]
