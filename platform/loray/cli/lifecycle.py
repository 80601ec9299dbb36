"""`loray adapters promote, canary, rollback, rm, restore, release`: on store and catalog, or at LORAY_URL's server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from loray.api.canaries import CanaryResource
from loray.catalog import Catalog, split_model
from loray.cli import describe
from loray.cli.interactive.completing import complete_models
from loray.cli.output import console, emit, json_option
from loray.cli.services import open_catalog, open_remote, open_services
from loray.client import CatalogClient
from loray.errors import ConflictError, NotFoundError
from loray.publishing import restore as restore_stored
from loray.spec import DEFAULT_ALIAS, CanaryBounds

no_gate_option = click.option(
    "--no-gate", metavar="REASON", help="Why a LongLoRA adapter gets the alias whatever was measured; recorded."
)


@click.command()
@click.argument("model", shell_complete=complete_models)
@click.argument("alias", default=DEFAULT_ALIAS)
@click.option("--expected", type=int, help="Only if the alias points at this version now (0: only if it is not set).")
@no_gate_option
@json_option
def promote(model: str, alias: str, expected: int | None, no_gate: str | None, as_json: bool) -> None:
    """Point ALIAS (default prod) at MODEL: `name@3`, `name@canary`, or `name` for the newest version.

    A LongLoRA adapter is given an alias where its perplexity earns it: see `loray eval perplexity --compare`.
    """
    name, selector = split_model(model)
    with open_remote() as client:
        if client is not None:
            target = version_of(client, name, selector or "newest")
            etag, create = _precondition(client, name, alias, expected)
            moved = client.promote(name, alias, target, etag=etag, create=create, no_gate=no_gate)
            described: dict[str, Any] = moved.model_dump(mode="json")
            _say(described if as_json else None, f"{name}@{alias} is version {moved.version} now")
            return
    with open_services() as services:
        if selector is None:
            target = max(services.catalog.adapter(name).entry.versions)
        else:
            target = services.catalog.resolve(model).version
        state = services.catalog.promote(name, alias, target, expected=expected, no_gate=no_gate)
        version = services.catalog.version(name, state.version)
    _say(describe.version_json(version) if as_json else None, f"{name}@{alias} is version {version.version} now")


@click.command()
@click.argument("name", shell_complete=complete_models)
@click.option("--version", type=click.IntRange(1), help="The version that gets a share of the alias's requests.")
@click.option("--percent", type=click.IntRange(1, 99), help="How many of 100 requests it gets.")
@click.option("--alias", default=DEFAULT_ALIAS, show_default=True, help="Whose requests are divided.")
@click.option("--end", is_flag=True, help="Give all requests to the alias's version again.")
@click.option("--max-error-rate", type=click.FloatRange(0, 1, max_open=True), help="Ends it: of its requests, 0.05.")
@click.option("--max-ttft-ratio", type=click.FloatRange(0, min_open=True), help="Ends it: of the stable version's, 2.")
@click.option("--max-itl-ratio", type=click.FloatRange(0, min_open=True), help="Ends it: of the stable version's, 2.")
@click.option("--min-requests", type=click.IntRange(1, 1_000_000), help="Before which times are not compared, 50.")
@no_gate_option
@json_option
def canary(
    name: str,
    version: int | None,
    percent: int | None,
    alias: str,
    end: bool,
    no_gate: str | None,
    as_json: bool,
    **limits: float | None,
) -> None:
    """Give a version of NAME a share of an alias's requests; without options, show the canary.

    It is ended by itself where it leaves a bound. Repeat it with another --percent to change the share. `promote` gives
    it all requests; --end or `rollback` gives it none.
    """
    wanted = {field: value for field, value in limits.items() if value is not None}
    if (version is None) != (percent is None) or (end and version is not None) or (wanted and version is None):
        raise click.UsageError("give --version and --percent, or --end, or neither to see the canary")
    with open_catalog() as catalog:
        if end:
            found = catalog.end_canary(name, alias)
        elif version is None or percent is None:
            found = catalog.canary(name, alias)
        else:
            bounds = _bounds(catalog, name, alias, version, wanted) if wanted else None
            found = catalog.set_canary(name, alias, version, percent, bounds=bounds, no_gate=no_gate)
    shown = found if isinstance(found, CanaryResource) else CanaryResource.of(found)
    if as_json:
        emit(shown.model_dump(mode="json"))
    else:
        console().print(describe.canaries([shown]))


@click.command()
@click.argument("name", shell_complete=complete_models)
@click.argument("alias", default=DEFAULT_ALIAS)
@json_option
def rollback(name: str, alias: str, as_json: bool) -> None:
    """Point ALIAS (default prod) of NAME back at where it pointed before its last move, or end its canary."""
    with open_remote() as client:
        if client is not None:
            moved = client.rollback(name, alias)
            line = f"{name}@{alias} is version {moved.version} again"
            _say(moved.model_dump(mode="json") if as_json else None, line)
            return
    with open_services() as services:
        version = services.catalog.version(name, services.catalog.rollback(name, alias).version)
    _say(describe.version_json(version) if as_json else None, f"{name}@{alias} is version {version.version} again")


@click.command()
@click.argument("model", shell_complete=complete_models)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def rm(model: str, yes: bool, as_json: bool) -> None:
    """Delete MODEL: `name` with all its versions and aliases, or one version, `name@3`.

    It can be restored until `loray store gc` deletes its bytes, 30 days later. A version stays while an
    alias points at it, or it is a canary.
    """
    name, version = _name_and_version(model)
    if not yes:
        click.confirm(f"delete {model}{'' if version else ' with all its versions and aliases'}?", abort=True)
    with open_remote() as client:
        if client is not None:
            client.delete(name, version)
        else:
            with open_services() as services:
                if version is None:
                    services.catalog.delete_adapter(name)
                else:
                    services.catalog.delete_version(name, version)
    deleted = {"deleted": model} if as_json else None
    _say(deleted, f"deleted {model}; `loray adapters restore {model}` brings it back")


@click.command()
@click.argument("model", shell_complete=complete_models)
@json_option
def restore(model: str, as_json: bool) -> None:
    """Restore a deleted MODEL, `name` or `name@3`."""
    name, version = _name_and_version(model)
    with open_remote() as client:
        if client is not None:
            client.restore(name, version)
        else:
            with open_services() as services:
                restore_stored(name, version, services.store, services.catalog)
    _say({"restored": model} if as_json else None, f"restored {model}")


@click.command()
@click.argument("model", shell_complete=complete_models)
@json_option
def release(model: str, as_json: bool) -> None:
    """Serve MODEL again, `name`, `name@3` or `name@canary`, on which replicas have died, before its time is over."""
    name, selector = split_model(model)
    with open_remote() as client:
        if client is not None:
            version = version_of(client, name, selector)
            client.release(name, version)
        else:
            with open_services() as services:
                version = services.catalog.resolve(model).version
                services.catalog.release(name, version)
    released = {"released": f"{name}@{version}"} if as_json else None
    _say(released, f"released {name}@{version}: the next request tries it")


def _bounds(
    catalog: CatalogClient | Catalog, name: str, alias: str, version: int, wanted: Mapping[str, float]
) -> CanaryBounds:
    """Those of the version's running canary, else the defaults, with what is wanted instead."""
    try:
        known = catalog.canary(name, alias)
    except NotFoundError:
        return CanaryBounds.model_validate(wanted)
    runs = known.outcome is None and known.version == version
    return CanaryBounds.model_validate((known.bounds if runs else CanaryBounds()).model_dump() | dict(wanted))


