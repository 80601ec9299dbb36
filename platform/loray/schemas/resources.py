"""Bodies of the catalog's API: adapters, aliases, canaries, jobs, uploads, usage, and problems."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator

from loray.errors import (
    AdapterNotFound,
    BaseMismatch,
    BaseNotFound,
    CatalogError,
    CatalogFull,
    ClusterError,
    ConflictError,
    DataError,
    DeadlineExceeded,
    GateRefused,
    IntegrityError,
    JobNotFound,
    KeyNotFound,
    LimitExceeded,
    LorayError,
    NotFoundError,
    Overloaded,
    PermissionDenied,
    RateLimited,
    RevisionConflict,
    SettingsError,
    SpecError,
    StoreError,
    Unauthenticated,
    UnsupportedError,
)
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


class Resource(BaseModel):
    """A body that a server sends. Fields that a later server adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Page(Resource, Generic[T]):
    """A page of a list. `next` is the `cursor` of the page behind; null at the end."""

    items: tuple[T, ...]
    next: str | None = None


class ProjectionResource(Resource):
    """VeRA's pair of some of a base's adapters. `canonical`: the first of its shape; the others should share it."""

    key: int
    rank: int
    max_in: int
    max_out: int
    sha256: str
    canonical: bool


class BaseResource(Resource):
    name: str
    fingerprint: str
    projections: tuple[ProjectionResource, ...] = ()


class AdapterResource(Resource):
    """One name. `version` and what follows are of what the bare name means: alias `prod`, else the newest version."""

    name: str
    created_at: datetime
    version: int
    digest: str
    method: Method
    base: str | None = Field(description="null where the catalog has no name for the base model's fingerprint")
    base_fingerprint: str
    context_length: int
    nbytes: int
    versions: tuple[int, ...] = Field(description="newest first")
    aliases: dict[str, int]
    weights: dict[str, dict[int, int]] = Field(default={}, description="percent by version, of aliases with a canary")
    tenant: str = DEFAULT_TENANT
    visibility: Visibility = "private"
    shared_with: tuple[str, ...] = Field(default=(), description="shown to its own tenant")


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
    key: str
    value: str


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

    deaths: int
    died_at: datetime
    refused_until: datetime | None


class VersionResource(Resource):
    """One immutable version; only `aliases` and `quarantine` change, and `evaluations` grow: the manifest's, then later
    ones.
    """

    name: str
    version: int
    digest: str
    created_at: datetime
    aliases: tuple[str, ...]
    method: Method
    base_fingerprint: str
    context_length: int
    nbytes: int
    evaluations: tuple[Evaluation, ...]
    quarantine: QuarantineResource | None = None

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


# The document describes recipes and manifests as any object, because a server may know fields that a client does not.
_ANY_OBJECT = WithJsonSchema({"type": "object", "additionalProperties": True})


class VersionDetail(VersionResource):
    """One version with its manifest: files, recipe, lineage."""

    manifest: Annotated[AdapterManifest, _ANY_OBJECT]


class AliasResource(Resource):
    """An alias. `revision` is the ETag; it grows with every move and rollback and never comes twice."""

    name: str
    alias: str
    version: int
    digest: str
    revision: int
    weights: dict[int, int] = Field(default={}, description="percent of requests by version: more than one in a canary")

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

    replica: str
    node: str
    version: int
    digest: str
    nbytes: int
    tier: str = Field(description="`pool`: computes with it; `host`: waits in host memory")
    uses: int | None = Field(description="requests since the replica loaded it; shown to administrators")
    last_used_at: datetime | None = Field(description="shown to administrators")


class PlacementResource(Resource):
    name: str
    items: tuple[ReplicaAdapter, ...]


class JobResource(Resource):
    """A training job. `id` is Ray's submission id; `version` is what it published."""

    id: str
    name: QualifiedName
    tenant: str = DEFAULT_TENANT
    status: JobStatus
    message: str
    version: int | None
    actor: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    recipe: Annotated[TrainSpec, _ANY_OBJECT]

    @property
    def has_ended(self) -> bool:
        return has_ended(self.status)


# -- problems ---------------------------------------------------------------------------------------------------------

_TYPE = "urn:loray:problem:"
_KINDS: dict[str, type[LorayError]] = {
    "adapter-not-found": AdapterNotFound,
    "base-not-found": BaseNotFound,
    "base-mismatch": BaseMismatch,
    "job-not-found": JobNotFound,
    "key-not-found": KeyNotFound,
    "not-found": NotFoundError,
    "unauthenticated": Unauthenticated,
    "limit-exceeded": LimitExceeded,
    "permission-denied": PermissionDenied,
    "rate-limited": RateLimited,
    "overloaded": Overloaded,
    "revision-conflict": RevisionConflict,
    "gate-refused": GateRefused,
    "conflict": ConflictError,
    "invalid": SpecError,
    "data": DataError,
    "settings": SettingsError,
    "unsupported": UnsupportedError,
    "integrity": IntegrityError,
    "catalog-full": CatalogFull,
    "catalog-unavailable": CatalogError,
    "store-unavailable": StoreError,
    "cluster-unavailable": ClusterError,
    "deadline-exceeded": DeadlineExceeded,
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
    name: str
    sha256: str
    nbytes: int


class PresignedFileResource(FileResource):
    url: str = Field(description="whoever has it reads the file until `expires_at`; send no key with it")


class DownloadResource(Resource):
    """URLs of a version's files, the smallest first. They are checked by their SHA-256."""

    files: tuple[PresignedFileResource, ...]
    expires_at: datetime


class UploadResource(Resource):
    """A folder that comes file by file. `files` are those that are there as a whole."""

    id: str
    files: tuple[FileResource, ...]
    published: bool = Field(default=False, description="a version was made of it; it takes no files any more")


# -- usage and canaries -----------------------------------------------------------------------------------------------


class UsageResource(Resource):
    """Sums over one group. What usage is not grouped by is null; so is the key of requests that needed none."""

    tenant: str | None
    key_id: str | None
    model: Annotated[str | None, Field(description="the adapter's qualified name, or the base's")]
    day: Annotated[date | None, Field(description="in UTC")]
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    seconds: float


class CanaryTarget(BaseModel):
    """The version that gets a share of the alias's requests, and `percent` of them."""

    model_config = ConfigDict(extra="forbid")

    version: VersionNumber
    percent: Percent
    bounds: CanaryBounds | None = Field(default=None, description="null: those of the running canary, else defaults")
    no_gate: NoGate = None


class CountsResource(Resource):
    """Counts of one version. Times are geometric means in seconds; null where none was measured."""

    num_requests: int = Field(description="answered and failed ones, without what a client did wrong or cancelled")
    num_errors: int
    ttft_s: float | None
    itl_s: float | None

    @classmethod
    def of(cls, counts: VersionCounts) -> CountsResource:
        return cls(
            num_requests=counts.num_requests,
            num_errors=counts.num_errors,
            ttft_s=_mean(counts.ttft),
            itl_s=_mean(counts.itl),
        )


class CanaryResource(Resource):
    """A canary. `stable` is the version that the alias points at; `outcome` null: it runs.

    `promoted`: the alias was moved to it; `moved`: to another version; `ended`: by somebody; `rolled_back`: it left its
    bounds, and `reason` says which.
    """

    alias: str
    stable: int
    version: int
    percent: int
    bounds: CanaryBounds
    counts: dict[str, CountsResource] = Field(description="of `stable` and `canary`")
    created_at: datetime
    ended_at: datetime | None
    outcome: CanaryOutcome | None
    reason: str | None

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
