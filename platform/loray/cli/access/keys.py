"""`loray keys`: API keys."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from loray.api.access import KeyResource, ends_at
from loray.catalog import Catalog
from loray.catalog.identity import NewKey
from loray.catalog.identity.keys import new_secret
from loray.cli.access.options import describe, limit_options, limits_from
from loray.cli.output import console, emit, json_option, table, when
from loray.cli.services import open_services
from loray.errors import KeyNotFound, SpecError
from loray.spec import DEFAULT_TENANT, KEY_START, SCOPES, ApiKey, Duration, Scope, duration_s

_PAGE = 1000


@click.group()
def keys() -> None:
    """API keys: create, list, block, rotate and revoke them.

    While there is no key, a server on this machine's loopback needs none. KEY is a key's id or its alias.
    """


@keys.command()
@click.argument("alias", required=False)
@click.option(
    "--scope", "scopes", type=click.Choice(SCOPES), multiple=True, help="What it may do (default infer); repeatable."
)
@click.option("--tenant", default=DEFAULT_TENANT, show_default=True, help="Whose it is.")
@click.option("--model", "models", multiple=True, help="Only this model; may be given several times.")
@click.option("--expires", metavar="DURATION", help="When it ends, such as 12h or 90d (default: it does not).")
@limit_options()
@click.option("--static", is_flag=True, help="Make one for the deployment itself, which the catalog does not keep.")
@json_option
def create(
    alias: str | None,
    scopes: tuple[Scope, ...],
    tenant: str,
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
        if as_json:
            emit({"key": secret, "sha256": hashed})
        else:
            click.echo(f"LORAY_API_KEY={secret}\nLORAY_API_KEYS_SHA256={hashed}")
        return
    scopes = scopes or ("infer",)
    with open_services() as services:
        made = services.catalog.create_key(
            alias or scopes[0],
            tenant=tenant,
            scopes=scopes,
            models=models or None,
            limits=limits_from(limits),
            expires_at=None if expires is None else ends_at(_duration(expires)),
        )
    _show_new(made, as_json)


@keys.command("ls")
@click.option("--tenant", help="Only keys of this tenant.")
@click.option("--all", "every", is_flag=True, help="Also those that are revoked or have expired.")
@json_option
def ls(tenant: str | None, every: bool, as_json: bool) -> None:
    """List keys, the newest first."""
    with open_services() as services:
        found = [key for key in _all(services.catalog, tenant) if every or _state(key) in ("good", "blocked")]
    if as_json:
        emit([KeyResource.of(key).model_dump(mode="json") for key in found])
    elif not found:
        click.echo("no keys; make the first one with `loray keys create --scope admin`")
    else:
        columns = ("ID", "KEY", "ALIAS", "TENANT", "SCOPES", "MODELS", "LIMITS", "STATE", "EXPIRES", "LAST USED")
        rows = [
            (
                key.id,
                f"{KEY_START}{key.prefix}…",
                key.alias,
                key.tenant,
                " ".join(sorted(key.scopes)),
                "all" if key.models is None else " ".join(sorted(key.models)),
                describe(key.limits),
                _state(key),
                key.expires_at and when(key.expires_at),
                key.last_used_at and when(key.last_used_at),
            )
            for key in found
        ]
        console().print(table(columns, rows))


@keys.command()
@click.argument("key")
@json_option
def revoke(key: str, as_json: bool) -> None:
    """Revoke KEY for ever. Every server refuses it within two seconds."""
    with open_services() as services:
        _show(services.catalog.revoke_key(_find(services.catalog, key)), as_json, "revoked")


@keys.command()
@click.argument("key")
@click.option("--off", is_flag=True, help="Let it pass again.")
@json_option
def block(key: str, off: bool, as_json: bool) -> None:
    """Refuse KEY until `loray keys block KEY --off`."""
    with open_services() as services:
        changed = services.catalog.update_key(_find(services.catalog, key), blocked=not off)
    _show(changed, as_json, "passes again" if off else "is blocked")


@keys.command()
@click.argument("key")
@click.option("--grace", metavar="DURATION", help="How long the old one goes on, such as 1h (default: not at all).")
@json_option
def rotate(key: str, grace: str | None, as_json: bool) -> None:
    """Replace KEY by a new one with the same alias, scopes and limits."""
    seconds = 0 if grace is None else duration_s(_duration(grace))
    with open_services() as services:
        made = services.catalog.rotate_key(_find(services.catalog, key), grace=timedelta(seconds=seconds))
    _show_new(made, as_json)


def _find(catalog: Catalog, given: str) -> str:
    """The id of the key that people name by its id or its alias."""
    if given.startswith("key-"):
        return given
    found = [key for key in catalog.keys(limit=_PAGE, alias=given).keys if _state(key) in ("good", "blocked")]
    if not found:
        raise KeyNotFound(f"no key {given!r} in use; `loray keys ls` lists them")
    if len(found) > 1:
        raise SpecError(
            f"{len(found)} keys have the alias {given!r}; name one by its id: {', '.join(k.id for k in found)}"
        )
    return found[0].id


def _all(catalog: Catalog, tenant: str | None) -> list[ApiKey]:
    found: list[ApiKey] = []
    cursor: str | None = None
    while True:
        page = catalog.keys(limit=_PAGE, cursor=cursor, tenant=tenant)
        found += page.keys
        if (cursor := page.next) is None:
            return found


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is not None and key.expires_at <= datetime.now(UTC):
        return "expired"
    return "blocked" if key.blocked else "good"


def _duration(given: str) -> Duration:
    try:
        return TypeAdapter(Duration).validate_python(given)
    except ValidationError as e:
        raise SpecError(f"{given!r} is not a duration; write a number with s, m, h or d, such as 90d") from e


def _show_new(made: NewKey, as_json: bool) -> None:
    if as_json:
        emit(KeyResource.of(made.key).model_dump(mode="json") | {"key": made.secret})
        return
    click.echo(made.secret)
    about = f"{made.key.id}, {made.key.alias}, of tenant {made.key.tenant}, may {', '.join(sorted(made.key.scopes))}"
    click.echo(f"{about}; it is shown this once: export LORAY_API_KEY=…", err=True)


def _show(key: ApiKey, as_json: bool, what: str) -> None:
    if as_json:
        emit(KeyResource.of(key).model_dump(mode="json"))
    else:
        click.echo(f"{key.id} ({key.alias}) {what}")
