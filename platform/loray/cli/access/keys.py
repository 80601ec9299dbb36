"""`loray keys`: API keys, of the catalog or at the server of LORAY_URL."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from loray.api.access import KeyChange, KeyCreation, KeyResource, NewKeyResource
from loray.catalog.identity.keys import new_secret
from loray.cli.access.options import describe, given_limits, limit_options
from loray.cli.access.services import Access, open_access
from loray.cli.output import console, emit, json_option, table, when
from loray.errors import KeyNotFound, SpecError
from loray.spec import SCOPES, Duration, Scope

_ALL, _NEVER = "all", "never"  # what takes a key's models and its end away


@click.group()
def keys() -> None:
    """API keys: create, list, change, block, rotate and revoke them.

    While there is no key, a server on this machine's loopback needs none. KEY is a key's id or its alias. With
    LORAY_URL these commands ask a server, with the LORAY_API_KEY of an administrator, of all or of one tenant.
    """


@keys.command()
@click.argument("alias", required=False)
@click.option(
    "--scope", "scopes", type=click.Choice(SCOPES), multiple=True, help="What it may do (default infer); repeatable."
)
@click.option("--tenant", help="Whose it is (default: that of LORAY_API_KEY; without a server, `default`).")
@click.option("--model", "models", multiple=True, help="Only this model; may be given several times.")
@click.option("--expires", metavar="DURATION", help="When it ends, such as 12h or 90d (default: it does not).")
@limit_options()
@click.option("--static", is_flag=True, help="Make one for the deployment itself, which the catalog does not keep.")
@json_option
def create(
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
        if as_json:
            emit({"key": secret, "sha256": hashed})
        else:
            click.echo(f"LORAY_API_KEY={secret}\nLORAY_API_KEYS_SHA256={hashed}")
        return
    scopes = scopes or ("infer",)
    fields: dict[str, Any] = {"key_alias": alias or scopes[0], "scopes": scopes}
    fields |= {} if tenant is None else {"tenant": tenant}
    fields |= {"models": models} if models else {}
    fields |= {} if expires is None else {"duration": _duration(expires)}
    wanted = KeyCreation.parse(fields | given_limits(limits), source="the command line")
    with open_access() as access:
        made = access.create_key(wanted)
    _show_new(made, as_json)


@keys.command("ls")
@click.option("--tenant", help="Only keys of this tenant.")
@click.option("--all", "every", is_flag=True, help="Also those that are revoked or have expired.")
@json_option
def ls(tenant: str | None, every: bool, as_json: bool) -> None:
    """List keys, the newest first."""
    with open_access() as access:
        found = [key for key in access.keys(tenant=tenant) if every or _is_in_use(key)]
    if as_json:
        emit([key.model_dump(mode="json") for key in found])
    elif not found:
        click.echo("no keys; make the first one with `loray keys create --scope admin`")
    else:
        columns = ("ID", "KEY", "ALIAS", "TENANT", "SCOPES", "MODELS", "LIMITS", "STATE", "EXPIRES", "LAST USED")
        rows = [
            (
                key.id,
                key.key_name,
                key.key_alias,
                key.tenant,
                " ".join(key.scopes),
                _ALL if key.models is None else " ".join(key.models),
                describe(key),
                _state(key),
                key.expires and when(key.expires),
                key.last_used_at and when(key.last_used_at),
            )
            for key in found
        ]
        console().print(table(columns, rows))


@keys.command()
@click.argument("key")
@click.option("--alias", "key_alias", help="What people call it.")
@click.option("--model", "models", multiple=True, help="Only this model; may be given several times. `all`: all.")
@click.option("--expires", metavar="DURATION", help="When it ends, from now, such as 90d. `never`: it does not.")
@click.option("--metadata", "pairs", multiple=True, metavar="KEY=VALUE", help="Replaces what is noted; repeatable.")
@limit_options(takes_away=True)
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
    fields |= given_limits(limits)
    if not fields:
        raise click.UsageError("say what is to change: `loray keys update --help`")
    change = KeyChange.parse(fields, source="the command line")
    with open_access() as access:
        changed = access.change_key(_find(access, key), change)
    _show(changed, as_json, "is changed")


@keys.command()
@click.argument("key")
@click.option("--only-this", is_flag=True, help="The keys that it was rotated from and into go on.")
@json_option
def revoke(key: str, only_this: bool, as_json: bool) -> None:
    """Revoke KEY for ever, with those that it was rotated from and into. Every server refuses it within two seconds."""
    with open_access() as access:
        _show(access.revoke_key(_find(access, key), only_this=only_this), as_json, "revoked")


@keys.command()
@click.argument("key")
@click.option("--off", is_flag=True, help="Let it pass again.")
@json_option
def block(key: str, off: bool, as_json: bool) -> None:
    """Refuse KEY until `loray keys block KEY --off`."""
    with open_access() as access:
        changed = access.change_key(_find(access, key), KeyChange(blocked=not off))
    _show(changed, as_json, "passes again" if off else "is blocked")


@keys.command()
@click.argument("key")
@click.option("--grace", metavar="DURATION", help="How long the old one goes on, such as 1h (default: not at all).")
@json_option
def rotate(key: str, grace: str | None, as_json: bool) -> None:
    """Replace KEY by a new one with the same alias, scopes and limits."""
    with open_access() as access:
        made = access.rotate_key(_find(access, key), grace_period=None if grace is None else _duration(grace))
    _show_new(made, as_json)


def _find(access: Access, given: str) -> str:
    """The id of the key that people name by its id or its alias."""
    if given.startswith("key-"):
        return given
    found = [key for key in access.keys(key_alias=given) if _is_in_use(key)]
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
        raise SpecError("--metadata is KEY=VALUE, and its key is not empty")
    return found


def _show_new(made: NewKeyResource, as_json: bool) -> None:
    if as_json:
        emit(made.model_dump(mode="json"))
        return
    click.echo(made.key)
    about = f"{made.id}, {made.key_alias}, of tenant {made.tenant}, may {', '.join(made.scopes)}"
    click.echo(f"{about}; it is shown this once: export LORAY_API_KEY=…", err=True)


def _show(key: KeyResource, as_json: bool, what: str) -> None:
    if as_json:
        emit(key.model_dump(mode="json"))
    else:
        click.echo(f"{key.id} ({key.key_alias}) {what}")
