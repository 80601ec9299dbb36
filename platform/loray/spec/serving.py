"""A deployment: a base model, its replicas, and how their number changes."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from loray.spec.fields import DType, Frozen, Name, NumBytes
from loray.spec.tools import ToolParserName


class AutoscalingSpec(Frozen):
    """Replicas by adapter demand: tokens against measured capacity, and the working set against the pools.

    Names that Ray Serve's own AutoscalingConfig has mean what they mean there.
    """

    min_replicas: int = Field(default=1, gt=0)
    max_replicas: int = Field(default=4, gt=0)
    target_utilization: float = Field(default=0.8, gt=0, le=1, description="of token capacity and of pool bytes")
    window_s: float = Field(default=60.0, gt=0, description="over which demand is measured")
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=120.0, ge=0)
    startup_s: float = Field(
        default=20.0, ge=0, description="from the decision to add a replica until it takes requests, about"
    )
    drain_s: float = Field(
        default=10.0, gt=0, description="in which a queue that the running replicas leave by then is worked off"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas must be at least min_replicas")
        return self


class ServeSpec(Frozen):
    """One deployment: a base model, its replicas, and what each may use."""

    base: Name = "smollm2"
    dtype: DType = "bfloat16"
    device: str = "cpu"
    tensor_parallel_size: int = Field(default=1, gt=0, description="ranks that share one model, in each replica")
    num_replicas: int = Field(default=1, gt=0, description="fixed; the first number where `autoscaling` is given")
    autoscaling: AutoscalingSpec | None = None
    num_gateways: int = Field(default=1, gt=0, description="processes that speak HTTP, each on one core at most")
    pool_bytes: NumBytes = 512 << 20
    host_bytes: NumBytes = 1 << 30
    block_tokens: int = Field(default=16, gt=0)
    max_model_len: int | None = Field(default=None, gt=1, description="None: each model's own context length")
    max_num_seqs: int = Field(default=32, gt=0, description="requests that run at once")
    max_num_batched_tokens: int = Field(default=512, gt=0, description="tokens of one step, at most")
    itl_slo_ms: float | None = Field(
        default=None, gt=0, description="target between two tokens of a stream; None: 60 on a CPU, 50 on a GPU"
    )
    graph_record_s: float | None = Field(
        default=None, ge=0, description="for recording decode steps before the start; None: 60 on a GPU; CPUs have none"
    )
    graph_bytes: NumBytes = Field(default=1 << 30, description="of a GPU's memory that recorded steps may take")
    enable_prefix_caching: bool = Field(default=True, description="keep KV blocks of prompts for those that share them")
    max_queued: int = Field(default=512, gt=0, description="other requests that wait; more are refused with 429")
    max_loading: int = Field(
        default=512, gt=0, description="requests that wait for their adapters to be loaded; more are refused with 429"
    )
    load_timeout_s: float = Field(
        default=30.0, gt=0, description="for which a request waits for its adapter to be loaded; then it fails (503)"
    )
    max_body_bytes: NumBytes | None = Field(default=None, description="of a request; None: by the longest context")
    ttft_slo_s: float | None = Field(
        default=None, gt=0, description="requests that cannot have their first token in it are refused; None: off"
    )
    request_timeout_s: float | None = Field(
        default=None, gt=0, description="after which a request is cancelled; one may ask for less; None: never"
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
    num_threads: int | None = Field(default=None, gt=0, description="None: as many as the machine has cores")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, gt=0, lt=65536)

    @property
    def itl_slo_s(self) -> float:
        """Seconds; the device's default if `itl_slo_ms` is not given."""
        default = 60.0 if self.device.startswith("cpu") else 50.0
        return (self.itl_slo_ms or default) / 1000

    @property
    def graph_seconds(self) -> float:
        """For recording decode steps; the device's default if `graph_record_s` is not given."""
        default = 0.0 if self.device.startswith("cpu") else 60.0
        return default if self.graph_record_s is None else self.graph_record_s

    @property
    def min_replicas(self) -> int:
        """The number of replicas below which the deployment is degraded."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.min_replicas

    @property
    def max_replicas(self) -> int:
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @model_validator(mode="after")
    def _every_sequence_advances(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs: a running request takes one a step")
        return self
