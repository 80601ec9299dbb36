"""Training objectives as a recipe says them: supervised fine-tuning, preferences, teachers, and rewards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from loray.spec.datums import TokenLoss
from loray.spec.fields import Default, Frozen

ObjectiveType = Literal["sft", "dpo", "orpo", "simpo", "kto", "distill", "rl", "grpo"]


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


_IMPORTED = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
_PLAIN = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


_PLACE = re.compile(r"\{\{\s*(?:item\.([\w-]+)|sample\.output_text)\s*\}\}")
_MOST_FILLED = 100_000  # characters
GraderType = Literal["string_check", "text_similarity"]
TextMetric = Literal["fuzzy_match", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"]


def _template(text: str) -> str:
    rest = _PLACE.sub(" ", text)
    if (at := re.search(r"\{[{%]", rest)) is not None:
        raise ValueError(
            f"{rest[at.start() :][:40]!r} is not supported: a template has {{{{item.FIELD}}}}, a field of the row, and "
            "{{sample.output_text}}, the answer"
        )
    return text


Template = Annotated[str, Field(min_length=1, max_length=20_000), AfterValidator(_template)]


class GraderSpec(Frozen):
    """A grader under OpenAI's names. It compares `input` with `reference`: texts in which {{item.FIELD}} stands for a
    field of the row, as JSON where it is no string, and {{sample.output_text}} for the answer.

    string_check     is worth 1 or 0. `operation` eq: both are equal; ne: they are not; like: `input` has `reference` in
                     it; ilike: it has, in upper or lower case
    text_similarity  is worth from 0 to 1, by `evaluation_metric`
    """

    type: GraderType
    name: str = Field(default="grader", max_length=256)
    input: Template
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"] | None = None
    evaluation_metric: TextMetric | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, data: Any) -> Any:
        for field, known in (("type", get_args(GraderType)), ("evaluation_metric", get_args(TextMetric))):
            given = data.get(field) if isinstance(data, Mapping) else None
            if isinstance(given, str) and given not in known:
                raise ValueError(f"the grader's {field} {given[:80]!r} is not supported: take {' or '.join(known)}")
        return data

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.type == "string_check") != (self.operation is not None):
            raise ValueError("string_check has an operation (eq, ne, like or ilike), and text_similarity has none")
        if (self.type == "text_similarity") != (self.evaluation_metric is not None):
            raise ValueError("text_similarity has an evaluation_metric, and string_check has none")
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields of a row that it reads."""
        return tuple(dict.fromkeys(filter(None, _PLACE.findall(f"{self.input} {self.reference}"))))

    def compared(self, row: Mapping[str, Any], answer: str) -> tuple[str, str]:
        """Fill in `input` and `reference`. Raises KeyError for a field that the row does not have, ValueError where
        more than 100,000 characters are filled in: a template may name a long field many times.
        """
        fields = {name: row[name] for name in self.reads}
        values = {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in fields.items()}
        values[""] = answer
        for template in (self.input, self.reference):
            if sum(len(values[name]) for name in _PLACE.findall(template)) > _MOST_FILLED:
                raise ValueError(f"a grader compares texts of at most {_MOST_FILLED:,} characters; name shorter fields")
        filled = (_PLACE.sub(lambda place: values[place[1] or ""], text) for text in (self.input, self.reference))
        return next(filled), next(filled)


def lacking(needed: Sequence[str], row: Mapping[str, Any]) -> str | None:
    """Say which of the fields that a reward reads a row does not have; None: it has all."""
    missing = next((name for name in needed if row.get(name) is None), None)
    return None if missing is None else f"the row has no `{missing}`, which the reward reads"


