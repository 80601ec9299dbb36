"""Options and checks that `loray up` and `loray serve` share: a serve spec and its file, keys, names and ports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import click

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import CatalogError, ConflictError, SettingsError, SpecError
from loray.locations import is_on_loopback
from loray.settings import Settings
from loray.spec import FleetSpec, KvCacheDType, ToolParserName, read_mapping
from loray.telemetry import get_logger

_log = get_logger(__name__)

_OPTIONS = (
    click.option(
        "--spec",
        "spec_file",
        type=click.Path(path_type=Path),
        help="A YAML file with FleetSpec's fields: one base's, or several bases.",
    ),
    click.option("--base", help="The base model (default smollm2)."),
    click.option("--host", help="Address to listen at (default 127.0.0.1)."),
    click.option("--port", type=int, help="Port to listen at (default 8000)."),
    click.option("--pool-bytes", help="Memory for KV cache and adapters, for instance 512MiB."),
    click.option(
        "--kv-cache-dtype",
        type=click.Choice(get_args(KvCacheDType)),
        help="Keys and values: int8 takes half the memory of 16 bits (default auto: as the weights).",
    ),
    click.option("--host-bytes", help="Memory for adapters that wait outside the pool, for instance 1GiB."),
    click.option("--max-num-seqs", type=int, help="Requests that run at once."),
    click.option(
        "--tool-parser",
        type=click.Choice(get_args(ToolParserName)),
        help="How the base writes tool calls (default: detected from its tokenizer and chat template).",
    ),
    click.option("--s3", is_flag=True, help="Keep adapters in an S3 server on this machine, from now on."),
)


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of both commands. `spec_file` and `s3` are not fields of ServeSpec."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_spec(file: Path | None, options: dict[str, Any]) -> FleetSpec:
    """Read the file's fields, overridden by the command line's. `options`: None where an option was left out.

    Raises SpecError, also for options that would be one base's where the file has several.
    """
    given = {name: value for name, value in options.items() if value is not None}
    fields = {} if file is None else read_mapping(file)
    if file is not None:
        FleetSpec.parse(fields, source=str(file))  # its own mistakes, before those of the command line
    if "bases" in fields and (others := sorted(given.keys() - {"num_gateways", "host", "port"})):
        options_given = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise SpecError(f"{file} has `bases`, so their fields are set there; leave out {options_given}")
    bounds = {name: given.pop(name) for name in ("min_replicas", "max_replicas") if name in given}
    fields |= given
    if bounds:
        fields["autoscaling"] = (fields.get("autoscaling") or {}) | bounds
    return FleetSpec.parse(fields, source="the command line" if file is None else f"{file} with the command line")


def check_keys(host: str, settings: Settings) -> None:
    """Raise SettingsError where others than this machine could ask, and nobody has made a key that they would need."""
    if is_on_loopback(host) or settings.static_key_hashes:
        return
    catalog = Catalog(settings.catalog)
    try:
        has_key = any(stored.key.revoked_at is None for stored in catalog.keys.changes().keys)
    finally:
        catalog.close()
    if not has_key:
        raise SettingsError(
            f"{host} can be reached from other machines, and there is no API key yet: make the first one with "
            "`loray keys create --scope admin`, or set LORAY_API_KEY, and start again; or listen at 127.0.0.1"
        )


def reserve_names(bases: Iterable[BaseModel], settings: Settings) -> None:
    """Reserve the names of bases that are going to be served, so that no adapter is published under one of them.

    The catalog learns whose quantised forms they are. Raises ConflictError where an adapter has the name, in whose
    place the base would answer, or where the catalog knows the base as another's form. While the catalog is away
    nothing is reserved, and the bases are served nevertheless.
    """
    try:
        catalog = Catalog(settings.catalog)
        try:
            known, forms = catalog.bases.fingerprints(), catalog.bases.forms()
            for base in bases:
                is_new_form = base.of is not None and forms.get(base.fingerprint) != base.of
                if base.name not in known or is_new_form:
                    catalog.bases.add(base.name, base.fingerprint, base.of)
        finally:
            catalog.close()
    except ConflictError as e:
        raise ConflictError(
            f"{e}: it would answer in the adapter's place; add the base under another name (`loray base add … --name`)"
        ) from e
    except CatalogError as e:
        _log.warning("the names of the bases are not reserved, the catalog is away: %s", e)


def cannot_listen(host: str, port: int, error: OSError, command: str) -> ConflictError:
    return ConflictError(
        f"cannot listen at {host}:{port} ({error.strerror}); choose another port, as in `{command} --port {port + 1}`"
    )
