"""A recipe: the input of `loray train`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from loray.spec.evaluation import NoGateReason, PerplexitySpec, RetrievalSpec
from loray.spec.fields import Alias, AnyDType, DType, Frozen, Name
from loray.spec.training.context import AttentionSpec, RopeScaling
from loray.spec.training.data import BatchSpec, DataSpec
from loray.spec.training.methods import AdapterSpec, DoraSpec, LongLoraSpec
from loray.spec.training.objective import DpoSpec, ObjectiveSpec, SftSpec
from loray.spec.training.older import upgraded
from loray.spec.training.quantization import QuantizationSpec

TrackerName = Literal["tensorboard", "mlflow", "wandb"]
StrategyName = Literal["ddp", "zero2", "zero3", "fsdp2"]
# name, name@alias or name@version, of the tenant itself or as tenant/name
_ADAPTER = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}(@[A-Za-z0-9_-]{1,48})?$"

_LEAST_VERA_RATE, _LEAST_VERA_DPO_RATE = 1e-3, 5e-5


class OptimizerSpec(Frozen):
    """AdamW. Embeddings and norms are never decayed.

    `loraplus_lr_ratio` is LoRA+ (Hayou et al., 2024): B learns at that many times the learning rate; 16 in the paper.
    `vera_d_lr_ratio`: VeRA's d learns at that many times the rate of its b, which has the learning rate.
    """

    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    loraplus_lr_ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    vera_d_lr_ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self


class ParallelSpec(Frozen):
    """How `num_workers` share the work: sequence × data parallel.

    `sequence` neighbouring workers hold parts of the same rows, and the others other rows. `strategy` says what of
    parameters, gradients and optimizer states each holds: all of them (ddp), its shard of the last two (zero2), of all
    (zero3, fsdp2).
    """

    sequence: int = Field(default=1, gt=0)
    strategy: StrategyName = "ddp"


class EvaluationSpec(Frozen):
    interval_steps: int | None = Field(default=None, gt=0, description="None: only before and after training")
    max_rows: int = Field(default=128, gt=0)
    keep_best: bool = Field(default=True, description="publish the checkpoint with the lowest evaluation loss")
    perplexity: PerplexitySpec | None = Field(
        default=None, description="of the base, the base under the adapter's RoPE and the adapter, before publishing"
    )
    retrieval: tuple[RetrievalSpec, ...] = Field(default=(), description="likewise")


class EarlyStoppingSpec(Frozen):
    """Ends a run after `patience` evaluations in a row whose held-out loss is not `min_delta` below the best before."""

    patience: int = Field(default=3, gt=0)
    min_delta: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class CheckpointSpec(Frozen):
    """Due by steps or by minutes, whichever comes first, and at the end."""

    interval_steps: int | None = Field(default=None, gt=0, description="None: at evaluations and at the end")
    interval_minutes: float | None = Field(
        default=15, gt=0, allow_inf_nan=False, description="between checkpoints at most; None: steps alone count"
    )
    keep: int = Field(default=2, gt=0)


class PublishSpec(Frozen):
    aliases: tuple[Alias, ...] = ()
    dtype: DType | None = Field(default=None, description="of the published tensors; None: the base checkpoint's")
    no_gate: NoGateReason | None = Field(
        default=None, description="why aliases of a longer context are granted whatever was measured"
    )
    licence: str | None = None
    description: str = ""


def _usual_attention(fields: dict[str, Any]) -> AttentionSpec:
    """The method's. `fields` are those of the recipe before `attention`; one that is not valid is missing."""
    return AttentionSpec(type=getattr(fields.get("adapter"), "usual_attention", "dense"))


