"""Access: tenants, keys with scopes and limits, the principal that a request acts as, and what it used.

Field names are those of LiteLLM's proxy, where it has them; its teams are our tenants.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field, StringConstraints

from loray.spec.fields import Frozen, NumBytes

DEFAULT_TENANT = "default"
KEY_START = "sk-lr-"  # of every key; then 256 random bits as base64url
PREFIX_LENGTH = 8

TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")]
QualifiedName = Annotated[
    str,
    StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,31}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}$", max_length=96),
]
Scope = Literal["infer", "publish", "promote", "train", "tenant_admin", "admin", "act_for"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
# What an administrator of one tenant may give. The others make more administrators, or reach other tenants.
TENANT_SCOPES: frozenset[Scope] = frozenset({"infer", "publish", "promote", "train"})
Visibility = Literal["private", "shared", "public"]
Duration = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,4}[smhd]$")]
KeyAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._@/-]{0,63}$")]
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# What a key that is no administrator's may bring a tenant to; see `Limits`, which say otherwise.
DEFAULT_MAX_ADAPTERS = 10_000
MAX_VERSIONS = 1000  # of a name
MAX_TEMPLATE_CHARACTERS_OF_TENANT = 16 << 20  # in chat templates that differ
# What is deleted can be restored that long. Its bytes stay in the store, and it counts.
DEFAULT_KEEP_DELETED_S = 30 * 24 * 3600.0
UsageGroup = Literal["tenant", "key", "model", "day"]
USAGE_GROUPS: tuple[UsageGroup, ...] = get_args(UsageGroup)


class Limits(Frozen):
    """Limits of a key or of a tenant; None: none. Both apply."""

    rpm_limit: int | None = Field(default=None, ge=0, strict=True, description="requests a minute")
    tpm_limit: int | None = Field(default=None, ge=0, strict=True, description="tokens a minute, in and out")
    max_parallel_requests: int | None = Field(default=None, ge=0, strict=True)
    max_budget: float | None = Field(default=None, ge=0, strict=True, description="tokens in one `budget_duration`")
    budget_duration: Duration = "30d"
    max_adapters: int | None = Field(default=None, ge=0, strict=True, description="names of a tenant")
    max_stored_bytes: NumBytes | None = Field(default=None, description="of a tenant's adapters and files")
    max_jobs: int | None = Field(default=None, ge=0, strict=True, description="training jobs of a tenant at once")
    max_workers: int | None = Field(default=None, ge=0, strict=True, description="training workers of a tenant at once")
    min_priority: int | None = Field(
        default=None, strict=True, description="the most urgent `priority` it may ask; None: 0, an administrator any"
    )

    @property
    def are_counted(self) -> bool:
        """Requests are counted for one of the limits."""
        counted = (self.rpm_limit, self.tpm_limit, self.max_parallel_requests, self.max_budget)
        return any(limit is not None for limit in counted)

    def beyond(self, most: Limits) -> str | None:
        """The first limit that allows more than the same one of `most`, which says 0 where it has no `min_priority`;
        None: there is none. A limit that is not set allows no more, since both apply.
        """
        for name in [n for n in Limits.model_fields if n not in ("budget_duration", "min_priority")]:
            own, bound = getattr(self, name), getattr(most, name)
            if own is not None and bound is not None and own > bound:
                return name
        is_earlier = self.min_priority is not None and self.min_priority < (most.min_priority or 0)
        return "min_priority" if is_earlier else None


class Principal(Frozen):
    """The one who asks, as a checked key says it.

    key_id         the key's public id; None: no key was needed (a deployment on loopback, a command on the database)
    actor          written into the audit log
    models         models that may be asked, as the key's owner names them; other adapters do not exist for the key.
                   None: all that the tenant sees
    limits         the key's own
    tenant_limits  those of its tenant
    """

    tenant: TenantName = DEFAULT_TENANT
    scopes: frozenset[Scope] = frozenset(SCOPES)
    key_id: str | None = None
    actor: str = "local"
    models: frozenset[str] | None = None
    limits: Limits = Limits()
    tenant_limits: Limits = Limits()

    @property
    def is_admin(self) -> bool:
        """An administrator sees and does everything, in every tenant."""
        return "admin" in self.scopes

    @property
    def names(self) -> frozenset[str] | None:
        """The catalog's names that `models` may mean; None: all."""
        return None if self.models is None else _names_of(self.models, self.tenant)

    @property
    def account(self) -> str | None:
        """The name on which the key's usage and limits are counted. A rotated key keeps its account."""
        return None if self.key_id is None else account_of(self.key_id)


OPERATOR = Principal()  # who has the database's password, or needs no key


def account_of(key_id: str) -> str:
    """The id of the first key of those that were rotated into `key_id`: of `key-ab12_3` it is `key-ab12`."""
    return key_id.partition("_")[0]


