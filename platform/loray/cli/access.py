"""`loray keys` and `loray tenants`, and the options of limits that both have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from pydantic import TypeAdapter, ValidationError

from loray.catalog.identity import new_secret
from loray.cli.connect import open_catalog
from loray.cli.output import emit, json_option, table, tell, when
from loray.client import CatalogClient
from loray.errors import KeyNotFound, SpecError
from loray.schemas.access import KeyChange, KeyCreation, KeyResource, NewKeyResource, TenantChange
from loray.spec import SCOPES, Duration, Limits, Scope, format_size

if TYPE_CHECKING:
    from loray.service import CatalogService


class _Limit(click.ParamType):  # type: ignore[type-arg]  # generic in some versions of click
    """A number, or `word`, which takes the limit away."""

    def __init__(self, number: Callable[[str], Any], word: str) -> None:
        self.name, self._number, self._word = f"number|{word}", number, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == self._word:
            return value
        try:
            return self._number(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor {self._word!r}", param, ctx)


# option, field, type, help
_Row = tuple[str, str, type[Any], str]
_LIMITS_OF_KEYS: tuple[_Row, ...] = (
    ("--rpm", "rpm_limit", int, "Requests a minute."),
    ("--tpm", "tpm_limit", int, "Tokens a minute, of prompts and answers."),
    ("--parallel", "max_parallel_requests", int, "Requests at once."),
    ("--budget", "max_budget", float, "Tokens in one --budget-duration."),
    ("--budget-duration", "budget_duration", str, "Such as 12h or 30d (default 30d)."),
    ("--min-priority", "min_priority", int, "The most urgent priority that requests may ask for."),
)
_LIMITS_OF_TENANTS: tuple[_Row, ...] = (
    ("--adapters", "max_adapters", int, "Names of adapters."),
    ("--stored-bytes", "max_stored_bytes", str, "Size of all adapters, for instance 20GiB."),
    ("--jobs", "max_jobs", int, "Training jobs at once."),
    ("--workers", "max_workers", int, "Training workers at once."),
)
_AWAY = "none"  # takes a limit away
_ALL, _NEVER = "all", "never"  # take a key's models and its end away


def _limit_options(
    *, of_tenant: bool = False, takes_away: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds an option for each limit. `takes_away`: `none` is allowed, too, and takes a limit away."""

    def decorated(command: Callable[..., Any]) -> Callable[..., Any]:
        for option, field, kind, text in reversed(_LIMITS_OF_KEYS + (_LIMITS_OF_TENANTS if of_tenant else ())):
            of: Any = _Limit(kind, _AWAY) if takes_away and kind is not str else kind
            command = click.option(option, field, type=of, help=text)(command)
        return command

    return decorated


def _given_limits(options: Mapping[str, Any]) -> dict[str, Any]:
    """Maps field to value of the options that are given; None where `none` is."""
    return {name: None if value == _AWAY else value for name, value in options.items() if value is not None}


def _limits_from(options: Mapping[str, Any], before: Limits | None = None) -> Limits:
    """Returns the options that are given, over the limits of `before`."""
    known = {} if before is None else before.model_dump(include=set(Limits.model_fields))
    return Limits.parse(known | _given_limits(options), source="the command line")


def _describe(limits: Limits) -> str:
    """Describes limits in a few words; empty without limits."""
    words = {
        "requests/min": limits.rpm_limit,
        "tokens/min": limits.tpm_limit,
        "at once": limits.max_parallel_requests,
        f"tokens/{limits.budget_duration}": None if limits.max_budget is None else f"{limits.max_budget:,.0f}",
        "adapters": limits.max_adapters,
        "stored": None if limits.max_stored_bytes is None else format_size(limits.max_stored_bytes),
        "jobs": limits.max_jobs,
        "workers": limits.max_workers,
        "least priority": limits.min_priority,
    }
    return ", ".join(f"{value} {name}" for name, value in words.items() if value is not None)


@click.group()
def keys() -> None:
    """API keys: create, list, change, block, rotate and revoke them.

    While there is no key, a server on this machine's loopback needs none. KEY is a key's id or its alias. With
    LORAY_URL these commands ask a server, with the LORAY_API_KEY of an administrator, of all or of one tenant.
    """