class RewardSpec(Frozen):
    """Says what an answer is worth, as `loray.train.rl.rewards` computes it.

    builtin      exact: the answer is the row's `field`; contains: it has it in it; number: its first number is `field`,
                 and nothing but a full stop follows; regex: `pattern` is found in it, and with a `field` its first
                 group is that; json_schema: it is JSON of `json_schema`, or of the schema in the row's `field`
    grader       instead: one of OpenAI's
    function     instead: module:function of yours, called with a row and an answer, that returns a number
    """

    builtin: Literal["exact", "contains", "number", "regex", "json_schema"] | None = None
    grader: GraderSpec | None = None
    function: str | None = Field(default=None, pattern=_IMPORTED)
    field: str | None = Field(default=None, min_length=1)
    pattern: str | None = Field(default=None, min_length=1)
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if sum(kind is not None for kind in (self.builtin, self.grader, self.function)) != 1:
            raise ValueError("give builtin, or grader, or function as module:function")
        if self.builtin in ("exact", "contains", "number") and self.field is None:
            raise ValueError(f"{self.builtin} compares with a field of the row: name it, as field: answer")
        if (self.builtin == "regex") != (self.pattern is not None):
            raise ValueError("regex has a pattern, and nothing else has one")
        if self.builtin == "json_schema" and (self.json_schema is None) == (self.field is None):
            raise ValueError("json_schema needs the schema, as json_schema, or as the field of the row that has it")
        if self.builtin != "json_schema" and self.json_schema is not None:
            raise ValueError("json_schema is for builtin: json_schema")
        if self.builtin is None and self.field is not None:
            raise ValueError("a function is given the whole row, and a grader names its fields: leave field out")
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that each row must have."""
        if self.grader is not None:
            return self.grader.reads
        return () if self.field is None else (self.field,)


class RlSpec(_ObjectiveSpec):
    """Reinforcement learning from rewards: answers are sampled by the deployment of the same base, `group_size` for
    each of `prompts_per_step` prompts, and weighed by how much better they are than others of their group.

    loss           ppo, cispo, gspo, importance_sampling or dro (`loray.train.rl.losses` has the formulas)
    clip           bounds of the ratio between trained and sampled probability; None: the loss's own
    ratio_cap      of importance_sampling: the largest ratio that counts
    beta           of dro, which needs it
    kl             weight of the divergence from the base, k3; above 0 a step has one more forward pass
    advantage      center: reward less the group's mean; std: by the deviation, too; rloo: less the mean of the others;
                   none: the reward
    divisor        tokens: the answer tokens of the step; sequences: each answer's own, then the answers; constant:
                   `max_tokens` times the answers; none: the loss is a sum
    max_staleness  steps by which the version that sampled may be behind the one that is trained
    values         engine: the engine scores answers under the version that is trained, and its log-probabilities are
                   the loss's, whose gradients stay the trainer's
    max_tokens     of an answer, or of a turn
    environment    module:Class instead of a reward, for several turns (`loray.train.rl.rewards.Environment`)
    timeout_s      of a reward, and of each turn of an environment; what takes longer is asked once more
    mask_truncated answers that max_tokens cuts are not learned from
    """

    formats: ClassVar[frozenset[str]] = frozenset({"chat", "prompt_completion"})
    metrics: ClassVar[Mapping[str, str]] = {
        "reward": "Mean reward of a step's answers, or of held-out rows",
        "mismatch": "Mean difference between trainer's and engine's log-probabilities of the same tokens",
    }
    shown: ClassVar[Mapping[str, str]] = {"reward": "reward", "mismatch": "mismatch"}
    defaults: ClassVar[Mapping[str, Default]] = {
        "objective.type": Default("learns from rewards of its own answers; grpo has the published values", "rl"),
        "objective.loss": Default("the usual one; gspo and cispo where answers are long"),
        "objective.clip": Default("the loss's: 0.8 to 1.2 of ppo and gspo, 0 to 4 of cispo"),
        "objective.ratio_cap": Default("of importance_sampling: ratios count as they are"),
        "objective.beta": Default("of dro, for which nobody has published a value"),
        "objective.kl": Default("no divergence from the base is punished, as in Dr. GRPO and DAPO"),
        "objective.advantage": Default("Dr. GRPO's: a deviation would favour prompts that are nearly always right"),
        "objective.divisor": Default("DAPO's: every token weighs the same; constant is Dr. GRPO's"),
        "objective.group_size": Default("answers to a prompt, which are compared with each other"),
        "objective.prompts_per_step": Default("more of them make steps steadier, and longer"),
        "objective.max_tokens": Default("of an answer; what is cut counts as it stands"),
        "objective.max_staleness": Default("one step is trained while the next one is sampled; 0: one after the other"),
        "objective.values": Default(
            "the trainer's own; engine: one more prefill, and no ratio that only rounding makes"
        ),
        "objective.reward": Default("what an answer is worth: one that is built in, or a function of yours"),
        "objective.reward.builtin": Default("exact, contains, number, regex or json_schema"),
        "objective.reward.grader": Default("OpenAI's, as a fine-tuning request names it"),
        "objective.reward.grader.type": Default("string_check or text_similarity"),
        "objective.reward.grader.name": Default("for people"),
        "objective.reward.grader.input": Default("what is compared: {{sample.output_text}} is the answer"),
        "objective.reward.grader.reference": Default("with what: {{item.FIELD}} is a field of the row"),
        "objective.reward.grader.operation": Default("of string_check: eq, ne, like or ilike"),
        "objective.reward.grader.evaluation_metric": Default("of text_similarity: fuzzy_match, gleu or a rouge"),
        "objective.reward.function": Default("a function of yours, as module:function"),
        "objective.reward.field": Default("the field of a row that has the right answer"),
        "objective.reward.pattern": Default("of regex"),
        "objective.reward.json_schema": Default("of json_schema"),
        "objective.environment": Default("for several turns: a class of yours, as module:Class"),
        "objective.num_env_actors": Default("processes that compute rewards"),
        "objective.timeout_s": Default("a reward that takes longer is asked once more, then its answer is left out"),
        "objective.mask_truncated": Default("an answer that is cut is learned from as it stands"),
        "data.train": Default("rows with `messages` or `prompt`, and whatever the reward reads"),
        "data.eval": Default("rows whose greedy answers are rewarded; without it, a part of `train` is held out"),
        "batch.rows": Default("of a pass in the plan; the trainer joins as many as its memory holds", 4),
        "evaluation.keep_best": Default("the version with the highest held-out reward, where it is measured"),
        "evaluation.interval_steps": Default("before and after training; the engine answers held-out rows greedily"),
        "optimizer.schedule": Default("no end is known in advance", "constant"),
        "optimizer.learning_rate": Default(
            "low: at 3e-4 a run may soon give a prompt one answer, and learn no more", 1e-4
        ),
    }

    type: Literal["rl"] = "rl"
    loss: Literal["importance_sampling", "ppo", "cispo", "gspo", "dro"] = "ppo"
    clip: tuple[float, float] | None = None
    ratio_cap: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    beta: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    kl: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    advantage: Literal["center", "std", "rloo", "none"] = "center"
    divisor: Literal["tokens", "sequences", "constant", "none"] = "tokens"
    group_size: int = Field(default=8, ge=2, le=1024)
    prompts_per_step: int = Field(default=4, gt=0, le=4096)
    max_tokens: int = Field(default=256, gt=0)
    max_staleness: int = Field(default=1, ge=0, le=16)
    values: Literal["trainer", "engine"] = "trainer"
    reward: RewardSpec | None = None
    environment: str | None = Field(default=None, pattern=_IMPORTED)
    num_env_actors: int = Field(default=1, gt=0, le=1024)
    timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    mask_truncated: bool = False

    @model_validator(mode="before")
    @classmethod
    def _samples_plainly(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and (found := [name for name in _PLAIN if name in data]):
            raise ValueError(
                f"{found[0]} is not for rollouts: they are sampled from the model as it is, at temperature 1, since "
                "only then are the log-probabilities those of the answers; leave it out"
            )
        return data

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.reward is None) == (self.environment is None):
            raise ValueError("give a reward, as {builtin: number, field: answer}, or an environment, as module:Class")
        self.token_loss()  # refuses options of other losses
        return self

    def token_loss(self, divisor: float = 1.0) -> TokenLoss:
        """Make the loss as trainers have it. Raises ValueError."""
        low, high = self.clip or (None, None)
        given = {"clip_low": low, "clip_high": high, "ratio_cap": self.ratio_cap, "beta": self.beta}
        return TokenLoss(type=self.loss, divisor=divisor, kl=self.kl, **given)

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that each row must have for the reward."""
        return () if self.reward is None else self.reward.reads

    @property
    def runs_code(self) -> str | None:
        """Name what the recipe has imported, where that is no part of loray."""
        return self.environment if self.reward is None else self.reward.function


