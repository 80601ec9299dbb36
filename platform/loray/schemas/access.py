"""Bodies of the API of keys, tenants and the audit log."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self, TypedDict

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from loray.schemas.resources import WRITTEN_OUT, Resource
from loray.spec import (
    KEY_START,
    ApiKey,
    Duration,
    KeyAlias,
    Limits,
    Scope,
    Tenant,
    TenantName,
    duration_s,
)

_FIELDS = tuple(Limits.model_fields)
_TIME = "2026-11-24T18:00:00Z"
Models = Annotated[tuple[str, ...] | None, Field(description="models that it may ask; null: all that its tenant sees")]
Metadata = Annotated[dict[str, str], Field(default_factory=dict, max_length=64)]
_YEARS = range(2000, 9999)


def _utc(moment: datetime) -> datetime:
    if moment.year not in _YEARS:
        raise ValueError(f"must lie between {_YEARS.start} and {_YEARS.stop}")
    return moment.astimezone(UTC)


Moment = Annotated[AwareDatetime, WRITTEN_OUT, AfterValidator(_utc)]  # in UTC, which SQLite would not convert to
_LIMITS = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class KeyResource(Limits):
    """A key without its secret. `key_name` is its beginning, by which people recognise it."""

    model_config = _LIMITS

    id: str = Field(examples=["key-5f1b2c3d4e5f6a7b"])
    key_name: str = Field(examples=["sk-lr-8QmZ4c0x…"])
    key_alias: str = Field(examples=["ci"])
    tenant: str = Field(examples=["acme"])
    scopes: tuple[Scope, ...] = Field(examples=[["infer", "publish"]])
    models: Models = None
    metadata: Metadata
    blocked: bool = Field(examples=[False])
    created_by: str = Field(examples=["local"])
    created_at: datetime = Field(examples=[_TIME])
    expires: datetime | None = Field(examples=[None])
    revoked_at: datetime | None = Field(examples=[None])
    last_used_at: datetime | None = Field(description="to the minute", examples=[_TIME])

    @classmethod
    def of(cls, key: ApiKey, /, **more: Any) -> Self:
        same = ("id", "tenant", "metadata", "blocked", "created_by", "created_at", "revoked_at", "last_used_at")
        return cls(
            **{name: getattr(key, name) for name in same},
            **key.limits.model_dump(),
            key_name=f"{KEY_START}{key.prefix}…",
            key_alias=key.alias,
            scopes=tuple(sorted(key.scopes)),
            models=None if key.models is None else tuple(sorted(key.models)),
            expires=key.expires_at,
            **more,
        )


class NewKeyResource(KeyResource):
    """`key` is shown this once."""

    key: str = Field(examples=["sk-lr-8QmZ4c0x" + "…" * 35])


class _Ending(Limits):
    """Fields of a key, of which at most one says when it ends."""

    duration: Duration | None = None
    expires: Moment | None = None

    @model_validator(mode="after")
    def _one_end(self) -> Self:
        if self.duration is not None and self.expires is not None:
            raise ValueError("give duration or expires, not both")
        return self

    @property
    def expires_at(self) -> datetime | None:
        if self.duration is None:
            return self.expires
        return datetime.now(UTC) + timedelta(seconds=duration_s(self.duration))


class KeyCreation(_Ending):
    """A key that is wanted, of the caller's tenant where none is named. `duration` or `expires` says when it ends;
    without either it does not.
    """

    key_alias: KeyAlias
    tenant: TenantName | None = None
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = ("infer",)
    models: Models = None
    metadata: Metadata

    @property
    def limits(self) -> Limits:
        return limits_of(self)


class KeyChange(_Ending):
    """Changes of a key; fields that are left out stay. A limit that is null is taken away, `models` null is all, and
    with `expires` null the key does not end. `duration` counts from now. `limits` replaces all limits at once.
    """

    key_alias: KeyAlias | None = None
    models: Models = None
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = None
    blocked: bool | None = None
    limits: Limits | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.limits is not None and self.single_limits:
            raise ValueError("give limits, which replaces all of them, or single ones, not both")
        return self

    @property
    def single_limits(self) -> dict[str, Any]:
        """Name → new value of the limits that are given singly; null takes one away."""
        return self.model_dump(include=set(_FIELDS) & self.model_fields_set)


class Rotation(BaseModel):
    """`grace_period`: how long the old key goes on beside the new one."""

    model_config = ConfigDict(extra="forbid")

    grace_period: Duration | None = None

    @property
    def grace(self) -> timedelta:
        return timedelta(seconds=0 if self.grace_period is None else duration_s(self.grace_period))


class TenantResource(Limits):
    """A tenant and its limits."""

    model_config = _LIMITS

    name: str = Field(examples=["acme"])
    blocked: bool = Field(examples=[False])
    created_at: datetime = Field(examples=[_TIME])

    @classmethod
    def of(cls, tenant: Tenant) -> TenantResource:
        fields = tenant.model_dump(exclude={"limits"}) | tenant.limits.model_dump()
        return cls(**fields)


class TenantCreation(Limits):
    """A tenant that is wanted."""

    name: TenantName

    @property
    def limits(self) -> Limits:
        return limits_of(self)


class TenantChange(BaseModel):
    """Changes of a tenant; `limits` replaces all of them."""

    model_config = ConfigDict(extra="forbid")

    blocked: bool | None = None
    limits: Limits | None = None


class AuditFilter(TypedDict, total=False):
    """Which entries of the audit log are listed; all that is given must hold. `tenant`: for administrators."""

    tenant: str | None
    actor: str | None
    action: str | None
    subject: str | None
    since: datetime | None


class AuditResource(Resource):
    """One write, login, download or refusal: who did what to what, and whose it is."""

    id: int = Field(examples=[42])
    actor: str = Field(examples=["ci (key-5f1b2c3d4e5f6a7b)"])
    action: str = Field(examples=["promote"])
    subject: str = Field(examples=["acme/tone@prod"])
    tenant: str = Field(examples=["acme"])
    detail: dict[str, Any] = Field(description="what was given", examples=[{"version": 3}])
    created_at: datetime = Field(examples=[_TIME])
    address: str | None = Field(
        default=None, description="from where the request came, as far as it is known", examples=["10.0.0.7"]
    )
    request_id: str | None = Field(
        default=None,
        description="X-Request-Id of the answer; of refusals, the first",
        examples=["req-5f1b2c3d4e5f6a7b"],
    )


def limits_of(given: Limits) -> Limits:
    """The limits among the fields of something larger."""
    return Limits.model_validate(given.model_dump(include=set(_FIELDS), exclude_unset=True))
