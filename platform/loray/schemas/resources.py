"""Bodies of the catalog's API: adapters, aliases, canaries, jobs, uploads, usage, and problems."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any, Generic, Literal, Self, TypedDict, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator

from loray import errors
from loray.errors import LorayError
from loray.spec import (
    DEFAULT_TENANT,
    MAX_EVALUATIONS,
    AdapterManifest,
    Alias,
    CanaryBounds,
    CanaryOutcome,
    CanaryState,
    Evaluation,
    JobStatus,
    LogMoments,
    Method,
    Name,
    NoGateReason,
    Percent,
    QualifiedName,
    Sha256,
    TagValue,
    TenantName,
    ToolParserName,
    TrainSpec,
    VersionCounts,
    Visibility,
    has_ended,
)

MAX_VERSION = 999_999_999
VersionNumber = Annotated[int, Field(ge=1, le=MAX_VERSION)]

T = TypeVar("T")


def _is_written_out(value: object) -> object:
    """Pydantic would take a number for seconds since 1970, and a large one for milliseconds."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return value
    raise ValueError("must be a time as ISO 8601 has it, 2026-01-31T18:00:00Z")


WRITTEN_OUT = BeforeValidator(_is_written_out)  # of a time
_PRINTED = r"^[^\x00-\x1f]*$"  # PostgreSQL has no zero byte

# -- examples ---------------------------------------------------------------------------------------------------------

_DIGEST, _BASE, _TIME = "9b4f" * 16, "41d0" * 16, "2026-11-24T18:00:00Z"
RECIPE_EXAMPLE: dict[str, Any] = {
    "name": "tone",
    "base": "smollm2",
    "adapter": {"method": "lora", "rank": 16},
    "data": {"train": "s3://bucket/tone.jsonl"},
    "batch": {"rows": 8},
    "optimizer": {"learning_rate": 0.0002},
    "max_steps": 200,
}
_MANIFEST = {"format": 1, "method": "lora", "base": "smollm2", "rank": 16, "files": {}, "recipe": RECIPE_EXAMPLE}
_LOSS = {"metric": "loss", "value": 1.62, "dataset": "held-out", "subject": "adapter", "context_length": 1024}


def example_of(model: type[BaseModel]) -> dict[str, Any]:
    """A body of this model, of the examples of its fields; fields without one are left out."""
    found = {}
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if field.examples:
            found[name] = field.examples[0]
        elif inner is not None:
            found[name] = [example_of(inner)] if get_origin(field.annotation) is tuple else example_of(inner)
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a field, or of the items of its tuple."""
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


# -- adapters ---------------------------------------------------------------------------------------------------------


class Resource(BaseModel):
    """A body that a server sends. Fields that a later server adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Page(Resource, Generic[T]):
    """A page of a list. `next` is the `cursor` of the page behind; null at the end."""

    items: tuple[T, ...]
    next: str | None = Field(default=None, examples=[None])


class ProjectionResource(Resource):
    """VeRA's pair of some of a base's adapters. `canonical`: the first of its shape; the others should share it."""

    key: int = Field(examples=[0])
    rank: int = Field(examples=[256])
    max_in: int = Field(examples=[576])
    max_out: int = Field(examples=[576])
    sha256: str = Field(examples=["9ae1" * 16])
    canonical: bool = Field(examples=[True])


class BaseResource(Resource):
    name: str = Field(examples=["smollm2"])
    fingerprint: str = Field(examples=[_BASE])
    of: str | None = Field(
        default=None,
        examples=[None],
        description="of a quantised base: the fingerprint of the 16-bit base whose adapters are served on it, too",
    )
    projections: tuple[ProjectionResource, ...] = ()


class AdapterResource(Resource):
    """One name. `version` and what follows are of what the bare name means: alias `prod`, else the newest version."""

    name: str = Field(examples=["tone"])
    created_at: datetime = Field(examples=[_TIME])
    version: int = Field(examples=[3])
    digest: str = Field(examples=[_DIGEST])
    method: Method = Field(examples=["lora"])
    base: str | None = Field(
        examples=["smollm2"], description="null where the catalog has no name for the base model's fingerprint"
    )
    base_fingerprint: str = Field(examples=[_BASE])
    context_length: int = Field(examples=[8192])
    nbytes: int = Field(examples=[1843200])
    versions: tuple[int, ...] = Field(examples=[[4, 3, 2, 1]], description="newest first")
    aliases: dict[str, int] = Field(examples=[{"prod": 3, "canary": 4}])
    weights: dict[str, dict[int, int]] = Field(
        examples=[{"prod": {"3": 90, "4": 10}}], default={}, description="percent by version, of aliases with a canary"
    )
    tenant: str = Field(default=DEFAULT_TENANT, examples=["default"])
    visibility: Visibility = Field(default="private", examples=["shared"])
    shared_with: tuple[str, ...] = Field(examples=[["acme"]], default=(), description="shown to its own tenant")


