"""Profiles of what a replica's work costs: seconds of steps and loads, bytes of the pool, all as measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loray.errors import SpecError

Number = TypeVar("Number", float, NDArray[Any])
_Seconds = Annotated[float, Field(ge=0)]
_Factor = Annotated[float, Field(gt=0)]


class Overhead(NamedTuple):
    """Seconds of one request beside its loads and steps."""

    before: _Seconds = 0.0  # connections and gateway, until the router chooses
    way: _Seconds = 0.0  # to its replica and back
    stall: _Seconds = 0.0  # in which its replica computes nothing, for nobody


class Profile(BaseModel):
    """The costs of one base on one kind of replica.

    A step with d requests that decode and a chunk of n tokens of a prompt from position s on takes

        step_s + d · (decode_s + adapter_s) + n · prompt_s + (query, key) pairs of the chunk · pair_s       seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str = Field(description="where the figures were measured")
    step_s: float = Field(ge=0, description="of a step, whatever is in it")
    decode_s: float = Field(ge=0, description="of one request that decodes, in a step")
    adapter_s: float = Field(ge=0, description="what its adapter adds to that")
    prompt_s: float = Field(gt=0, description="of one token of a prompt")
    pair_s: float = Field(ge=0, description="of one (query, key) pair of a prompt")
    load_s: float = Field(ge=0, description="of a load from the store, whatever its size")
    load_byte_s: float = Field(ge=0, description="of a load from the store, for each byte")
    place_s: float = Field(ge=0, description="of a copy from the host into the pool, whatever its size")
    place_byte_s: float = Field(ge=0, description="of a copy from the host into the pool, for each byte")
    prompt_factors: tuple[_Factor, ...] = Field(
        default=(1.0,),
        min_length=1,
        description="what a prompt takes to compute, by what it takes in the mean; equally likely, one is drawn",
    )
    outside_s: tuple[Overhead, ...] = Field(
        default=(Overhead(),),
        min_length=1,
        description="of a request before its router chooses, on its way, and while its replica stands still; equally "
        "likely, one is drawn",
    )
    end_known_s: float = Field(
        default=0.0, ge=0, description="from a request's last token until the router knows that it has ended"
    )
    contention: float = Field(
        default=0.0,
        ge=0,
        description="share by which each busy replica, and each request outside, slows all others that share its "
        "processors; 0 where each replica has its own",
    )
    processors: int | None = Field(
        default=None,
        gt=0,
        description="that these share: more of them at work than processors have equal parts; null where each has its "
        "own",
    )
    start_s: float = Field(ge=0, description="from the decision to add a replica until it takes requests")
    num_loads: int = Field(default=4, gt=0, description="loads at once")
    kv_token_bytes: float = Field(gt=0)
    adapter_bytes: tuple[int, ...] = Field(min_length=1, description="in the pool; adapters have these sizes in turn")
    pool_bytes: float = Field(gt=0)
    host_bytes: float = Field(gt=0)
    context_length: int = Field(gt=1, description="tokens; longer requests are cut")
    max_num_seqs: int = Field(gt=0)
    max_num_batched_tokens: int = Field(gt=0)
    max_queued: int = Field(gt=0)
    itl_slo_s: float = Field(gt=0)

    def prompt_seconds(self, num_tokens: int) -> float:
        """Return the seconds of a whole prompt, without the fixed cost of its steps."""
        return num_tokens * self.prompt_s + 0.5 * num_tokens * (num_tokens + 1) * self.pair_s

    def load_seconds(self, nbytes: float) -> float:
        return self.load_s + nbytes * self.load_byte_s

    def place_seconds(self, nbytes: float) -> float:
        return self.place_s + nbytes * self.place_byte_s

    def work_seconds(self, num_prompt_tokens: Number, num_output_tokens: Number) -> Number:
        """Return a busy replica's seconds for one request: its prompt and its share of decode steps of half a batch.
        Arrays have one element a request.
        """
        each = self.step_s / (0.5 * self.max_num_seqs) + self.decode_s + self.adapter_s
        prompt = num_prompt_tokens * (self.prompt_s + 0.5 * num_prompt_tokens * self.pair_s)
        return prompt + num_output_tokens * each


def load_profile(path: Path) -> Profile:
    """Read a profile from a JSON file. Raises SpecError, which says what is wrong in it."""
    try:
        return Profile.model_validate_json(path.read_bytes())
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SpecError(f"{path} is not a profile: {where}: {first['msg']}") from None


_MB = 1e6
# Rows of rank 8, 16, 32 and 64 on q, k, v and o.
_RANKS = (1_840_000, 3_680_000, 7_360_000, 14_720_000)

SMOLLM2_TWO_CORES = Profile(
    name="SmolLM2-135M in bf16, two cores of an AMD EPYC",
    # One stream: 12.0 ms a token; 34 ms a decode step with 32 rows; a prompt of 2,048 tokens at 1,250 tokens/s, one of
    # 8,000 in 12.5 s; LoRA's part of a step with 32 adapters at 1.09 of its bytes by the bandwidth. A first token from
    # S3 less a warm one: 17.9 ms at rank 8, 55.0 at rank 64; from host memory (decision 6): 0.6 and 3 ms.
    source="docs/benchmarks/serving.md; docs/decisions/0006-cold-starts.md; start_s is assumed",
    step_s=0.0113,
    decode_s=0.00071,
    adapter_s=0.0002,
    prompt_s=5.4e-4,
    pair_s=2.56e-7,
    load_s=0.0126,
    load_byte_s=0.00288 / _MB,
    place_s=0.00026,
    place_byte_s=0.000186 / _MB,
    start_s=20.0,
    kv_token_bytes=23_040,
    adapter_bytes=_RANKS,
    pool_bytes=512 << 20,
    host_bytes=1 << 30,
    context_length=8192,
    max_num_seqs=32,
    max_num_batched_tokens=512,
    max_queued=512,
    itl_slo_s=0.06,
)
