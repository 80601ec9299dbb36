"""`loray catalog` and `loray store`: backup, verification, garbage and statistics."""

from __future__ import annotations

from pathlib import Path

import click
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from loray.catalog.backup import BackupSummary
from loray.cli.connect import open_services
from loray.cli.output import console, emit, json_option, progress_bar, table, tell, when
from loray.publishing import gc
from loray.spec import format_size
from loray.spec.access import Duration, duration_s
from loray.store.adapters import BLOBS, MANIFESTS, UPLOADS

_KINDS = (MANIFESTS, BLOBS, UPLOADS)
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
        made = services.catalog.backup.write(file)
    _report("backed up", made, as_json)


@catalog.command()
@_file
@json_option
def restore(file: Path, as_json: bool) -> None:
    """Read the backup FILE into the catalog of LORAY_CATALOG, which must be empty. Stop its servers first.

    `loray store verify` says afterwards whether the store has the bytes of every version.
    """
    with open_services() as services, Console(stderr=True).status("reading the backup"):
        restored = services.catalog.backup.read(file)
    _report("restored", restored, as_json)


@catalog.command("verify")
@click.option("--known", metavar="ID:HASH", help="An earlier end of the log, which must still be in it.")
@json_option
def verify_audit(known: str | None, as_json: bool) -> None:
    """Compute the hashes of the audit log again: a changed or removed entry is found.

    Keep the last line's ID:HASH elsewhere. Whoever can write to the database can cut off the log's end, or make all
    hashes anew, and is found by nothing else.
    """
    number, _, sha256 = (known or "").partition(":")
    if known is not None and not (number.isdigit() and sha256):
        raise click.UsageError("--known is ID:HASH, as `loray catalog verify` prints it")
    with open_services() as services, Console(stderr=True).status("reading the audit log"):
        state = services.catalog.audit.verify(None if known is None else (int(number), sha256))
    line = f"{state.num_entries:,} entries are as they were written\n{state.last_id}:{state.last_hash}"
    tell(line, state._asdict(), as_json)


def _report(done: str, backup: BackupSummary, as_json: bool) -> None:
    line = f"{done} {backup.num_names:,} names and {backup.num_versions:,} versions, as of {when(backup.created_at)}"
    data = {"created_at": backup.created_at, "names": backup.num_names, "versions": backup.num_versions}
    tell(line, data, as_json)


def _seconds(_: click.Context, __: click.Parameter, value: str) -> float:
    try:
        return float(duration_s(TypeAdapter(Duration).validate_python(value)))
    except ValidationError as e:
        raise click.BadParameter(f"{value!r} is not a time such as 90s, 30m, 24h or 30d") from e


@click.group()
def store() -> None:
    """The store of adapters: what it holds, whether it is whole, and what nothing needs."""


@store.command("gc")
@click.option("--yes", is_flag=True, help="Delete. Without it, nothing is changed.")
@click.option("--grace", default="24h", callback=_seconds, help="Keep what is younger (default 24h).")
@click.option("--keep-deleted", default="30d", callback=_seconds, help="Keep what was deleted since (default 30d).")
@json_option
def collect(yes: bool, grace: float, keep_deleted: float, as_json: bool) -> None:
    """Delete what no version needs: bytes of interrupted publications and uploads, and of adapters deleted long ago.

    Shows what it would delete; --yes deletes it. Publishing and serving go on meanwhile.
    """
    with open_services() as services, progress_bar() as progress:
        garbage = gc.find_garbage(services.store, services.catalog, grace_s=grace, keep_deleted_s=keep_deleted)
        objects = garbage.objects
        if yes and objects:
            objects = tuple(
                gc.collect(services.store, services.catalog, garbage, keep_deleted_s=keep_deleted, progress=progress)
            )
    num_bytes = sum(entry.num_bytes for entry in objects)
    if as_json:
        emit({"deleted": yes, "objects": [entry.key for entry in objects], "bytes": num_bytes})
        return
    for entry in objects:
        click.echo(f"{entry.key}  {format_size(entry.num_bytes)}")
    what = f"{len(objects):,} objects, {format_size(num_bytes)}"
    if yes or not objects:
        click.echo(f"deleted {what}")
    else:
        click.echo(f"{what} would be deleted; --yes deletes them")


@store.command("verify")
@json_option
def verify_objects(as_json: bool) -> None:
    """Hash every object of the store, and look for what versions need and the store lacks. Exits with 1 for damage."""
    with open_services() as services, progress_bar() as progress:
        found = gc.verify_store(services.store, services.catalog, progress=progress)
    if as_json:
        emit([{"object": d.key, "problem": d.problem, "needed_by": list(d.needed_by)} for d in found])
    for damage in found:
        adapters = ", ".join(digest[:12] for digest in damage.needed_by) or "no version"
        click.echo(f"error: {damage.key} {damage.problem}; needed by {adapters}", err=True)
    if found:
        click.echo(
            "publish what versions need once more, or restore these objects from a backup of the store", err=True
        )
        raise click.exceptions.Exit(1)
    if not as_json:
        click.echo("the store is whole")


@store.command()
@json_option
def stats(as_json: bool) -> None:
    """Show what the store holds: versions by tenant, method and base; and the objects, equal files once."""
    with open_services() as services:
        used = services.catalog.removal.stored_use()
        sizes = {kind: [e.num_bytes for e in services.store.objects.entries(f"{kind}/")] for kind in _KINDS}
    if as_json:
        objects = {kind: {"objects": len(found), "bytes": sum(found)} for kind, found in sizes.items()}
        emit({"versions": [row._asdict() for row in used], "objects": objects})
        return
    columns = ("TENANT", "METHOD", "BASE", "NAMES", "VERSIONS", "DELETED", "SIZE")
    rows = [(*row[:-1], format_size(row.nbytes)) for row in used]
    console().print(table(columns, rows, right=columns[3:]))
    for kind, found in sizes.items():
        click.echo(f"{kind}: {len(found):,} objects, {format_size(sum(found))}")