class TrainSpec(Frozen):
    """A recipe: one training run, from a base model to a published adapter."""

    NOUN: ClassVar[str] = "recipe"

    name: Name
    base: Name = "smollm2"
    objective: ObjectiveSpec = SftSpec()
    quantization: QuantizationSpec | None = Field(
        default=None, description="of the base while training (QLoRA); None: it stays in `dtype`"
    )
    adapter: AdapterSpec
    attention: AttentionSpec = Field(
        default_factory=_usual_attention, description="while training; S2-Attn for LongLoRA unless given, else dense"
    )
    rope_scaling: RopeScaling | None = Field(default=None, description="None: the base's RoPE as it is")
    init_adapter: str | None = Field(
        default=None, pattern=_ADAPTER, description="NAME@VERSION: go on from this published adapter, under its RoPE"
    )
    data: DataSpec
    batch: BatchSpec
    optimizer: OptimizerSpec
    max_steps: int | None = Field(default=None, gt=0)
    num_epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    evaluation: EvaluationSpec = EvaluationSpec()
    early_stopping: EarlyStoppingSpec | None = Field(default=None, description="None: train to the end")
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: tuple[TrackerName, ...] = Field(
        default=("tensorboard",), description="where metrics go beside the events"
    )
    publish: PublishSpec = PublishSpec()
    max_nonfinite_steps: int = Field(default=10, gt=0, description="skipped steps after which the run stops")
    gradient_checkpointing: bool = False
    dtype: AnyDType = Field(default="auto", description="auto: what the workers' device multiplies fast")
    num_workers: int = Field(default=1, gt=0)
    min_workers: int | None = Field(
        default=None, gt=0, description="go on with as few as these where workers are lost; None: with all or none"
    )
    parallel: ParallelSpec = ParallelSpec()
    use_gpu: bool | Literal["auto"] = Field(default="auto", description="auto: where there is a GPU for each worker")
    seed: int = Field(default=0, ge=0)
    deterministic: bool = Field(
        default=False, description="kernels that give the same bits again on a GPU; on a CPU all do"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_older_records(cls, recipe: Any) -> Any:
        return upgraded(recipe)

    @property
    def chosen_dtype(self) -> DType:
        """The dtype, of a recipe whose driver has chosen it for the workers' device."""
        assert self.dtype != "auto", "the driver chooses the dtype"
        return self.dtype

    @property
    def is_long_context(self) -> bool:
        """Whether rows are as long as the context unless the recipe says otherwise."""
        return self.rope_scaling is not None or isinstance(self.adapter, LongLoraSpec)

    @property
    def is_paired(self) -> bool:
        """Whether a row is a pair of answers, of which a batch has two sequences."""
        return isinstance(self.objective, DpoSpec)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of all workers in one optimizer step. It does not depend on how many workers are left."""
        return self.batch.accumulation * (self.num_workers // self.parallel.sequence)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of max_steps and num_epochs")
        return self

    @model_validator(mode="after")
    def _early_stopping_is_evaluated(self) -> Self:
        if self.early_stopping is not None and self.evaluation.interval_steps is None:
            raise ValueError("early_stopping ends a run by its evaluations: set evaluation.interval_steps")
        return self

    @model_validator(mode="after")
    def _trainable_dtype(self) -> Self:
        if self.dtype == "float16":
            raise ValueError("float16 needs loss scaling, which loray does not do: train in bfloat16 or float32")
        return self

    @model_validator(mode="after")
    def _sequence_groups(self) -> Self:
        sequence = self.parallel.sequence
        for name, number in (("num_workers", self.num_workers), ("min_workers", self.min_workers or sequence)):
            if number % sequence:
                raise ValueError(f"parallel.sequence is {sequence}, which does not divide {name} ({number})")
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers ({self.min_workers}) is more than num_workers ({self.num_workers})")
        return self

    @model_validator(mode="after")
    def _ratios_are_the_methods(self) -> Self:
        if self.optimizer.loraplus_lr_ratio is not None and self.adapter.method == "vera":
            raise ValueError("optimizer.loraplus_lr_ratio is for LoRA's B, which VeRA does not train")
        if self.optimizer.vera_d_lr_ratio is not None and self.adapter.method != "vera":
            raise ValueError("optimizer.vera_d_lr_ratio is for VeRA's d, which no other method trains")
        return self

    @model_validator(mode="after")
    def _quantised_is_whole(self) -> Self:
        if self.quantization is not None and self.parallel.strategy != "ddp":
            raise ValueError(
                f"a quantised base is whole on every worker, and {self.parallel.strategy} takes it apart: use ddp"
            )
        return self

    @model_validator(mode="after")
    def _magnitudes_are_whole(self) -> Self:
        if isinstance(self.adapter, DoraSpec) and self.parallel.strategy != "ddp":
            raise ValueError(f"DoRA trains fp32 magnitudes, which {self.parallel.strategy} does not hold: use ddp")
        return self

    @model_validator(mode="after")
    def _pairs_are_whole(self) -> Self:
        has_pairs = self.data.format == "preference"
        if not self.is_paired:
            if has_pairs:
                raise ValueError("data.format preference is for pairs: set objective: {type: dpo}")
            return self
        if self.data.format != "auto" and not has_pairs:
            raise ValueError(f"data.format {self.data.format} has no pairs, which DPO learns from: leave it out")
        if self.batch.order in ("packed", "concat"):
            raise ValueError(f"batch.order {self.batch.order} joins rows, and DPO compares whole answers: leave it out")
        if self.parallel.sequence > 1:
            raise ValueError("DPO compares whole answers, which parallel.sequence splits: set it to 1")
        if self.adapter.train_embeddings or self.adapter.train_norms:
            raise ValueError(
                "DPO's reference is the base with the adapter off, and trained embeddings and norms stay on: set "
                "adapter.train_embeddings and adapter.train_norms to false"
            )
        if self.init_adapter is not None:
            raise ValueError(
                "DPO's reference is the base, and init_adapter starts elsewhere: merge that adapter into a base "
                "(loray adapters pull --format), add it with loray base add, and train on it"
            )
        return self

    @property
    def doubts(self) -> tuple[str, ...]:
        """Warnings about values that are valid but probably a mistake."""
        rate = self.optimizer.learning_rate
        if self.adapter.method == "vera" and rate < (_LEAST_VERA_DPO_RATE if self.is_paired else _LEAST_VERA_RATE):
            return (
                f"optimizer.learning_rate is {rate:g}, as for LoRA; VeRA's two vectors a module want about ten times "
                "that (the paper: 4e-3 to 2e-2)",
            )
        return ()
