"""Bodies of OpenAI's fine-tuning routes. A job is a training job of loray, and a request stands for its recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from loray.errors import RequestError
from loray.schemas.openai.fields import Body, SmallObject
from loray.schemas.openai.files import Answer
from loray.spec import GraderSpec, JobMetadata

RECIPE = "loray.recipe"  # the key of `metadata` with further fields of the recipe, as JSON
_METADATA_CHARACTERS = 512  # of any other value, as OpenAI has it

Auto = Literal["auto"]


def _short(metadata: dict[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if key != RECIPE and len(value) > _METADATA_CHARACTERS:
            raise RequestError(f"the value of {key!r} has {len(value):,} characters; at most {_METADATA_CHARACTERS}")
    return metadata


def _refused(reason: str) -> AfterValidator:
    def refuse(value: Any) -> Any:
        if value:
            raise RequestError(reason)
        return value

    return AfterValidator(refuse)


_ELSEWHERE = "no integrations: `tracking` in the recipe sends metrics to MLflow or W&B, with the deployment's own keys"
_NO_FORMAT = "answers are sampled as the model is: leave response_format out, and give a reward to those of that form"
_NO_EFFORT = "no model reasons more or less when it is told to: leave reasoning_effort out"


class Hyperparameters(Body):
    """`auto`, and what is left out, is the recipe's default. `batch_size`: rows of a step. `learning_rate_multiplier`:
    of the method's default.
    """

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class DpoHyperparameters(Hyperparameters):
    beta: Auto | Annotated[float, Field(gt=0, le=100)] = "auto"


class ReinforcementHyperparameters(Hyperparameters):
    """`batch_size`: prompts of a step. `compute_multiplier`: of the answers to a prompt, eight. `eval_interval`: steps.
    `eval_samples`: held-out rows that an evaluation has answered.
    """

    compute_multiplier: Auto | Annotated[float, Field(ge=0.25, le=128)] = "auto"
    eval_interval: Auto | Annotated[int, Field(ge=1)] = "auto"
    eval_samples: Auto | Annotated[int, Field(ge=1)] = "auto"
    reasoning_effort: Annotated[
        Literal["default", "low", "medium", "high"] | None,
        AfterValidator(lambda effort: None if effort == "default" else effort),
        _refused(_NO_EFFORT),
    ] = None


class Supervised(Body):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Body):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Reinforcement(Body):
    grader: GraderSpec
    response_format: Annotated[SmallObject | None, _refused(_NO_FORMAT)] = None
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class FineTuningMethod(Body):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def _has_a_grader(self) -> Self:
        if self.type == "reinforcement" and self.reinforcement is None:
            raise RequestError("reinforcement has a grader: {type: string_check or text_similarity, ...}")
        return self


class FineTuningRequest(Body):
    """POST /v1/fine_tuning/jobs."""

    model: str = Field(min_length=1, max_length=256, description="a base, or an adapter to go on from, as `name@3`")
    training_file: str = Field(max_length=64, description="an uploaded file of the purpose `fine-tune`")
    validation_file: str | None = Field(default=None, max_length=64, description="likewise; else a part is held out")
    suffix: str | None = Field(default=None, min_length=1, max_length=96, description="the adapter's name")
    seed: int | None = Field(default=None, ge=0, lt=1 << 31)
    method: FineTuningMethod | None = Field(default=None, description="supervised, unless given")
    hyperparameters: Hyperparameters | None = Field(default=None, description="OpenAI's older form of the method's")
    metadata: Annotated[JobMetadata, AfterValidator(_short)] = Field(
        default_factory=dict,
        description=f"strings of the caller's; `{RECIPE}` is JSON with other fields of the recipe",
    )
    integrations: Annotated[list[Any] | None, _refused(_ELSEWHERE)] = Field(default=None, description="none")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.method is not None and self.hyperparameters is not None:
            raise RequestError("give hyperparameters in the method, and not beside it too", "hyperparameters")
        return self

    @property
    def chosen(self) -> Hyperparameters:
        """Returns the hyperparameters of the method, wherever the request has them."""
        of_method: Supervised | Dpo | Reinforcement | None = None
        if self.method is not None:
            of_method = getattr(self.method, self.method.type)
        return self.hyperparameters or (Hyperparameters() if of_method is None else of_method.hyperparameters)


# -- answers ----------------------------------------------------------------------------------------------------------


class FineTuningError(Answer):
    code: str
    message: str
    param: str | None


class FineTuningJob(Answer):
    """A job. `trained_tokens` are those that have been learned so far; `fine_tuned_model` can be requested once the
    job has succeeded.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    error: FineTuningError | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    integrations: list[Any]
    metadata: dict[str, str]


class FineTuningJobList(Answer):
    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(Answer):
    """`data` of a step: step, train_loss, total_steps, learning_rate; of an evaluation: step, valid_loss. Of answers
    that were rewarded: step, train_reward_mean, total_steps; step, valid_reward_mean.
    """

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class FineTuningEventList(Answer):
    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class CheckpointMetrics(Answer):
    step: int
    train_loss: float | None = None
    valid_loss: float | None = None


class FineTuningCheckpoint(Answer):
    """A version that was published: no other checkpoint can be asked for by a model's name."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics


class FineTuningCheckpointList(Answer):
    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool
