"""Serving: the spec of a deployment, its bases and their autoscaling, and the figures of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loray.errors import SpecError
from loray.spec.fields import (
    DTYPE_BYTES,
    AnyDType,
    Frozen,
    Name,
    NumBytes,
    ReasoningParserName,
    ToolParserName,
    read_mapping,
)
from loray.spec.generation import Pooling


class AutoscalingSpec(Frozen):
    """Autoscaling by adapter demand: tokens against measured capacity, and the working set against the pools.

    Names that Ray Serve's own AutoscalingConfig has mean what they mean there.
    """

    min_replicas: int = Field(default=1, ge=0, description="0: none while nobody asks")
    max_replicas: int = Field(default=4, gt=0)
    target_utilization: float = Field(default=0.8, gt=0, le=1, description="of token capacity and of pool bytes")
    window_s: float = Field(default=60.0, gt=0, description="over which demand is measured")
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=120.0, ge=0)
    downscale_to_zero_delay_s: float = Field(
        default=600.0, gt=0, description="without a request, after which there is no replica; with a min_replicas of 0"
    )
    startup_s: float = Field(
        default=20.0, ge=0, description="from the decision to add a replica until it takes requests, about"
    )
    drain_s: float = Field(
        default=10.0, gt=0, description="in which a queue that the running replicas leave by then is worked off"
    )
    wait_slo_s: float | None = Field(
        default=2.0,
        ge=0,
        description="that first tokens may wait in a burst, or as long as a prompt takes where that is longer; "
        "None: no replicas for bursts",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


KvCacheDType = Literal["auto", "int8"]

_ENGINE = "engine-"
_CPU_POOL_BYTES = 512 << 20
_SHARED = ("num_gateways", "host", "port", "max_body_bytes")  # fields of ServeSpec that are the whole deployment's


def _is_cpu(given: Mapping[str, Any]) -> bool:
    """The device is a CPU. `given`: fields of a ServeSpec that have been read."""
    return str(given.get("device", "cpu")).startswith("cpu")


class ServeSpec(Frozen):
    """A base model, its replicas, and what each may use. It is a deployment by itself, or one base of a FleetSpec."""

    NOUN: ClassVar[str] = "serve spec"

    base: Name = "smollm2"
    dtype: AnyDType = Field(default="auto", description="of weights and KV cache; auto: what the device serves fast")
    kv_cache_dtype: KvCacheDType = Field(
        default="auto", description="of keys and values; int8: half the memory of 16 bits; auto: `dtype`"
    )
    device: str = "cpu"
    tensor_parallel_size: int = Field(default=1, gt=0, description="ranks that share one model, in each replica")
    num_replicas: int = Field(default=1, gt=0, description="fixed; the first number where `autoscaling` is given")
    autoscaling: AutoscalingSpec | None = None
    num_gateways: int = Field(default=1, gt=0, description="processes that speak HTTP, each on one core at most")
    max_token_lateness: float = Field(
        default=0.07,
        gt=0,
        description="part of the shortest time to a first token by which tokens may be late before a flood waits",
    )
    pool_bytes: NumBytes | None = Field(
        default=None, description="KV cache and adapters; None: 512 MiB on a CPU, on a GPU what its memory leaves"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="share of a GPU that base, steps and pool have where pool_bytes is None"
    )
    host_bytes: NumBytes = 1 << 30
    block_tokens: int = Field(default=16, gt=0)
    max_model_len: int | None = Field(default=None, gt=1, description="None: each model's own context length")
    max_num_batched_tokens: int = Field(
        default_factory=lambda given: 512 if _is_cpu(given) else 8192,
        gt=0,
        description="tokens of one step, at most; by default 512 on a CPU, 8192 on a GPU",
    )
    max_num_seqs: int = Field(
        default_factory=lambda given: min(32 if _is_cpu(given) else 256, given.get("max_num_batched_tokens", 32)),
        gt=0,
        description="requests that run at once; by default 32 on a CPU, 256 on a GPU",
    )
    itl_slo_ms: float | None = Field(
        default=None, gt=0, description="target between two tokens of a stream; None: 60 on a CPU, 50 on a GPU"
    )
    background_slack: float = Field(
        default=0.1,
        ge=0,
        description="part by which requests of a priority from 100 on, and batches, may lengthen the steps of others",
    )
    graph_record_s: float | None = Field(
        default=None, ge=0, description="for recording decode steps before the start; None: 60 on a GPU; CPUs have none"
    )
    graph_bytes: NumBytes = Field(default=1 << 30, description="of a GPU's memory that recorded steps may take")
    enable_prefix_caching: bool = Field(default=True, description="keep KV blocks of prompts for those that share them")
    speculation: Literal["auto", "off"] = Field(
        default="auto", description="guess tokens from prompt and answer where that is faster; never on a GPU yet"
    )
    max_queued: int = Field(default=512, gt=0, description="other requests that wait; more are refused with 429")
    max_loading: int = Field(
        default=512, gt=0, description="requests that wait for their adapters to be loaded; more are refused with 429"
    )
    load_timeout_s: float = Field(
        default=30.0, gt=0, description="for which a request waits for its adapter to be loaded; then it fails (503)"
    )
    warm_start_s: float = Field(
        default=5.0, ge=0, description="for a new replica to load adapters in demand before it takes requests; 0: off"
    )
    max_body_bytes: NumBytes | None = Field(default=None, description="of a request; None: by the longest context")
    ttft_slo_s: float | None = Field(
        default=None, gt=0, description="requests that cannot have their first token in it are refused; None: off"
    )
    cold_start_timeout_s: float = Field(
        default=120.0, gt=0, description="for which a request waits for a replica where there is none; then 503"
    )
    request_timeout_s: float | None = Field(
        default=3600.0, gt=0, description="after which a request is cancelled; one may ask for less; None: never"
    )
    max_resumes: int = Field(
        default=1, ge=0, description="lost replicas after which a begun answer goes on at another one; 0: it fails"
    )
    drain_grace_s: float = Field(
        default=10.0, ge=0, description="for a removed replica's requests to end; then they go on at another one"
    )
    sse_heartbeat_s: float = Field(
        default=15.0, ge=0, description="silence in a stream after which a comment is sent; 0: none"
    )
    tool_parser: ToolParserName | None = Field(
        default=None, description="how the base writes tool calls; None: detected from its tokenizer and template"
    )
    reasoning_parser: ReasoningParserName | None = Field(
        default=None, description="how the base marks what it thinks before it answers; None: by its chat template"
    )
    pooling: Pooling | None = Field(
        default=None, description="what of a text's tokens is its embedding; None: as the base's modules.json says"
    )
    matryoshka: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(), description="the `dimensions` to which embeddings may be cut: those that the base was trained for"
    )
    num_threads: int | None = Field(default=None, gt=0, description="None: as many as the machine has cores")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, gt=0, lt=65536)

    @property
    def fixed_pool_bytes(self) -> int | None:
        """Bytes of a replica's pool; None: what the GPU's memory leaves, which is known when the base is on it."""
        return self.pool_bytes or (_CPU_POOL_BYTES if self.device.startswith("cpu") else None)

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight and of an element of the pool. A dtype that is left to the device has 2, except on a CPU
        without compiled kernels, whose engine knows better.
        """
        return 2 if self.dtype == "auto" else DTYPE_BYTES[self.dtype]

    @property
    def int8_per_element(self) -> int:
        """Keys or values in an element of the pool where they are int8; 0: they are of the pool's dtype."""
        return self.element_bytes if self.kv_cache_dtype == "int8" else 0

    @property
    def itl_slo_s(self) -> float:
        """The target between two tokens in seconds; the device's default if `itl_slo_ms` is not given."""
        default = 60.0 if self.device.startswith("cpu") else 50.0
        return (self.itl_slo_ms or default) / 1000

    @property
    def graph_seconds(self) -> float:
        """Seconds for capturing decode steps; the device's default if `graph_record_s` is not given."""
        default = 0.0 if self.device.startswith("cpu") else 60.0
        return default if self.graph_record_s is None else self.graph_record_s

    @property
    def min_replicas(self) -> int:
        """The number of replicas below which the deployment is degraded."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.min_replicas

    @property
    def max_replicas(self) -> int:
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def for_replicas(self) -> ServeSpec:
        """The spec without what is the whole deployment's: a replica does not depend on it, nor on other bases."""
        return self.model_copy(update={name: ServeSpec.model_fields[name].default for name in _SHARED})

    @field_validator("kv_cache_dtype", mode="before")
    @classmethod
    def _not_fp8(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("fp8"):
            raise ValueError(f"{value} is not supported; int8 takes as much memory, and has more digits")
        return value

    @model_validator(mode="after")
    def _every_sequence_advances(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs: a running request takes one a step")
        return self


APPLICATION, GATEWAY = "loray", "gateway"  # on Ray Serve: the application of gateways and engines, and its gateways
ACTOR_NAMESPACE = "loray"  # of Ray's, for actors with names that other processes ask


def trainer_actor(base: str) -> str:
    """Name the actor that trains adapters of a base."""
    return f"loray-trainer-{base}"


def engine_of(base: str) -> str:
    """The name of a base's deployment on Ray Serve, which has its replicas."""
    return f"{_ENGINE}{base}"


def is_engine(deployment: str) -> bool:
    """The deployment has some base's replicas."""
    return deployment.startswith(_ENGINE)


class FleetSpec(Frozen):
    """One deployment: its bases, each with replicas of its own, behind the same gateways.

    A mapping with `bases` has for each of them a mapping of ServeSpec's fields. The other fields beside `bases` hold
    for all of them, except where a base has its own; those of the whole deployment (`num_gateways`, `host`, `port`,
    `max_body_bytes`) are allowed only there. A mapping without `bases` is a ServeSpec: a deployment of one base.
    """

    NOUN: ClassVar[str] = "serve spec"

    bases: tuple[ServeSpec, ...] = Field(min_length=1)

    @classmethod
    def of(cls, *bases: ServeSpec) -> Self:
        return cls(bases=bases)

    @classmethod
    def parse(cls, data: Any, *, source: str) -> Self:
        """`data` as a deployment, as `Frozen.parse` does it. Errors of a base name it."""
        if not isinstance(data, Mapping) or "bases" not in data:
            return cls.of(ServeSpec.parse(data, source=source))
        shared = {name: value for name, value in data.items() if name != "bases"}
        unknown = sorted(str(name) for name in shared.keys() - ServeSpec.model_fields.keys())
        if unknown:
            known = ", ".join(name for name in ServeSpec.model_fields if name != "base")
            raise SpecError(f"{source} has unknown fields beside `bases`: {', '.join(unknown)}; known fields: {known}")
        if "base" in shared:
            raise SpecError(f"{source} has both `base` and `bases`; move the base into `bases`")
        entries = data["bases"]
        if not isinstance(entries, list | tuple) or not entries:
            raise SpecError(f"{source}: `bases` must be a list of at least one mapping with the field `base`")
        return super().parse({"bases": [_base(shared, e, i, source) for i, e in enumerate(entries)]}, source=source)

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        return cls.parse(read_mapping(path), source=str(path))

    def to_args(self) -> dict[str, Any]:
        """JSON that `parse` reads."""
        if len(self.bases) == 1:
            return self.bases[0].model_dump(mode="json")
        shared = {name: getattr(self.bases[0], name) for name in _SHARED}
        return shared | {"bases": [spec.model_dump(mode="json", exclude=set(_SHARED)) for spec in self.bases]}

    def at(self, host: str, port: int) -> Self:
        """The same deployment at another address."""
        return self.of(*(spec.model_copy(update={"host": host, "port": port}) for spec in self.bases))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.base for spec in self.bases)

    @property
    def fields_set(self) -> set[str]:
        """The fields of the whole deployment that were given."""
        return self.bases[0].model_fields_set & set(_SHARED)

    @property
    def num_gateways(self) -> int:
        return self.bases[0].num_gateways

    @property
    def host(self) -> str:
        return self.bases[0].host

    @property
    def port(self) -> int:
        return self.bases[0].port

    @model_validator(mode="after")
    def _one_deployment(self) -> Self:
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"the same base twice: {', '.join(twice)}; give each base once")
        if len({tuple(getattr(spec, name) for name in _SHARED) for spec in self.bases}) > 1:
            raise ValueError(f"{', '.join(_SHARED)} must be the same for all bases")
        return self


def _base(shared: Mapping[str, Any], entry: Any, index: int, source: str) -> ServeSpec:
    """One of `bases`: its own fields over the shared ones. Sections are merged by field."""
    if not isinstance(entry, Mapping) or "base" not in entry:
        raise SpecError(f"{source}: bases.{index} must be a mapping with the field `base`, the name of a base model")
    where = f"{source}: the base {entry['base']}"
    if misplaced := [name for name in _SHARED if name in entry]:
        raise SpecError(f"{where} has {', '.join(misplaced)}, which all bases share; give them beside `bases`")
    fields = dict(shared)
    for name, value in entry.items():
        default = fields.get(name)
        fields[name] = {**default, **value} if isinstance(default, Mapping) and isinstance(value, Mapping) else value
    return ServeSpec.parse(fields, source=where)


class EngineFigures(BaseModel):
    """The state of an engine at one moment, and totals since it started.

    longest_wait_s      of the requests that could run at once and do not yet, but for preempted ones
    num_loading         adapters on their way from the store
    blocks              blocks of the pool, by what they hold: free, kv, cached, layered, flat, run
    host_bytes          host memory that adapters and prefixes take
    num_pool_hits       requests whose adapter was in the pool when they came; num_host_hits: on the host; num_misses:
                        neither
    num_loads           loads that have started; num_loaded_bytes: host memory of the complete ones
    num_evictions       adapters evicted from the pool; num_host_evictions: from host memory
    num_aborted         requests refused because their first token would have come too late
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    num_running: int = 0
    num_waiting: int = 0
    longest_wait_s: float = 0.0
    num_loading: int = 0
    blocks: dict[str, int] = {}
    host_bytes: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    num_aborted: int = 0
    num_loads: int = 0
    num_failed_loads: int = 0
    num_evictions: int = 0
    num_host_evictions: int = 0
    num_pool_hits: int = 0
    num_host_hits: int = 0
    num_misses: int = 0
    num_loaded_bytes: int = 0
    max_adapters_in_step: int = 0

    @property
    def is_idle(self) -> bool:
        """There is no request."""
        return self.num_running + self.num_waiting == 0
