"""Published adapters: their manifest and evaluations, references to their versions, canaries of an alias."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from loray.errors import BaseMismatch
from loray.spec.fields import MAX_CONTEXT, Frozen, Sha256, ToolParserName
from loray.spec.methods import InvocationTokens, Method
from loray.spec.training import TrainSpec

# base_scaled: the base under the adapter's RoPE; parent: the adapter that training went on from
Subject = Literal["adapter", "base", "base_scaled", "parent"]
RopeType = Literal["default", "linear", "yarn", "llama3", "longrope"]

NEVER = sys.maxsize  # from which token on an adapter is active that its prompt does not invoke
EPHEMERAL = "~"  # how names of ephemeral adapters begin, and no name of the catalog
MAX_TEMPLATE_CHARACTERS = 128 << 10
MAX_MANIFEST_BYTES = 256 << 10  # of what is published; manifests in the store may be larger
MAX_DESCRIPTION_CHARACTERS = 4096
MAX_EVALUATIONS = 1024
MAX_RECIPE_BYTES = 224 << 10  # which leaves place for the evaluations of what it trains

_Count = Annotated[int, Field(ge=0, lt=1 << 31)]  # the catalog's integers have 32 bits
_Rotations = Annotated[float, Field(ge=1e-6, le=1e6)]
_Divisor = Annotated[float, Field(ge=1e-3, le=1e6)]


class RopeParameters(Frozen):
    """RoPE as transformers names it (`config.rope_parameters`); the part of a checkpoint that LongLoRA changes.

    Within these bounds every frequency is finite, and so is every angle of MAX_CONTEXT positions.
    """

    rope_type: RopeType = "default"
    rope_theta: float = Field(ge=1, le=1e12)
    factor: float | None = Field(default=None, ge=1, le=4096)
    original_max_position_embeddings: int | None = Field(default=None, ge=1, le=MAX_CONTEXT)
    attention_factor: float | None = Field(default=None, ge=1e-6, le=16)
    beta_fast: _Rotations | None = None
    beta_slow: _Rotations | None = None
    truncate: bool | None = Field(default=None, description="YaRN's bands to whole frequencies; null: true")
    low_freq_factor: _Rotations | None = None
    high_freq_factor: _Rotations | None = None
    short_factor: tuple[_Divisor, ...] | None = Field(default=None, max_length=512, description="of each frequency")
    long_factor: tuple[_Divisor, ...] | None = Field(default=None, max_length=512, description="beyond that context")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needs: dict[str, tuple[str, ...]] = {
            "linear": ("factor",),
            "yarn": ("factor", "original_max_position_embeddings"),
            "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
            "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        }
        missing = [f for f in needs.get(self.rope_type, ()) if getattr(self, f) is None]
        if missing:
            raise ValueError(f"rope_type {self.rope_type!r} needs {', '.join(missing)}")
        if self.rope_type == "yarn" and self.rope_theta == 1:
            raise ValueError("rope_type 'yarn' needs a rope_theta above 1, by whose logarithm it divides")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError("low_freq_factor must be below high_freq_factor")
        return self

    def to_hf(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Evaluation(Frozen):
    """One measured figure, for instance metric="loss", dataset="held-out", context_length=1024.

    Figures of one metric can be compared where everything but `value` and `subject` agrees.
    """

    metric: str
    value: float
    dataset: str
    subject: Subject = "adapter"
    context_length: _Count | None = None
    stride: _Count | None = Field(default=None, description="perplexity: tokens from one window's start to the next's")
    depth: float | None = Field(default=None, description="retrieval: where the key lies; 0 the beginning, 1 the end")
    count: _Count | None = Field(default=None, description="windows or prompts that `value` is the mean of")
    data_sha256: Sha256 | None = Field(default=None, description="of the tokens of the documents")
    measured_by: Literal["key"] | None = Field(
        default=None, description="`key`: a client has reported it; null: loray's, of a job or `loray eval`"
    )


class Projection(Frozen):
    """VeRA's shared pair: a function of (key, rank, max_in, max_out), pinned by the SHA-256 of its fp32 bytes."""

    key: int = Field(ge=-(1 << 63), lt=1 << 63)
    rank: _Count
    max_in: _Count
    max_out: _Count
    sha256: Sha256