class AdapterFilter(TypedDict, total=False):
    """Says which adapters are listed; all that is given must hold. `base` and `method` are of the version that the bare
    name means; `search` is a part of the name, in any case; `tags`: key → value, None for any.
    """

    tenant: str | None
    base: str | None
    method: str | None
    search: str | None
    tags: Mapping[str, str | None] | None


class AdapterChange(BaseModel):
    """A change of who sees an adapter beside its tenant. `shared_with` goes with `shared`."""

    model_config = ConfigDict(extra="forbid")

    visibility: Visibility
    shared_with: tuple[TenantName, ...] = Field(default=(), max_length=1000)


class AdapterTransfer(BaseModel):
    """The tenant that an adapter is handed to, and its `name` there where that is another one."""

    model_config = ConfigDict(extra="forbid")

    tenant: TenantName
    name: Name | None = None


class TagResource(Resource):
    key: str = Field(examples=["team"])
    value: str = Field(examples=["support"])


class TagChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: TagValue = ""


class ReportedEvaluation(Evaluation):
    """An evaluation that the catalog's columns take."""

    metric: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=_PRINTED)]
    dataset: Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=_PRINTED)]
    depth: Annotated[float, Field(ge=0, le=1)] | None = None
    measured_by: None = None  # the server says it


class EvaluationReport(BaseModel):
    """Evaluations of a version that were measured elsewhere."""

    model_config = ConfigDict(extra="forbid")

    evaluations: Annotated[tuple[ReportedEvaluation, ...], Field(min_length=1, max_length=MAX_EVALUATIONS)]


class QuarantineResource(Resource):
    """Replicas have died on an adapter before a token of it came. `refused_until` null: it is only suspected."""

    deaths: int = Field(examples=[1])
    died_at: datetime = Field(examples=[_TIME])
    refused_until: datetime | None = Field(examples=[None])


class VersionResource(Resource):
    """One immutable version; only `aliases` and `quarantine` change, and `evaluations` grow: the manifest's, then later
    ones.
    """

    name: str = Field(examples=["tone"])
    version: int = Field(examples=[3])
    digest: str = Field(examples=[_DIGEST])
    created_at: datetime = Field(examples=[_TIME])
    aliases: tuple[str, ...] = Field(examples=[["prod"]])
    method: Method = Field(examples=["lora"])
    base_fingerprint: str = Field(examples=[_BASE])
    context_length: int = Field(examples=[8192])
    nbytes: int = Field(examples=[1843200])
    evaluations: tuple[Evaluation, ...] = Field(examples=[[_LOSS]])
    quarantine: QuarantineResource | None = None

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


# The document describes recipes and manifests as any object, because a server may know fields that a client does not.
_ANY_OBJECT = WithJsonSchema({"type": "object", "additionalProperties": True})


class VersionDetail(VersionResource):
    """One version with its manifest: files, recipe, lineage."""

    manifest: Annotated[AdapterManifest, _ANY_OBJECT] = Field(examples=[_MANIFEST])


class AliasResource(Resource):
    """An alias. `revision` is the ETag; it grows with every move and rollback and never comes twice."""

    name: str = Field(examples=["tone"])
    alias: str = Field(examples=["prod"])
    version: int = Field(examples=[3])
    digest: str = Field(examples=[_DIGEST])
    revision: int = Field(examples=[17])
    weights: dict[int, int] = Field(
        default={},
        description="percent of requests by version: more than one in a canary",
        examples=[{"3": 90, "4": 10}],
    )

    @property
    def etag(self) -> str:
        return f'"{self.revision}"'


NoGate = Annotated[NoGateReason | None, Field(description="why the alias is granted where LongLoRA's gate refuses it")]