@keys.command("create")
@click.argument("alias", required=False)
@click.option(
    "--scope", "scopes", type=click.Choice(SCOPES), multiple=True, help="What it may do (default infer); repeatable."
)
@click.option("--tenant", help="Whose it is (default: that of LORAY_API_KEY; without a server, `default`).")
@click.option("--model", "models", multiple=True, help="Only this model; may be given several times.")
@click.option("--expires", metavar="DURATION", help="When it ends, such as 12h or 90d (default: it does not).")
@_limit_options()
@click.option("--static", is_flag=True, help="Make one for the deployment itself, which the catalog does not keep.")
@json_option
def create_key(
    alias: str | None,
    scopes: tuple[Scope, ...],
    tenant: str | None,
    models: tuple[str, ...],
    expires: str | None,
    static: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    """Make a key and show it once. ALIAS is what people call it (default: its first scope).

    With --static: an administrator's key that works without the database. Servers are given its SHA-256 in
    LORAY_API_KEYS_SHA256, for instance through a Secret.
    """
    if static:
        secret = new_secret()
        hashed = hashlib.sha256(secret.encode()).hexdigest()
        line = f"LORAY_API_KEY={secret}\nLORAY_API_KEYS_SHA256={hashed}"
        tell(line, {"key": secret, "sha256": hashed}, as_json)
        return
    scopes = scopes or ("infer",)
    fields: dict[str, Any] = {"key_alias": alias or scopes[0], "scopes": scopes}
    fields |= {} if tenant is None else {"tenant": tenant}
    fields |= {"models": models} if models else {}
    fields |= {} if expires is None else {"duration": _duration(expires)}
    wanted = KeyCreation.parse(fields | _given_limits(limits), source="the command line")
    with open_catalog() as catalog:
        made = catalog.create_key(wanted)
    _show_new_key(made, as_json)


@keys.command("ls")
@click.option("--tenant", help="Only keys of this tenant.")
@click.option("--all", "every", is_flag=True, help="Also those that are revoked or have expired.")
@json_option
def list_keys(tenant: str | None, every: bool, as_json: bool) -> None:
    """List keys, the newest first."""
    with open_catalog() as catalog:
        found = [key for key in catalog.keys(tenant=tenant) if every or _is_in_use(key)]
    columns = ("ID", "KEY", "ALIAS", "TENANT", "SCOPES", "MODELS", "LIMITS", "STATE", "EXPIRES", "LAST USED")
    rows = [
        (
            key.id,
            key.key_name,
            key.key_alias,
            key.tenant,
            " ".join(key.scopes),
            _ALL if key.models is None else " ".join(key.models),
            _describe(key),
            _state(key),
            key.expires and when(key.expires),
            key.last_used_at and when(key.last_used_at),
        )
        for key in found
    ]
    none = "no keys; make the first one with `loray keys create --scope admin`"
    tell(table(columns, rows) if rows else none, [key.model_dump(mode="json") for key in found], as_json)


@keys.command()
@click.argument("key")
@click.option("--alias", "key_alias", help="What people call it.")
@click.option("--model", "models", multiple=True, help="Only this model; may be given several times. `all`: all.")
@click.option("--expires", metavar="DURATION", help="When it ends, from now, such as 90d. `never`: it does not.")
@click.option("--metadata", "pairs", multiple=True, metavar="KEY=VALUE", help="Replaces what is noted; repeatable.")
@_limit_options(takes_away=True)
@json_option
def update(
    key: str,
    key_alias: str | None,
    models: tuple[str, ...],
    expires: str | None,
    pairs: tuple[str, ...],
    as_json: bool,
    **limits: Any,
) -> None:
    """Change KEY; what is left out stays, and `none` takes a limit away. Servers follow within two seconds."""
    fields: dict[str, Any] = {} if key_alias is None else {"key_alias": key_alias}
    if models:
        fields["models"] = None if models == (_ALL,) else models
    if expires is not None:
        fields |= {"expires": None} if expires == _NEVER else {"duration": _duration(expires)}
    if pairs:
        fields["metadata"] = _metadata(pairs)
    fields |= _given_limits(limits)
    if not fields:
        raise click.UsageError("say what is to change")
    change = KeyChange.parse(fields, source="the command line")
    with open_catalog() as catalog:
        changed = catalog.change_key(_find(catalog, key), change)
    _show_key(changed, as_json, "is changed")


@keys.command()
@click.argument("key")
@click.option("--only-this", is_flag=True, help="The keys that it was rotated from and into go on.")
@json_option
def revoke(key: str, only_this: bool, as_json: bool) -> None:
    """Revoke KEY for ever, with those that it was rotated from and into. Every server refuses it within two seconds."""
    with open_catalog() as catalog:
        _show_key(catalog.revoke_key(_find(catalog, key), only_this=only_this), as_json, "revoked")


@keys.command()
@click.argument("key")
@click.option("--off", is_flag=True, help="Let it pass again.")
@json_option
def block(key: str, off: bool, as_json: bool) -> None:
    """Refuse KEY until `loray keys block KEY --off`."""
    with open_catalog() as catalog:
        changed = catalog.change_key(_find(catalog, key), KeyChange(blocked=not off))
    _show_key(changed, as_json, "passes again" if off else "is blocked")


@keys.command()
@click.argument("key")
@click.option("--grace", metavar="DURATION", help="How long the old one goes on, such as 1h (default: not at all).")
@json_option
def rotate(key: str, grace: str | None, as_json: bool) -> None:
    """Replace KEY by a new one with the same alias, scopes and limits."""
    with open_catalog() as catalog:
        made = catalog.rotate_key(_find(catalog, key), grace_period=None if grace is None else _duration(grace))
    _show_new_key(made, as_json)


def _find(catalog: CatalogClient | CatalogService, given: str) -> str:
    """Returns the id of the key that people name by its id or its alias."""
    if given.startswith("key-"):
        return given
    found = [key for key in catalog.keys(key_alias=given) if _is_in_use(key)]
    if not found:
        raise KeyNotFound(f"no key {given!r} in use; `loray keys ls` lists them")
    if len(found) > 1:
        raise SpecError(
            f"{len(found)} keys have the alias {given!r}; name one by its id: {', '.join(k.id for k in found)}"
        )
    return found[0].id


def _is_in_use(key: KeyResource) -> bool:
    return _state(key) in ("good", "blocked")


def _state(key: KeyResource) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires is not None and key.expires <= datetime.now(UTC):
        return "expired"
    return "blocked" if key.blocked else "good"


def _duration(given: str) -> Duration:
    try:
        return TypeAdapter(Duration).validate_python(given)
    except ValidationError as e:
        raise SpecError(f"{given!r} is not a duration; write a number with s, m, h or d, such as 90d") from e


def _metadata(given: tuple[str, ...]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in given)
    if not all("=" in pair and pair[0] != "=" for pair in given):
        raise SpecError("give --metadata as KEY=VALUE, with a key that is not empty")
    return found


def _show_new_key(made: NewKeyResource, as_json: bool) -> None:
    if as_json:
        emit(made.model_dump(mode="json"))
        return
    click.echo(made.key)
    about = f"{made.id}, {made.key_alias}, of tenant {made.tenant}, may {', '.join(made.scopes)}"
    click.echo(f"{about}; it is shown this once: export LORAY_API_KEY=…", err=True)


def _show_key(key: KeyResource, as_json: bool, what: str) -> None:
    tell(f"{key.id} ({key.key_alias}) {what}", key.model_dump(mode="json"), as_json)


@click.group()
def tenants() -> None:
    """Tenants: create, list, limit and block them. What one has, the others do not see unless it is shared.

    With LORAY_URL these commands ask a server, with an administrator's LORAY_API_KEY.
    """


@tenants.command("create")
@click.argument("name")
@_limit_options(of_tenant=True)
@json_option
def create_tenant(name: str, as_json: bool, **limits: Any) -> None:
    """Make the tenant NAME, with limits for all its keys together."""
    with open_catalog() as catalog:
        made = catalog.create_tenant(name, _limits_from(limits))
    line = f"made tenant {name}; give it a key with `loray keys create --tenant {name} --scope …`"
    tell(line, made.model_dump(mode="json"), as_json)


@tenants.command("ls")
@json_option
def list_tenants(as_json: bool) -> None:
    """List tenants."""
    with open_catalog() as catalog:
        found = catalog.tenants()
    columns = ("NAME", "LIMITS", "STATE", "CREATED")
    rows = [(t.name, _describe(t), "blocked" if t.blocked else "good", when(t.created_at)) for t in found]
    tell(table(columns, rows), [tenant.model_dump(mode="json") for tenant in found], as_json)


@tenants.command("set")
@click.argument("name")
@_limit_options(of_tenant=True, takes_away=True)
@click.option("--blocked/--unblocked", default=None, help="Refuse all its keys, or let them pass again.")
@click.option("--no-limits", is_flag=True, help="Take all limits away before those that are given.")
@json_option
def set_(name: str, blocked: bool | None, no_limits: bool, as_json: bool, **limits: Any) -> None:
    """Change limits of NAME; those that are left out stay, and `none` takes one away."""
    with open_catalog() as catalog:
        before = None if no_limits else catalog.tenant(name)
        changed = catalog.change_tenant(name, TenantChange(limits=_limits_from(limits, before), blocked=blocked))
    line = f"{name}: {_describe(changed) or 'no limits'}{', blocked' if changed.blocked else ''}"
    tell(line, changed.model_dump(mode="json"), as_json)