class AdapterManifest(Frozen):
    """`loray.json` of a published adapter. Its digest is the adapter's identity."""

    NOUN: ClassVar[str] = "manifest"
    FILE: ClassVar[str] = "loray.json"
    TEMPLATE_FILE: ClassVar[str] = "chat_template.jinja"

    format: Literal[1] = 1
    method: Method
    base: str
    base_fingerprint: Sha256
    rank: int
    target_modules: tuple[str, ...]
    num_parameters: int
    nbytes: int
    context_length: int = Field(ge=1, le=MAX_CONTEXT)
    original_context_length: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CONTEXT,
        description="the context that was extended, where `rope_parameters` are the adapter's own",
    )
    rope_parameters: RopeParameters | None = None
    projection: Projection | None = None
    invocation_tokens: InvocationTokens | None = Field(
        default=None, description="aLoRA: it is active from their last occurrence in a prompt on; None: from the start"
    )
    files: dict[str, Sha256]
    derived_from: Sha256 | None = Field(default=None, description="the adapter that this one was converted from")
    parent: Sha256 | None = Field(default=None, description="the adapter whose training this one goes on from")
    recipe: TrainSpec | None = None
    dtype_reason: str | None = Field(default=None, max_length=256, description="why the recipe's dtype is what it is")
    sweep: str | None = Field(default=None, description="the sweep whose best trial it was, NAME/TIME, and the trial")
    job_id: str | None = None
    data_fingerprint: Sha256 | None = None
    evaluations: tuple[Evaluation, ...] = ()
    licence: str | None = None
    description: str = ""
    tool_parser: ToolParserName | None = Field(default=None, description="how it writes tool calls; None: as its base")
    chat_template: str | None = Field(
        default=None,
        max_length=MAX_TEMPLATE_CHARACTERS,
        description="the text of its chat_template.jinja; None: the base's template",
    )
    created_at: str = Field(description="UTC, ISO 8601")

    @model_validator(mode="after")
    def _is_invoked(self) -> Self:
        if (self.method == "alora") != (self.invocation_tokens is not None):
            raise ValueError("invocation_tokens are an alora adapter's, which has them")
        return self

    @model_validator(mode="after")
    def _template_is_its_file(self) -> Self:
        if self.chat_template is not None and self.files.get(self.TEMPLATE_FILE) != text_sha256(self.chat_template):
            raise ValueError(f"chat_template is not the text of {self.TEMPLATE_FILE}, whose SHA-256 is in files")
        return self

    def ref(self, digest: str, name: str, version: int) -> AdapterRef:
        """The reference that serving uses. `digest` is this manifest's."""
        return AdapterRef(
            digest=digest,
            name=name,
            version=version,
            method=self.method,
            base_fingerprint=self.base_fingerprint,
            context_length=self.context_length,
            nbytes=self.nbytes,
            tool_parser=self.tool_parser,
            chat_template=None if self.chat_template is None else text_sha256(self.chat_template),
            invocation_tokens=self.invocation_tokens,
        )


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A reference to one immutable version. `digest` is the manifest's; `name` and `version` are for people.

    `chat_template` is the SHA-256 of the adapter's own template; the catalog's snapshot has the text. Gateways keep a
    reference to each version of the catalog, so it is small.

    An ephemeral adapter is in no catalog and no store, see `spec.rollouts`. `holders` are names of Ray actors that give
    its files where a node's cache does not have them.
    """

    digest: str
    name: str
    version: int
    method: Method
    base_fingerprint: str
    context_length: int
    nbytes: int
    tool_parser: ToolParserName | None = None
    chat_template: str | None = None
    invocation_tokens: tuple[int, ...] | None = None
    holders: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def is_ephemeral(self) -> bool:
        return self.name.startswith(EPHEMERAL)

    def active_from(self, prompt_ids: Sequence[int]) -> int:
        """Return the number of the token of a prompt from which the adapter is active: where the last occurrence of its
        invocation begins, as in PEFT; 0 without invocation, NEVER where the prompt has none. What is generated later
        does not change it.
        """
        wanted = self.invocation_tokens
        if wanted is None:
            return 0
        starts = range(len(prompt_ids) - len(wanted), -1, -1)
        first = wanted[0]
        return next(
            (i for i in starts if prompt_ids[i] == first and tuple(prompt_ids[i : i + len(wanted)]) == wanted), NEVER
        )

    def check_base(self, name: str, fingerprint: str, of: str | None = None) -> None:
        """Raise BaseMismatch unless the adapter was trained on the base called `name`, which has this fingerprint, or
        on the one whose quantised form that is, which has the fingerprint `of`.
        """
        if self.base_fingerprint not in (fingerprint, of):
            raise BaseMismatch(
                f"adapter {self.label} was trained on another base than {name!r} "
                f"(fingerprints {self.base_fingerprint[:12]} and {fingerprint[:12]})"
            )


class AdapterBytes(NamedTuple):
    """Bytes of an adapter in a replica's pool: `own` are those of its rows, `pair` is (digest, bytes) of the VeRA pair
    that it shares with others.
    """

    own: int
    pair: tuple[str, int] | None = None


# -- canaries ---------------------------------------------------------------------------------------------------------

Percent = Annotated[int, Field(ge=1, le=99)]
CanaryOutcome = Literal["promoted", "moved", "ended", "rolled_back"]


class CanaryBounds(Frozen):
    """Bounds outside of which a canary is ended. Times are compared as ratios of geometric means, which a few requests
    that waited for a load do not move.
    """

    max_error_rate: float | None = Field(default=0.05, ge=0, lt=1, description="failed requests ÷ requests; null: any")
    max_ttft_ratio: float | None = Field(default=2.0, gt=0, description="time to first token ÷ the stable version's")
    max_itl_ratio: float | None = Field(default=2.0, gt=0, description="time between tokens ÷ the stable version's")
    min_requests: int = Field(
        default=50,
        ge=1,
        le=1_000_000,
        description="requests before which times are not compared; the error rate is of so many at least",
    )


class LogMoments(NamedTuple):
    """Number, sum and sum of squares of the logarithms of positive values. Those of several processes add up."""

    num: int = 0
    total: float = 0.0
    squares: float = 0.0

    def plus(self, value: float) -> LogMoments:
        log = math.log(value)
        return LogMoments(self.num + 1, self.total + log, self.squares + log * log)

    def __add__(self, other: LogMoments) -> LogMoments:  # type: ignore[override]
        return LogMoments(self.num + other.num, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """The geometric mean of the values. Needs one at least."""
        return math.exp(self.total / self.num)

    @property
    def variance(self) -> float:
        """The squared standard error of the logarithms' mean; infinite for fewer than two values."""
        if self.num < 2:
            return math.inf
        spread = max(0.0, self.squares - self.total * self.total / self.num)
        return spread / (self.num - 1) / self.num