def version_of(client: CatalogClient, name: str, selector: str | None) -> int:
    """The version that `name`, `name@3` or `name@alias` means at the server, or the newest."""
    if selector is None:
        return client.adapter(name).version
    if selector == "newest":
        return max(client.adapter(name).versions)
    return int(selector) if selector.isascii() and selector.isdigit() else client.alias(name, selector).version


def _precondition(client: CatalogClient, name: str, alias: str, expected: int | None) -> tuple[str | None, bool]:
    """(ETag, whether the alias must not be set) for `--expected`."""
    if expected is None:
        return None, False
    try:
        state = client.alias(name, alias)
    except NotFoundError:
        if expected == 0:
            return None, True
        raise
    if state.version != expected:
        raise ConflictError(f"alias {alias!r} of {name!r} points at version {state.version}, not {expected or 'unset'}")
    return state.etag, False


def _name_and_version(model: str) -> tuple[str, int | None]:
    """The parts of `name` or `name@3`."""
    name, selector = split_model(model)
    if selector is None:
        return name, None
    if not (selector.isascii() and selector.isdigit()):
        raise click.UsageError(f"{model!r} must be a name or one version of it, as in {name}@3")
    return name, int(selector)


def _say(data: dict[str, Any] | None, line: str) -> None:
    if data is not None:
        emit(data)
    else:
        click.echo(line)
