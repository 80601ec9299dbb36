"""`loray catalog`: backups of the catalog's database, and whether its audit log was changed."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from loray.catalog.backup import BackupSummary
from loray.cli.output import emit, json_option, when
from loray.cli.services import open_services

_file = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


@click.group()
def catalog() -> None:
    """The catalog's database: back it up, restore it, and verify its audit log."""


@catalog.command()
@_file
@json_option
def backup(file: Path, as_json: bool) -> None:
    """Write all of the catalog to FILE, as it is now: names, versions, aliases, keys, jobs, usage, the audit log.

    Others publish and serve meanwhile. The bytes of the adapters are in the store: copy that after the catalog.
    """
    with open_services() as services, Console(stderr=True).status("writing the backup"):
        made = services.catalog.write_backup(file)
    _report("backed up", made, as_json)


@catalog.command()
@_file
@json_option
def restore(file: Path, as_json: bool) -> None:
    """Read the backup FILE into the catalog of LORAY_CATALOG, which must be empty. Stop its servers first.

    `loray store verify` says afterwards whether the store has the bytes of every version.
    """
    with open_services() as services, Console(stderr=True).status("reading the backup"):
        restored = services.catalog.read_backup(file)
    _report("restored", restored, as_json)


@catalog.command()
@click.option("--known", metavar="ID:HASH", help="An earlier end of the log, which must still be in it.")
@json_option
def verify(known: str | None, as_json: bool) -> None:
    """Compute the hashes of the audit log again: a changed or removed entry is found.

    Keep the last line's ID:HASH elsewhere. Whoever can write to the database can cut off the log's end, or make all
    hashes anew, and is found by nothing else.
    """
    number, _, sha256 = (known or "").partition(":")
    if known is not None and not (number.isdigit() and sha256):
        raise click.UsageError("--known is ID:HASH, as `loray catalog verify` prints it")
    with open_services() as services, Console(stderr=True).status("reading the audit log"):
        state = services.catalog.verify_audit(None if known is None else (int(number), sha256))
    if as_json:
        emit(state._asdict())
        return
    if state.num_unlinked:
        click.echo(f"{state.num_unlinked:,} entries of an older loray have no hash")
    click.echo(f"{state.num_entries:,} entries are as they were written\n{state.last_id}:{state.last_hash}")


def _report(done: str, backup: BackupSummary, as_json: bool) -> None:
    if as_json:
        emit({"created_at": backup.created_at, "names": backup.num_names, "versions": backup.num_versions})
    else:
        what = f"{backup.num_names:,} names and {backup.num_versions:,} versions"
        click.echo(f"{done} {what}, as of {when(backup.created_at)}")
