"""Who may do what: (principal, action, what it is about) → allowed, or an error that says why not.

Plain rules without HTTP and database. Each route of both APIs says its action (`serve_apps.access.may`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from loray.errors import PermissionDenied, Unauthenticated
from loray.spec import DEFAULT_TENANT, Principal, Scope, qualified_name

Action = Literal[
    "open",
    "identify",
    "infer",
    "read",
    "download",
    "publish",
    "promote",
    "train",
    "follow",
    "audit",
    "manage_own",
    "observe",
    "manage",
]

# One of these scopes is enough; an administrator does everything. "open" needs no key, "identify" any key.
SCOPES_OF: Mapping[Action, frozenset[Scope]] = {
    "infer": frozenset({"infer"}),
    "read": frozenset({"infer", "publish", "promote", "train"}),
    "download": frozenset({"publish", "promote", "train"}),
    "publish": frozenset({"publish"}),
    "promote": frozenset({"promote"}),
    "train": frozenset({"train"}),
    "follow": frozenset({"train", "tenant_admin"}),  # jobs
    "audit": frozenset({"publish", "promote", "train", "tenant_admin"}),
    "manage_own": frozenset({"tenant_admin"}),  # keys of the own tenant
    "observe": frozenset(),
    "manage": frozenset(),
}
NO_KEY = (
    "this needs an API key, in the header `Authorization: Bearer sk-lr-…`; an administrator makes one with "
    "`loray keys create`"
)
_WRITES: frozenset[Action] = frozenset({"publish", "promote", "train", "manage_own", "manage"})


def check(principal: Principal | None, action: Action, owner: str | None = None) -> None:
    """Raises Unauthenticated without a principal, PermissionDenied where its scopes do not allow the action, or where
    it would change what belongs to `owner`, another tenant. What exists for it, `catalog.queries.visible` says.
    """
    if action == "open":
        return
    if principal is None:
        raise Unauthenticated(NO_KEY)
    if principal.is_admin or action == "identify":
        return
    allowed = SCOPES_OF[action]
    if not principal.scopes & allowed:
        needed = " or ".join(sorted(allowed | {"admin"}))
        raise PermissionDenied(f"this needs a key with the scope {needed}, and this key has {_listed(principal)}")
    if owner is not None and action in _WRITES and owner != principal.tenant:
        raise PermissionDenied(f"it belongs to another tenant than {principal.tenant}, which may not change it")


def check_model(principal: Principal, model: str) -> None:
    """Raises PermissionDenied where the key is for other models only. `model` is what the request names, with or
    without version or alias. It is not looked up, so the refusal does not say whether it exists.
    """
    if not may_ask(principal, model):
        raise PermissionDenied("this key is for other models; GET /api/v1/keys/self says for which")


def may_ask(principal: Principal, model: str) -> bool:
    """Whether the key is for this model, by the name that the request or the list of models has."""
    if principal.models is None:
        return True
    name = model.partition("@")[0].removeprefix(f"{principal.tenant}/")
    own = qualified_name(principal.tenant, name)
    return bool(principal.models & {model, name, own, f"{DEFAULT_TENANT}/{name}" if own == name else own})


def share_of(principal: Principal, user: str | None) -> str:
    """Whose share of the engine a request takes, for fairness: its tenant's. Where nobody needs a key and no tenant is
    named, the body's `user` tells requests apart.
    """
    if principal.key_id is None and principal.tenant == DEFAULT_TENANT:
        return user or ""
    return principal.tenant


def _listed(principal: Principal) -> str:
    return ", ".join(sorted(principal.scopes)) or "none"