class Tenant(Frozen):
    """The owner of adapters, keys, jobs and usage. The keys of a blocked tenant are refused."""

    name: TenantName
    blocked: bool = False
    limits: Limits = Limits()
    created_at: datetime


class ApiKey(Frozen):
    """A key without its secret.

    prefix        the 8 characters after `sk-lr-`, by which people recognise it
    created_by    the actor who made it
    last_used_at  to the minute
    """

    id: str
    prefix: str
    alias: KeyAlias
    tenant: TenantName
    scopes: frozenset[Scope]
    models: frozenset[str] | None = None
    limits: Limits = Limits()
    metadata: dict[str, str] = Field(default_factory=dict)
    blocked: bool = False
    created_by: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None

    def principal(self, tenant: Tenant) -> Principal:
        """The principal that the key stands for. `tenant` is the key's."""
        return Principal(
            tenant=self.tenant,
            scopes=self.scopes,
            key_id=self.id,
            actor=f"{self.alias} ({self.id})",
            models=self.models,
            limits=self.limits,
            tenant_limits=tenant.limits,
        )


class HashedKey(NamedTuple):
    """A key and its SHA-256, against which a secret is checked."""

    sha256: bytes
    key: ApiKey


class KeyChanges(NamedTuple):
    """Keys and tenants that have changed since some value of the catalog's change counter, those revoked included.

    any_keys  whether a key was ever made, also where all are revoked
    """

    counter: int
    keys: tuple[HashedKey, ...]
    tenants: tuple[Tenant, ...]
    any_keys: bool


def duration_s(duration: Duration) -> int:
    """`"90m"` → 5400."""
    return int(duration[:-1]) * _SECONDS[duration[-1]]


def duration_of(seconds: float) -> str:
    """5400 → `"90m"`, in the largest unit that divides it."""
    unit, size = next((u, n) for u, n in reversed(_SECONDS.items()) if seconds % n == 0)
    return f"{seconds / size:g}{unit}"


class TenantAndName(NamedTuple):
    """The parts of `tenant/name`; `tenant` None: a bare name."""

    tenant: str | None
    name: str


def qualified_name(tenant: str, name: str) -> str:
    """The name under which the catalog keeps an adapter: `tenant/name`, and the bare name in the default tenant."""
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"


def split_qualified(name: str) -> TenantAndName:
    tenant, slash, bare = name.partition("/")
    return TenantAndName(tenant, bare) if slash else TenantAndName(None, name)


def meanings(name: str, tenant: str) -> tuple[str, ...]:
    """The catalog's names that `name` may stand for when a caller of `tenant` uses it; the first one that exists for
    the caller is meant. A bare name is the own tenant's, then the default tenant's.
    """
    owner, slash, bare = name.partition("/")
    if slash:
        return (bare,) if owner == DEFAULT_TENANT and "/" not in bare else (name,)
    return (name,) if tenant == DEFAULT_TENANT else (qualified_name(tenant, name), name)


@lru_cache(maxsize=4096)
def _names_of(models: frozenset[str], tenant: str) -> frozenset[str]:
    return frozenset(name for model in models for name in meanings(model.partition("@")[0], tenant))


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One request, whatever its end. An event with a `request_id` that is known already is the same event.

    key_id      None: no key was needed
    model       the adapter's qualified name, or the base's
    digest      of the adapter; None: the base
    num_prompt_tokens  as often as they are computed: those of a prompt once for all choices, or with `prompt_logprobs`
                for each; `num_cached_tokens` are of these
    tier        OpenAI's service tier that its `priority` amounts to: `priority` below 0, `default` at 0, `flex` above;
                `batch`: a line of one
    seconds     from the request's arrival to its end
    outcome     `ok`, `disconnected`, `cancelled`, `abandoned` by a gateway that was killed, or the code of the error
    created_at  when it ended
    """

    request_id: str
    tenant: str
    key_id: str | None
    model: str
    digest: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    tier: str
    seconds: float
    outcome: str
    created_at: datetime

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"created_at": self.created_at.isoformat()}, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> UsageEvent:
        """The event that `to_json` wrote. Raises ValueError."""
        try:
            fields = json.loads(line)
            return cls(**fields | {"created_at": datetime.fromisoformat(fields["created_at"])})
        except (KeyError, TypeError) as e:
            raise ValueError(f"not a usage event: {e}") from e


# From this number on a request is in the background: it hardly lengthens the steps of those before it.
BACKGROUND_PRIORITY = 100
# Of lines of batches, behind all that a request may ask for.
BATCH_PRIORITY, BATCH_TIER = 1000, "batch"


def service_tier(priority: int) -> str:
    if priority == BATCH_PRIORITY:
        return BATCH_TIER
    return "default" if priority == 0 else "priority" if priority < 0 else "flex"
