"""Everything that crosses a boundary: recipes, manifests, references, sampling parameters, serve specs.

All models are frozen, and an unknown field is an error. Sizes are bytes, lengths are tokens, times are seconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from loray.errors import SpecError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,47}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Method = Literal["lora", "vera", "longlora"]
DType = Literal["bfloat16", "float16", "float32"]

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*$")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_size(value: object) -> object:
    """`"512MiB"` → 536870912; numbers pass through. Raises ValueError on an unknown unit."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with KiB, MiB, GiB, KB, MB or GB")
    return int(float(match[1]) * _UNITS[match[2] or "B"])


NumBytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def parse(cls, data: Any, *, source: str) -> Self:
        """Validate `data`; on failure raise SpecError with one line per wrong field, naming `source`."""
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            lines = []
            for err in e.errors():
                where = ".".join(str(part) for part in err["loc"]) or "(top level)"
                known = ""
                if err["type"] == "extra_forbidden" and len(err["loc"]) == 1:
                    known = f"; known fields: {', '.join(cls.model_fields)}"
                lines.append(f"  {where}: {err['msg']}{known}")
            raise SpecError(f"{source} is not a valid {cls.__name__}:\n" + "\n".join(lines)) from e

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as e:
            raise SpecError(f"cannot read {path}: {e.strerror or e}") from e
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise SpecError(f"{path} is not valid YAML: {e}") from e
        if not isinstance(data, dict):
            raise SpecError(f"{path} must hold a mapping of fields, not {type(data).__name__}")
        return cls.parse(data, source=str(path))


# -- models -----------------------------------------------------------------------------------------------------------


class RopeParameters(Frozen):
    """RoPE as transformers names it (`config.rope_parameters`); the part of a checkpoint that LongLoRA changes."""

    rope_type: Literal["default", "linear", "yarn", "llama3"] = "default"
    rope_theta: float = Field(gt=0)
    factor: float | None = Field(default=None, ge=1)
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needs: dict[str, tuple[str, ...]] = {
            "linear": ("factor",),
            "yarn": ("factor", "original_max_position_embeddings"),
            "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        }
        missing = [f for f in needs.get(self.rope_type, ()) if getattr(self, f) is None]
        if missing:
            raise ValueError(f"rope_type {self.rope_type!r} needs {', '.join(missing)}")
        return self

    def to_hf(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


# -- training ---------------------------------------------------------------------------------------------------------

LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LinearModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION_MODULES: tuple[LinearModule, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


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
        if self.method == "lora" and self.long_context is not None:
            raise ValueError("long_context makes it LongLoRA: set method: longlora")
        return self


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


AdapterSpec = Annotated[LoraSpec | VeraSpec | LongLoraSpec, Field(discriminator="method")]


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
    """AdamW. Embeddings and norms are never decayed."""

    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    max_grad_norm: float | None = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self


class EvaluationSpec(Frozen):
    interval_steps: int | None = Field(default=None, gt=0, description="None: only before and after training")
    max_rows: int = Field(default=128, gt=0)
    keep_best: bool = Field(default=True, description="publish the checkpoint with the lowest evaluation loss")


class CheckpointSpec(Frozen):
    interval_steps: int | None = Field(default=None, gt=0, description="None: at evaluations and at the end")
    keep: int = Field(default=2, gt=0)


class PublishSpec(Frozen):
    aliases: tuple[Alias, ...] = ()
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
    use_gpu: bool = False
    seed: int = Field(default=0, ge=0)

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


# -- published adapters -----------------------------------------------------------------------------------------------


class Evaluation(Frozen):
    """One measured figure, for instance metric="loss", dataset="held-out", context_length=1024."""

    metric: str
    value: float
    dataset: str
    subject: Literal["adapter", "base", "base_scaled"] = "adapter"
    context_length: int | None = None


class Projection(Frozen):
    """VeRA's shared pair: a function of (key, rank, max_in, max_out), pinned by the SHA-256 of its fp32 bytes."""

    key: int
    rank: int
    max_in: int
    max_out: int
    sha256: Sha256


class AdapterManifest(Frozen):
    """`loray.json` of a published adapter. Its digest is the adapter's identity."""

    FILE: ClassVar[str] = "loray.json"

    format: Literal[1] = 1
    method: Method
    base: str
    base_fingerprint: Sha256
    rank: int
    target_modules: tuple[str, ...]
    num_parameters: int
    nbytes: int
    context_length: int
    rope_parameters: RopeParameters | None = None
    projection: Projection | None = None
    files: dict[str, Sha256]
    recipe: TrainSpec | None = None
    job_id: str | None = None
    data_fingerprint: Sha256 | None = None
    evaluations: tuple[Evaluation, ...] = ()
    licence: str | None = None
    description: str = ""
    created_at: str = Field(description="UTC, ISO 8601")


class AdapterRef(Frozen):
    """One immutable version, as serving knows it. `digest` is the manifest's; `name` and `version` are for people."""

    digest: Sha256
    name: str
    version: int
    method: Method
    base_fingerprint: Sha256
    context_length: int
    nbytes: int

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


# -- serving ----------------------------------------------------------------------------------------------------------


class SamplingParams(Frozen):
    """Names and meanings are vLLM's. `temperature=0` is greedy."""

    max_tokens: int = Field(default=16, gt=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0: off")
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = None
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(default=(), max_length=16)
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20, description="top alternatives per token; None: off")


class ServeSpec(Frozen):
    """One deployment: a base model, its replicas, and what each may use."""

    base: Name = "smollm2"
    dtype: DType = "bfloat16"
    device: str = "cpu"
    num_replicas: int = Field(default=1, gt=0)
    pool_bytes: NumBytes = 512 << 20
    host_bytes: NumBytes = 1 << 30
    block_tokens: int = Field(default=16, gt=0)
    max_model_len: int | None = Field(default=None, gt=1, description="None: each model's own context length")
    max_num_seqs: int = Field(default=32, gt=0, description="requests that run at once")
    max_num_batched_tokens: int = Field(default=512, gt=0, description="tokens of one step")
    max_queued: int = Field(default=512, gt=0, description="requests that wait; more are refused with 429")
    num_threads: int | None = Field(default=None, gt=0, description="None: as many as the machine has cores")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, gt=0, lt=65536)

    @model_validator(mode="after")
    def _every_sequence_advances(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs: a running request takes one a step")
        return self
