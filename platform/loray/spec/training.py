"""A recipe: the input of `loray train`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from loray.spec.evaluation import NoGateReason, PerplexitySpec, RetrievalSpec
from loray.spec.fields import Alias, DType, Frozen, Name

LinearModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION_MODULES: tuple[LinearModule, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES: tuple[LinearModule, ...] = ("gate_proj", "up_proj", "down_proj")
LINEAR_MODULES = ATTENTION_MODULES + MLP_MODULES
# The modules of a layer, those with the same input together.
MODULES_BY_INPUT: tuple[tuple[LinearModule, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
StrategyName = Literal["ddp", "zero2", "zero3", "fsdp2"]

_LEAST_VERA_RATE = 1e-3


class RopeScaling(Frozen):
    """Position interpolation by `factor`: positions divided (linear), base stretched (ntk), or by frequency (yarn)."""

    type: Literal["linear", "ntk", "yarn"] = "linear"
    factor: float = Field(gt=1)


class LongContext(Frozen):
    """What LongLoRA adds to an adapter (Chen et al., ICLR 2024).

    original_context × rope_scaling.factor = the context trained for. `original_context` is the base's own
    window unless given. `group_size` is S2-Attn's G, a quarter of the context unless given.
    """

    rope_scaling: RopeScaling
    original_context: int | None = Field(default=None, gt=0)
    group_size: int | None = Field(default=None, ge=2, multiple_of=2)
    train_embeddings: bool = True
    train_norms: bool = True

    def extended_from(self, window: int) -> int:
        """Tokens of the context before it is extended, on a base with a context of `window` tokens."""
        return self.original_context or window

    def context_length(self, window: int) -> int:
        """Tokens that the adapter is trained for, on a base with a context of `window` tokens."""
        return int(self.extended_from(window) * self.rope_scaling.factor)


class _AdapterSpec(Frozen):
    rank: int = Field(gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[LinearModule, ...] = Field(default=ATTENTION_MODULES, min_length=1)
    long_context: LongContext | None = None


class LoraSpec(_AdapterSpec):
    """LoRA (Hu et al., 2021): h = W x + (alpha/rank) B A x; rsLoRA divides by √rank instead."""

    method: Literal["lora"] = "lora"
    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0)
    use_rslora: bool = False

    @model_validator(mode="after")
    def _no_long_context(self) -> Self:
        if self.method in ("lora", "dora") and self.long_context is not None:
            raise ValueError("long_context makes it LongLoRA: set method: longlora")
        return self


class DoraSpec(LoraSpec):
    """DoRA (Liu et al., 2024): h = m ⊙ (W + (alpha/rank) B A) x / ‖W + (alpha/rank) B A‖, norms over each output's
    inputs; the magnitudes m are trained in fp32 beside A and B, and begin as the norms of W.
    """

    method: Literal["dora"] = "dora"  # type: ignore[assignment]


class LongLoraSpec(LoraSpec):
    """LongLoRA (Chen et al., 2024): S2-Attn while training, LoRA plus embeddings and norms, scaled RoPE."""

    method: Literal["longlora"] = "longlora"  # type: ignore[assignment]
    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=16, gt=0)
    long_context: LongContext


class VeraSpec(_AdapterSpec):
    """VeRA (Kopiczko et al., 2024): h = W x + Λb B Λd A x with one frozen random pair (A, B) for all layers."""

    method: Literal["vera"] = "vera"
    rank: int = Field(default=256, gt=0)
    d_initial: float = 0.1
    projection_prng_key: int = Field(default=0, ge=0)
    save_projection: bool = False


AdapterSpec = Annotated[LoraSpec | DoraSpec | VeraSpec | LongLoraSpec, Field(discriminator="method")]


class DataSpec(Frozen):
    """JSONL or Parquet with columns `messages` (chat), `prompt` and `completion`, or `text`; `auto` looks which."""

    train: str
    eval: str | None = None
    eval_fraction: float = Field(default=0.05, ge=0, lt=1, description="held out of `train` where `eval` is not given")
    format: Literal["auto", "chat", "prompt_completion", "text"] = "auto"
    max_length: int | None = Field(
        default=None, gt=1, description="None: LongLoRA's context; else 1024 tokens, or the base's window if shorter"
    )
    max_rows: int | None = Field(default=None, gt=0)


class BatchSpec(Frozen):
    """Exactly one of `rows` and `tokens` (a budget, padding included) says how large a micro-batch is."""

    rows: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    accumulation: int = Field(default=1, gt=0)
    order: Literal["shuffled", "length_grouped", "packed"] = "shuffled"

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.rows is None) == (self.tokens is None):
            raise ValueError("give exactly one of rows and tokens")
        return self


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


class CheckpointSpec(Frozen):
    interval_steps: int | None = Field(default=None, gt=0, description="None: at evaluations and at the end")
    keep: int = Field(default=2, gt=0)


class PublishSpec(Frozen):
    aliases: tuple[Alias, ...] = ()
    no_gate: NoGateReason | None = Field(
        default=None, description="why LongLoRA's aliases are granted whatever was measured"
    )
    licence: str | None = None
    description: str = ""


class TrainSpec(Frozen):
    """A recipe: one training run, from a base model to a published adapter."""

    name: Name
    base: Name = "smollm2"
    adapter: AdapterSpec
    data: DataSpec
    batch: BatchSpec
    optimizer: OptimizerSpec
    max_steps: int | None = Field(default=None, gt=0)
    num_epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    publish: PublishSpec = PublishSpec()
    max_nonfinite_steps: int = Field(default=10, gt=0, description="skipped steps after which the run stops")
    gradient_checkpointing: bool = False
    dtype: DType = "bfloat16"
    num_workers: int = Field(default=1, gt=0)
    min_workers: int | None = Field(
        default=None, gt=0, description="go on with as few as these where workers are lost; None: with all or none"
    )
    parallel: ParallelSpec = ParallelSpec()
    use_gpu: bool = False
    seed: int = Field(default=0, ge=0)

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
        if sequence > 1 and self.adapter.long_context is None:
            raise ValueError("parallel.sequence splits rows for S2-Attn: it needs adapter.long_context")
        return self

    @model_validator(mode="after")
    def _ratios_are_the_methods(self) -> Self:
        if self.optimizer.loraplus_lr_ratio is not None and self.adapter.method == "vera":
            raise ValueError("optimizer.loraplus_lr_ratio is for LoRA's B, which VeRA does not train")
        if self.optimizer.vera_d_lr_ratio is not None and self.adapter.method != "vera":
            raise ValueError("optimizer.vera_d_lr_ratio is for VeRA's d, which no other method trains")
        return self

    @model_validator(mode="after")
    def _magnitudes_are_whole(self) -> Self:
        if isinstance(self.adapter, DoraSpec) and self.parallel.strategy != "ddp":
            raise ValueError(f"DoRA trains fp32 magnitudes, which {self.parallel.strategy} does not hold: use ddp")
        return self

    @property
    def doubts(self) -> tuple[str, ...]:
        """Warnings about values that are valid but probably a mistake."""
        rate = self.optimizer.learning_rate
        if self.adapter.method == "vera" and rate < _LEAST_VERA_RATE:
            return (
                f"optimizer.learning_rate is {rate:g}, as for LoRA; VeRA's two vectors a module want about ten times "
                "that (the paper: 4e-3 to 2e-2)",
            )
        return ()
