"""Training objectives as a recipe says them: supervised fine-tuning, and learning from preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from loray.spec.fields import Default, Frozen

ObjectiveType = Literal["sft", "dpo", "orpo", "simpo", "kto", "distill"]


# By TRL's names, what answers are worth to the model: beta times a log-ratio to a reference, or a log-probability.
REWARDS: Mapping[str, str] = {
    "rewards/chosen": "Mean reward of chosen answers",
    "rewards/rejected": "Mean reward of rejected answers",
    "rewards/accuracies": "Share of pairs whose chosen answer has the higher reward",
    "rewards/margins": "Mean reward of chosen answers minus that of rejected ones",
}
_NLL = {"nll_loss": "Mean cross-entropy a token of chosen answers"}
_SHOWN = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class Teaching(NamedTuple):
    """A model of `url`, or without one a base of this machine, is asked for its `num_top` likeliest tokens."""

    model: str
    url: str | None
    num_top: int


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

    formats: ClassVar[frozenset[str]] = frozenset({"chat", "sharegpt", "prompt_completion", "alpaca", "text"})
    compares_answers: ClassVar[bool] = False
    sequences_per_row: ClassVar[int] = 1
    extra_forwards: ClassVar[int] = 0
    has_reference: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, str]] = {}
    shown: ClassVar[Mapping[str, str]] = {}
    defaults: ClassVar[Mapping[str, Default]] = {}

    @property
    def teaching(self) -> Teaching | None:
        """Who is asked about the rows before the first step."""
        return None

    def warning(self, desirable: float) -> str | None:
        """Say what fits badly to rows of which this share is desirable."""
        return None


class SftSpec(_ObjectiveSpec):
    """Supervised fine-tuning: the mean cross-entropy of the targets."""

    type: Literal["sft"] = "sft"


class _AnswersSpec(_ObjectiveSpec):
    """Compares whole answers, two sequences for each row."""

    compares_answers: ClassVar[bool] = True
    sequences_per_row: ClassVar[int] = 2
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(
            "of prompt and answer, in tokens: 1024 or the base's shorter window; cut at the end"
        ),
        "batch.order": Default("shuffled; length_grouped pads less"),
    }


class _PairsSpec(_AnswersSpec):
    """Learns from pairs of a chosen and a rejected answer."""

    formats: ClassVar[frozenset[str]] = frozenset({"preference", "openai_preference"})
    metrics: ClassVar[Mapping[str, str]] = REWARDS
    shown: ClassVar[Mapping[str, str]] = _SHOWN
    defaults: ClassVar[Mapping[str, Default]] = {
        **_AnswersSpec.defaults,
        "data.train": Default("files, folders or globs with `prompt`, `chosen` and `rejected`"),
        "batch.rows": Default("pairs of a worker at once, two sequences each; halve it where memory is short", 4),
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


_MOST_DESIRABLE = 1.34


class KtoSpec(_AnswersSpec):
    """Kahneman-Tversky Optimization (Ethayarajh et al., 2024): learns from answers that are each desirable or not. An
    answer's reward counts from the KL divergence to the reference, which is what training goes on from. Fields have
    the names of TRL's KTOConfig.

    The KL divergence is estimated on every prompt of a step with the answer of the row before it, by one more forward
    pass: the two sequences of a row are its own answer and that one.
    """

    formats: ClassVar[frozenset[str]] = frozenset({"unpaired_preference"})
    extra_forwards: ClassVar[int] = 1
    has_reference: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, str]] = {
        **{name: what for name, what in REWARDS.items() if name != "rewards/accuracies"},
        "kl": "KL divergence to the reference, estimated on prompts with other prompts' answers; 0 where it is less",
    }
    shown: ClassVar[Mapping[str, str]] = {"rewards/margins": "margin", "kl": "KL"}
    defaults: ClassVar[Mapping[str, Default]] = {
        **_AnswersSpec.defaults,
        "objective.type": Default("answers that are each good or bad, without pairs", "kto"),
        "objective.beta": Default("the paper's; higher stays nearer to the base"),
        "objective.desirable_weight": Default(
            "raise it where desirable rows are few: all together they should weigh 1 to 1.33 times the others"
        ),
        "objective.undesirable_weight": Default("likewise, where undesirable rows are few"),
        "data.train": Default("files, folders or globs with `prompt`, `completion` and `label`, true or false"),
        "batch.rows": Default("of a worker at once; a step's rows together estimate the KL divergence", 8),
    }

    type: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    desirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    undesirable_weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def warning(self, desirable: float) -> str | None:
        """Desirable rows are to weigh 1 to 4/3 times the undesirable ones (the paper's equation 8)."""
        if not 0 < desirable < 1:
            return f"{desirable:.0%} of the rows are desirable, and KTO learns from the difference to others"
        balance = (1 - desirable) / desirable  # of the weights
        if 1 <= round(self.desirable_weight / self.undesirable_weight / balance, 2) <= _MOST_DESIRABLE:
            return None
        least, most = sorted((balance, _MOST_DESIRABLE * balance))
        return (
            f"{desirable:.0%} of the rows are desirable: objective.desirable_weight is best {least:.2g} to {most:.2g} "
            f"times objective.undesirable_weight, and is {self.desirable_weight / self.undesirable_weight:.2g} times"
        )


class DistillSpec(_ObjectiveSpec):
    """Distillation (Hinton et al., 2015): learns what a teacher says of each target, beside the target itself. The
    teacher is asked once for each row, before the first step; of a server's key see TEACHER_API_KEY.

    teacher     with `url` a model that is served there, an adapter as name@alias too; else a base of this machine
    url         of an OpenAI-compatible server whose completions have `prompt_logprobs`, such as http://127.0.0.1:8000/v1
    top_k       the teacher's likeliest tokens; all others together are one more
    divergence  forward: KL(teacher‖student), so that the student finds likely what the teacher does; reverse:
                KL(student‖teacher), so that it finds nothing likely that the teacher does not (MiniLLM)
    weight      of the divergence; the rest is that of the cross-entropy
    """

    metrics: ClassVar[Mapping[str, str]] = {
        "divergence": "Mean divergence from the teacher a target token",
        "cross_entropy": "Mean cross-entropy a target token",
    }
    shown: ClassVar[Mapping[str, str]] = {"divergence": "divergence"}
    defaults: ClassVar[Mapping[str, Default]] = {
        "objective.type": Default("what a larger model, or an adapter, says of the same rows", "distill"),
        "objective.teacher": Default("a model of `url`, or a base of this machine, with the base's tokenizer"),
        "objective.url": Default("of a server with prompt_logprobs, as loray's and vLLM's are"),
        "objective.top_k": Default("as many as servers give; they hold nearly all of a teacher's probability"),
        "objective.divergence": Default("the usual one; reverse for a student that is much smaller"),
        "objective.weight": Default("half the teacher, half the data; 1 where only the teacher is to be learned"),
    }

    type: Literal["distill"] = "distill"
    teacher: str = Field(min_length=1, max_length=200)
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$")
    top_k: int = Field(default=20, ge=1, le=1024)
    divergence: Literal["forward", "reverse"] = "forward"
    weight: float = Field(default=0.5, gt=0, le=1)

    @property
    def teaching(self) -> Teaching:
        return Teaching(self.teacher, self.url, self.top_k)


AnyObjective = SftSpec | DpoSpec | OrpoSpec | SimpoSpec | KtoSpec | DistillSpec
OBJECTIVES: Mapping[ObjectiveType, type[AnyObjective]] = {
    "sft": SftSpec,
    "dpo": DpoSpec,
    "orpo": OrpoSpec,
    "simpo": SimpoSpec,
    "kto": KtoSpec,
    "distill": DistillSpec,
}
ObjectiveSpec = Annotated[AnyObjective, Field(discriminator="type")]
# Of all objectives.
FIGURES: Mapping[str, str] = {name: what for spec in OBJECTIVES.values() for name, what in spec.metrics.items()}