class AliasTarget(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: VersionNumber
    no_gate: NoGate = None


class ReplicaAdapter(Resource):
    """A version of the adapter in one replica's memory."""

    replica: str = Field(examples=["k3x9"])
    node: str = Field(examples=["worker-1"])
    version: int = Field(examples=[3])
    digest: str = Field(examples=[_DIGEST])
    nbytes: int = Field(examples=[1843200])
    tier: str = Field(examples=["pool"], description="`pool`: computes with it; `host`: waits in host memory")
    uses: int | None = Field(
        examples=[412], description="requests since the replica loaded it; shown to administrators"
    )
    last_used_at: datetime | None = Field(examples=[_TIME], description="shown to administrators")


class PlacementResource(Resource):
    name: str = Field(examples=["tone"])
    items: tuple[ReplicaAdapter, ...]


class JobResource(Resource):
    """A training job. `id` is Ray's submission id; `version` is what it published. A job of several adapters has one
    more of these for each of them, whose `part_of` is its id.
    """

    id: str = Field(examples=["train_5f1b2c3d4e5f6a7b"])
    name: QualifiedName = Field(examples=["tone"])
    tenant: str = Field(default=DEFAULT_TENANT, examples=["default"])
    status: JobStatus = Field(examples=["succeeded"])
    message: str = Field(examples=[""])
    version: int | None = Field(examples=[3])
    actor: str = Field(examples=["api"])
    created_at: datetime = Field(examples=[_TIME])
    started_at: datetime | None = Field(examples=[_TIME])
    ended_at: datetime | None = Field(examples=[_TIME])
    recipe: Annotated[TrainSpec, _ANY_OBJECT] = Field(examples=[RECIPE_EXAMPLE])
    part_of: str | None = Field(default=None, examples=[None])

    @property
    def has_ended(self) -> bool:
        return has_ended(self.status)


# -- problems ---------------------------------------------------------------------------------------------------------

_TYPE = "urn:loray:problem:"
_KINDS: dict[str, type[LorayError]] = {
    "adapter-not-found": errors.AdapterNotFound,
    "base-not-found": errors.BaseNotFound,
    "base-mismatch": errors.BaseMismatch,
    "job-not-found": errors.JobNotFound,
    "key-not-found": errors.KeyNotFound,
    "not-found": errors.NotFoundError,
    "unauthenticated": errors.Unauthenticated,
    "limit-exceeded": errors.LimitExceeded,
    "permission-denied": errors.PermissionDenied,
    "rate-limited": errors.RateLimited,
    "overloaded": errors.Overloaded,
    "revision-conflict": errors.RevisionConflict,
    "gate-refused": errors.GateRefused,
    "conflict": errors.ConflictError,
    "invalid": errors.SpecError,
    "data": errors.DataError,
    "settings": errors.SettingsError,
    "unsupported": errors.UnsupportedError,
    "integrity": errors.IntegrityError,
    "catalog-full": errors.CatalogFull,
    "catalog-unavailable": errors.CatalogError,
    "store-unavailable": errors.StoreError,
    "cluster-unavailable": errors.ClusterError,
    "deadline-exceeded": errors.DeadlineExceeded,
    "internal": LorayError,
}


class FieldError(Resource):
    """A mistake in a field, which is a path with dots: `optimizer.learning_rate`."""

    field: str
    message: str


class Problem(Resource):
    """An error as in RFC 9457. `type` says which of loray's errors it is; `errors` has one entry per wrong field."""

    type: str
    title: str
    status: int
    detail: str
    errors: tuple[FieldError, ...] | None = None

    def exception(self) -> LorayError:
        """The error that the server raised, for the client to raise."""
        kind = _KINDS.get(self.type.removeprefix(_TYPE), LorayError)
        fields = "".join(f"\n  {e.field}: {e.message}" for e in self.errors or ())
        return kind(self.detail + fields)


def problem_type(error: type[LorayError]) -> str:
    """The URN of the error's class, or of its nearest base class that has one."""
    names = {cls: name for name, cls in _KINDS.items()}
    return _TYPE + next(names[cls] for cls in error.__mro__ if cls in names)


# -- uploads and downloads --------------------------------------------------------------------------------------------

DownloadForm = Literal["peft", "merged", "gguf"]


class Registration(BaseModel):
    """An adapter that the store has already, by its `digest`, or the files of an `upload`, of which it is made.

    `version` asks for a number instead of the next one. The rest describes an upload; `base` is a base model of the
    server, which finds it from the folder where it can.
    """

    model_config = ConfigDict(extra="forbid")

    digest: Sha256 | None = None
    upload: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    aliases: tuple[Alias, ...] = ()
    version: VersionNumber | None = None
    no_gate: NoGate = None
    base: Name | None = None
    licence: Annotated[str, Field(max_length=200)] | None = None
    description: Annotated[str, Field(max_length=2000)] = ""
    tool_parser: ToolParserName | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.digest is None) == (self.upload is None):
            raise ValueError("give either digest or upload")
        described = self.base, self.licence, self.description, self.tool_parser
        if self.upload is None and described != (None, None, "", None):
            raise ValueError("base, licence, description and tool_parser belong to an upload")
        return self