class VersionCounts(NamedTuple):
    """Counts of one version: requests that were answered or failed, and those that failed; seconds to the first token,
    and between two tokens. What a client did wrong or cancelled is not counted.
    """

    num_requests: int = 0
    num_errors: int = 0
    ttft: LogMoments = LogMoments()
    itl: LogMoments = LogMoments()

    def __add__(self, other: VersionCounts) -> VersionCounts:  # type: ignore[override]
        return VersionCounts(
            self.num_requests + other.num_requests,
            self.num_errors + other.num_errors,
            self.ttft + other.ttft,
            self.itl + other.itl,
        )

    @classmethod
    def of_json(cls, fields: list[Any]) -> VersionCounts:
        num_requests, num_errors, ttft, itl = fields
        return cls(num_requests, num_errors, LogMoments(*ttft), LogMoments(*itl))


class CanaryCounts(NamedTuple):
    """Counts of the requests that an alias divided: those of its stable version, and of the canary."""

    stable: VersionCounts = VersionCounts()
    canary: VersionCounts = VersionCounts()

    def __add__(self, other: CanaryCounts) -> CanaryCounts:  # type: ignore[override]
        return CanaryCounts(self.stable + other.stable, self.canary + other.canary)

    @classmethod
    def of_json(cls, fields: list[Any]) -> CanaryCounts:
        return cls(*map(VersionCounts.of_json, fields))


@dataclass(frozen=True, slots=True)
class CanaryState:
    """A canary of `alias` beside its version `stable`. `outcome` None: it runs; `reason` is why its bounds ended it."""

    id: int
    alias: str
    stable: int
    version: int
    percent: int
    bounds: CanaryBounds
    counts: CanaryCounts
    created_at: datetime
    ended_at: datetime | None = None
    outcome: CanaryOutcome | None = None
    reason: str | None = None
