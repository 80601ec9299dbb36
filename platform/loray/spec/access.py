"""Who asks: tenants, keys with scopes and limits, and the principal that a request acts as.

Field names are those of LiteLLM's proxy, where it has them; its teams are our tenants.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from loray.spec.fields import Frozen, NumBytes

DEFAULT_TENANT = "default"

TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")]
Scope = Literal["infer", "publish", "promote", "train", "admin", "act_for"]
SCOPES: tuple[Scope, ...] = ("infer", "publish", "promote", "train", "admin", "act_for")
Visibility = Literal["private", "shared", "public"]


class Limits(Frozen):
    """Limits of a key or of a tenant; None: none. Both apply."""

    rpm_limit: int | None = Field(default=None, ge=0, description="requests a minute")
    tpm_limit: int | None = Field(default=None, ge=0, description="tokens a minute, of prompts and answers")
    max_parallel_requests: int | None = Field(default=None, ge=0)
    max_budget: float | None = Field(default=None, ge=0, description="tokens in one `budget_duration`")
    budget_duration: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,4}[smhd]$")] = "30d"
    max_stored_bytes: NumBytes | None = Field(default=None, description="of a tenant's adapters")
    max_jobs: int | None = Field(default=None, ge=0, description="training jobs of a tenant at once")
    max_workers: int | None = Field(default=None, ge=0, description="training workers of a tenant at once")
    min_priority: int | None = Field(default=None, description="the smallest, thus most urgent, `priority` it may ask")


class Principal(Frozen):
    """What a checked key stands for.

    key_id         the key's public id; None: no key was needed (a deployment on loopback, a command on the database)
    actor          written into the audit log
    models         models that may be asked, as the key's owner names them; None: all that the tenant sees
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


def qualified_name(tenant: str, name: str) -> str:
    """The name under which the catalog keeps an adapter: `tenant/name`, and the bare name in the default tenant."""
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"