class FileResource(Resource):
    name: str = Field(examples=["adapter_config.json"])
    sha256: str = Field(examples=["3f1c" * 16])
    nbytes: int = Field(examples=[812])


class PresignedFileResource(FileResource):
    url: str = Field(
        description="whoever has it reads the file until `expires_at`; send no key with it",
        examples=["https://bucket.s3.eu-1.amazonaws.com/blobs/3f/3f1c…?X-Amz-Signature=…"],
    )


class DownloadResource(Resource):
    """URLs of a version's files, the smallest first. They are checked by their SHA-256."""

    files: tuple[PresignedFileResource, ...]
    expires_at: datetime = Field(examples=[_TIME])


class UploadResource(Resource):
    """A folder that comes file by file. `files` are those that are there as a whole."""

    id: str = Field(examples=["5f1b" * 8])
    files: tuple[FileResource, ...]
    published: bool = Field(default=False, description="a version was made of it; it takes no files any more")


# -- usage and canaries -----------------------------------------------------------------------------------------------


class UsageFilter(TypedDict, total=False):
    """Says which requests are summed up: they ended from `since` until before `until`. `tenant`: for administrators."""

    tenant: str | None
    key_id: str | None
    model: str | None
    since: datetime | None
    until: datetime | None


class UsageResource(Resource):
    """Sums over one group. What usage is not grouped by is null; so is the key of requests that needed none."""

    tenant: str | None = Field(examples=["acme"])
    key_id: str | None = Field(examples=[None])
    model: str | None = Field(description="the adapter's qualified name, or the base's", examples=["acme/tone"])
    day: date | None = Field(description="in UTC", examples=[None])
    num_requests: int = Field(examples=[12])
    num_prompt_tokens: int = Field(examples=[3400])
    num_cached_tokens: int = Field(examples=[1200])
    num_output_tokens: int = Field(examples=[960])
    seconds: float = Field(examples=[20.5])
    num_batch_tokens: int = Field(default=0, description="prompt and output tokens of lines of batches", examples=[0])


class CanaryTarget(BaseModel):
    """The version that gets a share of the alias's requests, and `percent` of them."""

    model_config = ConfigDict(extra="forbid")

    version: VersionNumber
    percent: Percent
    bounds: CanaryBounds | None = Field(default=None, description="null: those of the running canary, else defaults")
    no_gate: NoGate = None


class CountsResource(Resource):
    """Counts of one version. Times are geometric means in seconds; null where none was measured."""

    num_requests: int = Field(
        description="answered and failed ones, without what a client did wrong or cancelled", examples=[1804]
    )
    num_errors: int = Field(examples=[2])
    ttft_s: float | None = Field(examples=[0.11])
    itl_s: float | None = Field(examples=[0.021])

    @classmethod
    def of(cls, counts: VersionCounts) -> CountsResource:
        return cls(
            num_requests=counts.num_requests,
            num_errors=counts.num_errors,
            ttft_s=_mean(counts.ttft),
            itl_s=_mean(counts.itl),
        )


_BOUNDS = {"max_error_rate": 0.05, "max_ttft_ratio": 2.0, "max_itl_ratio": 2.0, "min_requests": 50}
_COUNTS = dict.fromkeys(("stable", "canary"), example_of(CountsResource))


class CanaryResource(Resource):
    """A canary. `stable` is the version that the alias points at; `outcome` null: it runs.

    `promoted`: the alias was moved to it; `moved`: to another version; `ended`: by somebody; `rolled_back`: it left its
    bounds, and `reason` says which.
    """

    alias: str = Field(examples=["prod"])
    stable: int = Field(examples=[3])
    version: int = Field(examples=[4])
    percent: int = Field(examples=[10])
    bounds: CanaryBounds = Field(examples=[_BOUNDS])
    counts: dict[str, CountsResource] = Field(description="of `stable` and `canary`", examples=[_COUNTS])
    created_at: datetime = Field(examples=[_TIME])
    ended_at: datetime | None = Field(examples=[None])
    outcome: CanaryOutcome | None = Field(examples=[None])
    reason: str | None = Field(examples=[None])

    @classmethod
    def of(cls, state: CanaryState) -> CanaryResource:
        return cls(
            alias=state.alias,
            stable=state.stable,
            version=state.version,
            percent=state.percent,
            bounds=state.bounds,
            counts={arm: CountsResource.of(counts) for arm, counts in state.counts._asdict().items()},
            created_at=state.created_at,
            ended_at=state.ended_at,
            outcome=state.outcome,
            reason=state.reason,
        )


def _mean(moments: LogMoments) -> float | None:
    return round(moments.mean, 6) if moments.num else None
