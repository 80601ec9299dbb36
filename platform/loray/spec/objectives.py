"""Training objectives as a recipe says them: supervised fine-tuning, and learning from preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from loray.spec.fields import Default, Frozen

ObjectiveType = Literal["sft", "dpo", "orpo", "simpo", "kto"]


# By TRL's names, what answers are worth to the model: beta times a log-ratio to a reference, or a log-probability.
REWARDS: Mapping[str, str] = {
    "rewards/chosen": "Mean reward of chosen answers",
    "rewards/rejected": "Mean reward of rejected answers",
    "rewards/accuracies": "Share of pairs whose chosen answer has the higher reward",
    "rewards/margins": "Mean reward of chosen answers minus that of rejected ones",
}
_NLL = {"nll_loss": "Mean cross-entropy a token of chosen answers"}
_SHOWN = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class _ObjectiveSpec(Frozen):
    """The section `objective` of a recipe. Its class says what data, planning and reports ask of an objective.

    formats            of rows that it learns from
    compares_answers   rows are whole answers, so that they are not joined, and its learning rate is that of preferences
    sequences_per_row  two where a row is a pair of answers
    extra_forwards     those of them that a step only passes forward, without gradients
    has_reference      its loss compares with what the model says of a row before the first step
    metrics            further figures beside the loss, each a mean, and what they are: events, gauges and trackers have
                       them by these names
    shown              those that a line for people has, and what they are called there
    defaults           of a recipe's fields, with their reasons, where they are not those of every recipe
    """

    formats: ClassVar[frozenset[str]] = frozenset({"chat", "prompt_completion", "text"})
    compares_answers: ClassVar[bool] = False
    sequences_per_row: ClassVar[int] = 1
    extra_forwards: ClassVar[int] = 0
    has_reference: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, str]] = {}
    shown: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[Mapping[str, Default]] = {}


class SftSpec(_ObjectiveSpec):
    """Supervised fine-tuning: the mean cross-entropy of the targets."""

    type: Literal["sft"] = "sft"


class _PairsSpec(_ObjectiveSpec):
    """Learns from pairs of a chosen and a rejected answer."""

    formats: ClassVar[frozenset[str]] = frozenset({"preference"})
    compares_answers: ClassVar[bool] = True
    sequences_per_row: ClassVar[int] = 2
    metrics: ClassVar[Mapping[str, str]] = REWARDS
    shown: ClassVar[Mapping[str, str]] = _SHOWN
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.train": Default("files, folders or globs with `prompt`, `chosen` and `rejected`"),
        "data.max_length": Default(
            "of prompt and answer, in tokens: 1024 or the base's shorter window; cut at the end"
        ),
        "batch.rows": Default("pairs of a worker at once, two sequences each; halve it where memory is short", 4),
        "batch.order": Default("shuffled; length_grouped pads less"),
    }


class DpoSpec(_PairsSpec):
    """Direct Preference Optimization (Rafailov et al., 2023) on pairs of a chosen and a rejected answer. The reference
    is what training goes on from: `init_adapter`, or the base. Fields have the names of TRL's DPOConfig.

    loss_type        sigmoid: equation 7 of the paper; robust: its unbiased estimate where labels are noisy (Chowdhury
                     et al., 2024); ipo: a squared distance of mean log-ratios to 1/(2 beta) (Azar et al., 2023);
                     hinge: max(0, 1 − beta · difference) (SLiC, Zhao et al., 2023)
    label_smoothing  of robust: the share of pairs that are labelled the wrong way round
    """

    has_reference: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Default]] = {
        **_PairsSpec.defaults,
        "objective.type": Default("pairs against what training goes on from, the base or `init_adapter`", "dpo"),
        "objective.beta": Default("the paper's; higher stays nearer to the base"),
        "objective.label_smoothing": Default("of robust: the share of pairs that are labelled the wrong way round"),
        "objective.loss_type": Default("the paper's; robust where labels are noisy, ipo where sigmoid overfits, hinge"),
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


class OrpoSpec(_PairsSpec):
    """Odds Ratio Preference Optimization (Hong et al., 2024): the cross-entropy of the chosen answer and its prompt,
    and of both answers the odds of one against the other. It has no reference. Fields have the names of TRL's
    ORPOConfig.

    beta  the weight of the odds ratio, the paper's lambda
    """

    metrics: ClassVar[Mapping[str, str]] = {
        **REWARDS,
        **_NLL,
        "log_odds_ratio": "Mean log sigmoid of the log odds of chosen answers over rejected ones",
        "log_odds_chosen": "Mean log odds of chosen answers over rejected ones",
    }
    defaults: ClassVar[Mapping[str, Default]] = {
        **_PairsSpec.defaults,
        "objective.type": Default("pairs without a stage before them: it learns the chosen answers too", "orpo"),
        "objective.beta": Default("the paper's weight of the odds ratio; higher tells answers apart sooner"),
    }

    type: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)


class SimpoSpec(_PairsSpec):
    """Simple Preference Optimization (Meng et al., 2024): the reward is the mean log-probability a token, and the
    chosen answer's is to be higher by a margin. It has no reference. Fields have the names of TRL's CPOConfig, whose
    loss_type is simpo here.

    simpo_gamma  the margin, after beta has scaled the rewards
    cpo_alpha    the weight of the chosen answer's cross-entropy (CPO, Xu et al., 2024); 0 in the paper
    """

    metrics: ClassVar[Mapping[str, str]] = {**REWARDS, **_NLL}
    shown: ClassVar[Mapping[str, str]] = {**_SHOWN, "nll_loss": "NLL"}
    defaults: ClassVar[Mapping[str, Default]] = {
        **_PairsSpec.defaults,
        "objective.type": Default("pairs by log-probability a token: long answers are worth no more", "simpo"),
        "objective.beta": Default("the paper's: 2 to 2.5, and up to 10 where a model has been aligned before"),
        "objective.simpo_gamma": Default("the paper's: half of beta"),
        "objective.cpo_alpha": Default("the paper's; above 0 where `nll_loss` rises far: it holds chosen answers up"),
    }

    type: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    simpo_gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    cpo_alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class KtoSpec(_ObjectiveSpec):
    """Kahneman-Tversky Optimization (Ethayarajh et al., 2024): learns from answers that are each desirable or not. An
    answer's reward counts from the KL divergence to the reference, which is what training goes on from. Fields have
    the names of TRL's KTOConfig.

    The KL divergence is estimated on every prompt of a step with the answer of the row before it, by one more forward
    pass: the two sequences of a row are its own answer and that one.
    """

    formats: ClassVar[frozenset[str]] = frozenset({"unpaired_preference"})
    compares_answers: ClassVar[bool] = True
    sequences_per_row: ClassVar[int] = 2
    extra_forwards: ClassVar[int] = 1
    has_reference: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, str]] = {
        **{name: what for name, what in REWARDS.items() if name != "rewards/accuracies"},
        "kl": "KL divergence to the reference, estimated on prompts with other prompts' answers; 0 where it is less",
    }
    shown: ClassVar[Mapping[str, str]] = {"rewards/margins": "margin", "kl": "KL"}
    defaults: ClassVar[Mapping[str, Default]] = {
        "objective.type": Default("answers that are each good or bad, without pairs", "kto"),
        "objective.beta": Default("the paper's; higher stays nearer to the base"),
        "objective.desirable_weight": Default(
            "raise it where desirable rows are few: all together they should weigh 1 to 1.33 times the others"
        ),
        "objective.undesirable_weight": Default("likewise, where undesirable rows are few"),
        "data.train": Default("files, folders or globs with `prompt`, `completion` and `label`, true or false"),
        "data.max_length": Default(
            "of prompt and answer, in tokens: 1024 or the base's shorter window; cut at the end"
        ),
        "batch.rows": Default("of a worker at once; a step's rows together estimate the KL divergence", 8),
        "batch.order": Default("shuffled; length_grouped pads less"),
    }

    type: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    desirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    undesirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


AnyObjective = SftSpec | DpoSpec | OrpoSpec | SimpoSpec | KtoSpec
OBJECTIVES: Mapping[ObjectiveType, type[AnyObjective]] = {
    "sft": SftSpec,
    "dpo": DpoSpec,
    "orpo": OrpoSpec,
    "simpo": SimpoSpec,
    "kto": KtoSpec,
}
ObjectiveSpec = Annotated[AnyObjective, Field(discriminator="type")]
# Of all objectives.
FIGURES: Mapping[str, str] = {name: what for spec in OBJECTIVES.values() for name, what in spec.metrics.items()}
