"""A recipe, `TrainSpec`, and what training jobs are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, StringConstraints, model_validator

from loray.spec.fields import MAX_CONTEXT, Alias, AnyDType, DType, Frozen, Name
from loray.spec.methods import AdapterSpec
from loray.spec.objectives import OBJECTIVES, ObjectiveSpec, RlSpec, SftSpec

# Values of `Evaluation.metric`. Those of retrieval carry the task's name in front: see `retrieval_metric`.
PERPLEXITY, LOSS = "perplexity", "loss"
EXACT_MATCH, LOG_LIKELIHOOD = "exact_match", "log_likelihood"

RetrievalTask = Literal["passkey", "topics"]
ContextLength = Annotated[int, Field(gt=1)]
Depth = Annotated[float, Field(ge=0, le=1)]
# Strings that who submits a job keeps with it; the values of OpenAI's fine-tuning may be JSON.
JobMetadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=16384)]],
    Field(max_length=16),
]
# Why an alias is set although the gate refuses it. The catalog records the reason.
NoGateReason = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]


def retrieval_metric(task: str, metric: str) -> str:
    """`passkey`, EXACT_MATCH → "passkey_exact_match"."""
    return f"{task}_{metric}"


class PerplexitySpec(Frozen):
    """Dense perplexity by LongLoRA's rule: windows of the context length, a new one every `stride` tokens of a
    document, the mean loss over the whole window.
    """

    context_lengths: tuple[ContextLength, ...] = Field(
        default=(), description="empty: the context that was extended, and the adapter's own"
    )
    stride: int = Field(default=256, gt=0)
    max_windows: int | None = Field(
        default=16, gt=0, description="for each context length, evenly spread; None: every window"
    )


class RetrievalSpec(Frozen):
    """Finding a key in long filler: by depth (0: at the beginning, 1: at the end) and length, `samples` prompts each.

    passkey  a five-digit number (Mohtashami & Jaggi, 2023)
    topics   the topic of one conversation of many (LongChat's LongEval)
    """

    task: RetrievalTask = "passkey"
    context_lengths: tuple[ContextLength, ...] = Field(min_length=1)
    depths: tuple[Depth, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    samples: int = Field(default=4, gt=0)
    seed: int = Field(default=0, ge=0)


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


class DataSource(Frozen):
    """`path`: a file, a glob, a folder, or a data set that Hugging Face's `datasets` saved; here or on s3://. Or a data
    set of its hub, hf://org/name[/configuration][@revision][:split].

    `weight`: how often an epoch has the rows of this source: 2 has each twice, 0.25 a quarter, another one each epoch.
    """

    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)


SourcePath = Annotated[str, Field(min_length=1)]
Paths = Annotated[tuple[SourcePath, ...], Field(min_length=1)]
Mixture = Annotated[tuple[SourcePath | DataSource, ...], Field(min_length=1)]
DataFormat = Literal[
    "chat",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "text",
    "preference",
    "openai_preference",
    "unpaired_preference",
]
# Of each row of a format, which is known by them.
FORMAT_COLUMNS: Mapping[DataFormat, tuple[str, ...]] = {
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "openai_preference": ("input", "preferred_output", "non_preferred_output"),
    "unpaired_preference": ("prompt", "completion", "label"),
}


class ColumnNames(Frozen):
    """Columns of files have these names where they are not called as here: `{prompt: question, completion: answer}`.

    A file that has no column of such a name is read by the name here.
    """

    messages: str | None = None
    conversations: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    text: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    preferred_output: str | None = None
    non_preferred_output: str | None = None
    label: str | None = None
    system: str | None = None
    tools: str | None = None

    def of(self, name: str) -> str:
        """The files' name of a column."""
        named: str | None = getattr(self, name, None)
        return name if named is None else named


class DataSpec(Frozen):
    """JSONL, JSON arrays, CSV, TSV, Parquet or saved data sets. `train` and `eval` are one source (see DataSource) or
    several.

    format   of the rows, by their columns: chat (`messages`), sharegpt (`conversations`), prompt_completion (`prompt`,
             `completion`), alpaca (`instruction`, `input`, `output`), text (`text`), and of pairs preference (`prompt`,
             `chosen`, `rejected`) or openai_preference (`input`, `preferred_output`, `non_preferred_output`), and of
             answers without pairs unpaired_preference (`prompt`, `completion`, `label`).
             All but texts go through the base's chat template, as requests do. auto: the columns
             say it, and without a template strings are learned as they stand. raw: the same, also on a base that has a
             template
    columns  other names of these columns
    system   the system prompt of rows that have none
    """

    train: SourcePath | Mixture
    eval: SourcePath | Paths | None = None
    eval_fraction: float = Field(default=0.05, ge=0, lt=1, description="held out of `train` where `eval` is not given")
    format: Literal["auto", "raw", DataFormat] = "auto"
    columns: ColumnNames | None = None
    system: str | None = Field(default=None, min_length=1)
    max_length: int | None = Field(
        default=None, gt=1, description="None: LongLoRA's context; else 1024 tokens, or the base's window if shorter"
    )
    max_rows: int | None = Field(default=None, gt=0, description="the first ones of every source of `train`")

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        return _sources(self.train)

    @property
    def eval_sources(self) -> tuple[DataSource, ...]:
        """Empty where rows are held out of `train`."""
        return () if self.eval is None else _sources(self.eval)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all sources."""
        return tuple(source.path for source in (*self.train_sources, *self.eval_sources))

    def with_paths(self, change: Callable[[str], str]) -> Self:
        """The same data with every path changed."""
        ours = {field: getattr(self, field) for field in ("train", "eval")}
        return self.model_copy(update={field: _changed(sources, change) for field, sources in ours.items()})


def _sources(given: str | tuple[str | DataSource, ...]) -> tuple[DataSource, ...]:
    several = (given,) if isinstance(given, str) else given
    return tuple(DataSource(path=source) if isinstance(source, str) else source for source in several)


def _changed(
    given: str | DataSource | tuple[str | DataSource, ...] | None, change: Callable[[str], str]
) -> str | DataSource | tuple[object, ...] | None:
    match given:
        case None:
            return None
        case str():
            return change(given)
        case DataSource():
            return given.model_copy(update={"path": change(given.path)})
        case _:
            return tuple(_changed(source, change) for source in given)


class BatchSpec(Frozen):
    """Exactly one of `rows` and `tokens` (a budget, padding included) says how large a micro-batch is. A row of
    an objective that compares answers is two sequences.

    accumulation  micro-batches of a step. auto: `rows` are those that a worker takes in a step, in as few micro-batches
                  as fit its memory
    order  shuffled, length_grouped: a document or a window of it is a row. packed: whole documents fill a row, each
           with positions and attention of its own. concat, of texts: they are joined by the end-of-sequence token and
           cut at the longest row, with one attention and running positions, as LongLoRA's paper does. None: concat
           for LongLoRA on texts, else shuffled
    """

    rows: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    accumulation: Annotated[int, Field(gt=0)] | Literal["auto"] = 1
    order: Literal["shuffled", "length_grouped", "packed", "concat"] | None = None

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.rows is None) == (self.tokens is None):
            raise ValueError("give exactly one of rows and tokens")
        if self.accumulation == "auto" and self.rows is None:
            raise ValueError("accumulation: auto cuts the rows of a step: give rows instead of tokens")
        return self

    @property
    def chosen_accumulation(self) -> int:
        """The micro-batches of a step, of a recipe whose driver has chosen them."""
        assert self.accumulation != "auto", "the driver chooses the micro-batches"
        return self.accumulation


_BLOCK, _OUTER_BLOCK = 64, 256  # bitsandbytes' numbers of elements with a common scale, and of such scales


class QuantizationSpec(Frozen):
    """QLoRA (Dettmers et al., 2023) under bitsandbytes' names: linear layers of the decoder in 4 bits, products in the
    recipe's dtype. Embeddings, norms, the output head and the adapter keep that dtype.
    """

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True

    @property
    def bytes_per_element(self) -> float:
        """Four bits, and a scale a block: in fp32, or in 8 bits with an fp32 scale an outer block."""
        scale = 1 + 4 / _OUTER_BLOCK if self.bnb_4bit_use_double_quant else 4
        return 0.5 + scale / _BLOCK


TrackerName = Literal["tensorboard", "mlflow", "wandb"]
StrategyName = Literal["ddp", "zero2", "zero3", "fsdp2"]
# name, name@alias or name@version, of the tenant itself or as tenant/name
_ADAPTER = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}(@[A-Za-z0-9_-]{1,48})?$"


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
    """The division of the work among `num_workers`: sequence × data parallel.

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
    metadata: JobMetadata | None = Field(default=None, description="strings of yours, kept with job and version")
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

    @property
    def chosen_dtype(self) -> DType:
        """The dtype, of a recipe whose driver has chosen it for the workers' device."""
        assert self.dtype != "auto", "the driver chooses the dtype"
        return self.dtype

    @property
    def is_long_context(self) -> bool:
        """Rows are as long as the context unless the recipe says otherwise."""
        return self.rope_scaling is not None or self.adapter.usual_attention == "s2"

    @property
    def is_paired(self) -> bool:
        """A row has two sequences of a batch."""
        return self.objective.sequences_per_row > 1

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of all workers in one optimizer step. It does not depend on how many workers are left."""
        return self.batch.chosen_accumulation * (self.num_workers // self.parallel.sequence)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for mistake in self._mistakes():
            raise ValueError(mistake)
        return self

    def _mistakes(self) -> Iterator[str]:
        """Yields why fields do not go together."""
        if (self.max_steps is None) == (self.num_epochs is None):
            yield "give exactly one of max_steps and num_epochs"
        if self.early_stopping is not None and self.evaluation.interval_steps is None:
            yield "early_stopping ends a run by its evaluations: set evaluation.interval_steps"
        if self.dtype == "float16":
            yield "float16 needs loss scaling, which loray does not do: train in bfloat16 or float32"
        sequence = self.parallel.sequence
        for name, number in (("num_workers", self.num_workers), ("min_workers", self.min_workers or sequence)):
            if number % sequence:
                yield f"parallel.sequence is {sequence}, which does not divide {name} ({number})"
        if self.min_workers is not None and self.min_workers > self.num_workers:
            yield f"min_workers ({self.min_workers}) is more than num_workers ({self.num_workers})"
        if self.optimizer.loraplus_lr_ratio is not None and not self.adapter.trains_b:
            yield f"optimizer.loraplus_lr_ratio is for LoRA's B, which {self.adapter.method} does not train"
        if self.optimizer.vera_d_lr_ratio is not None and self.adapter.method != "vera":
            yield "optimizer.vera_d_lr_ratio is for VeRA's d, which no other method trains"
        if self.parallel.strategy != "ddp":
            if self.quantization is not None:
                yield f"a quantized base is whole on every worker, and {self.parallel.strategy} takes it apart: use ddp"
            if self.adapter.held_whole is not None:
                yield f"{self.adapter.held_whole}, which {self.parallel.strategy} does not hold: use ddp"
        if self.adapter.is_invoked:
            yield from self._mistakes_of_invocations()
        if isinstance(self.objective, RlSpec):
            yield from self._mistakes_of_rollouts()
        yield from self._mistakes_of_rows()

    def _mistakes_of_invocations(self) -> Iterator[str]:
        if self.batch.order == "concat":
            yield "batch.order concat joins texts, of which each has its own invocation: leave it out, or take packed"
        if self.rope_scaling is not None:
            yield "aLoRA leaves tokens before its invocation to the base, whose RoPE rope_scaling changes: leave it out"
        if self.evaluation.perplexity is not None or self.evaluation.retrieval:
            yield (
                "evaluation.perplexity and evaluation.retrieval measure texts without an invocation, where aLoRA is "
                "off: leave them out"
            )

    def _mistakes_of_rollouts(self) -> Iterator[str]:
        of_this, evaluation = f"objective.type {self.objective.type}", self.evaluation
        if self.batch.order in ("packed", "concat"):
            yield f"batch.order {self.batch.order} joins rows, and {of_this} learns from whole answers: leave it out"
        if self.num_workers > 1 or self.parallel != ParallelSpec():
            yield f"{of_this} trains in one process: leave num_workers and parallel out (parallel.sequence: 1)"
        for name in ("quantization", "rope_scaling", "early_stopping"):
            if getattr(self, name) is not None:
                yield f"{name} is not for {of_this}, whose answers come from the base as it is served: leave it out"
        if self.attention.type != "dense":
            yield f"{of_this} samples with dense attention, and trains with it: set attention.type: dense"
        if self.optimizer.loraplus_lr_ratio is not None or self.optimizer.vera_d_lr_ratio is not None:
            yield f"{of_this} has one learning rate for all matrices: leave loraplus_lr_ratio and vera_d_lr_ratio out"
        if evaluation.perplexity is not None or evaluation.retrieval:
            yield f"{of_this} evaluates by rewards: measure the published version with `loray eval` instead"
        if self.publish.description or self.publish.licence is not None or self.publish.dtype is not None:
            yield f"{of_this} publishes what was sampled, bit for bit: leave publish.description, licence and dtype out"

    def _mistakes_of_rows(self) -> Iterator[str]:
        objective, given = self.objective, self.data.format
        if given not in ("auto", "raw", *objective.formats):
            others = " or ".join(name for name, spec in OBJECTIVES.items() if given in spec.formats)
            yield f"data.format {given} is for objective.type {others}, and this is {objective.type}: change either"
        if objective.compares_answers and self.batch.order in ("packed", "concat"):
            yield (
                f"batch.order {self.batch.order} joins rows, and objective.type {objective.type} compares whole "
                "answers: leave it out"
            )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about values that are valid but probably a mistake."""
        rate, slow = self.optimizer.learning_rate, self.adapter.slow_below
        if slow is not None and rate < slow.rates[self.objective.compares_answers]:
            return (f"optimizer.learning_rate is {rate:g}, {slow.why}",)
        return ()


# -- jobs -------------------------------------------------------------------------------------------------------------

JobStatus = Literal["pending", "running", "succeeded", "failed", "stopped"]
EndStatus = Literal["succeeded", "failed", "stopped"]


def has_ended(status: JobStatus) -> bool:
    return status not in ("pending", "running")


class TrainingGroup(NamedTuple):
    """A group of a Ray cluster's nodes (KubeRay's worker group of this name) on which drivers and workers of jobs run,
    and nothing else. Its nodes offer the two resources below and no CPU, so that no engine fits on them.
    """

    name: str

    @property
    def driver(self) -> dict[str, float]:
        """Resources of a job's driver: one a node, so that a node with a driver is not idle for Ray's autoscaler."""
        return {f"{self.name}_driver": 1.0}

    @property
    def worker(self) -> dict[str, float]:
        """Resources of each of a job's workers, instead of a CPU."""
        return {f"{self.name}_worker": 1.0}

    @property
    def others(self) -> dict[str, str]:
        """Ray's label selector of all nodes outside the group."""
        return {"ray.io/node-group": f"!{self.name}"}