class GrpoSpec(RlSpec):
    """The same with the values of GRPO as published (Shao et al., 2024): ppo, `std`, `sequences`, and the divergence
    from the base.
    """

    defaults: ClassVar[Mapping[str, Default]] = {
        **RlSpec.defaults,
        "objective.type": Default("learns from rewards, with the values of GRPO's paper; rl has its own", "grpo"),
        "objective.kl": Default("the paper's"),
        "objective.advantage": Default("the paper's: reward less the group's mean, by its deviation"),
        "objective.divisor": Default("the paper's: an answer weighs the same however long it is"),
    }

    type: Literal["grpo"] = "grpo"  # type: ignore[assignment]
    kl: float = Field(default=0.04, ge=0, allow_inf_nan=False)
    advantage: Literal["center", "std", "rloo", "none"] = "std"
    divisor: Literal["tokens", "sequences", "constant", "none"] = "sequences"


AnyObjective = SftSpec | DpoSpec | OrpoSpec | SimpoSpec | KtoSpec | DistillSpec | RlSpec | GrpoSpec
OBJECTIVES: Mapping[ObjectiveType, type[AnyObjective]] = {
    "sft": SftSpec,
    "dpo": DpoSpec,
    "orpo": OrpoSpec,
    "simpo": SimpoSpec,
    "kto": KtoSpec,
    "distill": DistillSpec,
    "rl": RlSpec,
    "grpo": GrpoSpec,
}
ObjectiveSpec = Annotated[AnyObjective, Field(discriminator="type")]
# Of all objectives.
FIGURES: Mapping[str, str] = {name: what for spec in OBJECTIVES.values() for name, what in spec.metrics.items()}
