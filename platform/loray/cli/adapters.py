"""`loray adapters`: published adapters in the store and the catalog, or at the server of LORAY_URL."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from loray.adapters.manifest import published_files
from loray.bases.registry import base_with, get_base
from loray.catalog import split_model
from loray.catalog.entries import parse_tags
from loray.cli import describe
from loray.cli.connect import complete_models, find_version, needed_remote, open_catalog, open_services
from loray.cli.output import Verification, console, emit, json_option, pairs, progress_bar, report, tell
from loray.client import CatalogClient
from loray.errors import ConflictError, DataError, IntegrityError, NotFoundError, SpecError
from loray.files import file_sha256
from loray.publishing import Destination, base_of, import_folder
from loray.publishing.convert import convert_to_lora, import_as_lora, merge_into_base, save_as_gguf
from loray.schemas.resources import AliasResource, DownloadForm
from loray.spec import DEFAULT_ALIAS, AdapterManifest, CanaryBounds, Method, ToolParserName, Visibility
from loray.text.templates import ChatTemplate

if TYPE_CHECKING:
    from loray.service import CatalogService

# Form → the option that it needs, and those that it may have.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "lora": ("name", "aliases", "no_gate"),
    "merged": ("folder", "dtype", "as_trained"),
    "gguf": ("file",),
}
_no_gate_option = click.option(
    "--no-gate", metavar="REASON", help="Why a LongLoRA adapter gets the alias whatever was measured; recorded."
)


@click.group()
def adapters() -> None:
    """Published adapters: import, list, search, tag, show, promote, roll back, share, convert and verify them.

    MODEL is `name` (its alias prod where it is set, else its newest version), `name@3` or `name@alias`; an adapter of
    another tenant than `default` is `tenant/name`.
    """


@adapters.command()
@click.argument("name")
@click.option("--with", "tenants", metavar="TENANT,…", help="These tenants see it, and no others.")
@click.option("--public", is_flag=True, help="Every tenant sees it.")
@click.option("--private", is_flag=True, help="Its own tenant alone sees it.")
@json_option
def share(name: str, tenants: str | None, public: bool, private: bool, as_json: bool) -> None:
    """Say who sees NAME and may ask it, beside its own tenant, which alone changes it.

    NAME is `tenant/name`, or a bare name of the default tenant.
    """
    if [tenants is not None, public, private].count(True) != 1:
        raise click.UsageError("give one of --with, --public and --private")
    shared_with = () if tenants is None else tuple(filter(None, (t.strip() for t in tenants.split(","))))
    visibility: Visibility = "public" if public else "private" if private else "shared"
    with open_catalog() as catalog:
        changed = catalog.share(name, visibility, shared_with)
    tell(f"{changed.name} is seen by {describe.seen_by(changed)}", describe.adapter_json(changed), as_json)


@adapters.command()
@click.argument("name")
@click.option("--to", "tenant", required=True, metavar="TENANT", help="Whose it is to be.")
@click.option("--name", "new_name", help="What it is called there (default: as it is).")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def transfer(name: str, tenant: str, new_name: str | None, yes: bool, as_json: bool) -> None:
    """Hand NAME to another tenant, with versions, aliases, tags and evaluations. Its old name is free then.

    For administrators. Refused where the tenant has an adapter of that name, or a job trains for it.
    """
    if not yes:
        click.confirm(f"hand {name} to tenant {tenant}? requests for {name} will not find it any more", abort=True)
    with open_catalog() as catalog:
        changed = catalog.transfer(name, tenant, new_name)
    tell(f"{name} is {changed.name} now", describe.adapter_json(changed), as_json)


@adapters.command()
@click.argument("model", shell_complete=complete_models)
@click.argument("alias", default=DEFAULT_ALIAS)
@click.option("--expected", type=int, help="Only if the alias points at this version now (0: only if it is not set).")
@_no_gate_option
@json_option
def promote(model: str, alias: str, expected: int | None, no_gate: str | None, as_json: bool) -> None:
    """Point ALIAS (default prod) at MODEL: `name@3`, `name@canary`, or `name` for the newest version.

    A LongLoRA adapter is given an alias where its perplexity earns it: see `loray eval perplexity --compare`.
    """
    name, selector = split_model(model)
    with open_catalog() as catalog:
        target = max(catalog.adapter(name).versions) if selector is None else find_version(catalog, name, selector)
        etag, create = _precondition(catalog, name, alias, expected)
        moved = catalog.promote(name, alias, target, etag=etag, create=create, no_gate=no_gate)
        shown = _moved_json(catalog, name, moved) if as_json else None
    tell(f"{name}@{alias} is version {moved.version} now", shown, as_json)


@adapters.command()
@click.argument("name", shell_complete=complete_models)
@click.option("--version", type=click.IntRange(1), help="The version that gets a share of the alias's requests.")
@click.option("--percent", type=click.IntRange(1, 99), help="How many of 100 requests it gets.")
@click.option("--alias", default=DEFAULT_ALIAS, show_default=True, help="Whose requests are divided.")
@click.option("--end", is_flag=True, help="Give all requests to the alias's version again.")
@click.option("--max-error-rate", type=click.FloatRange(0, 1, max_open=True), help="Ends it: of its requests, 0.05.")
@click.option("--max-ttft-ratio", type=click.FloatRange(0, min_open=True), help="Ends it: of the stable version's, 2.")
@click.option("--max-itl-ratio", type=click.FloatRange(0, min_open=True), help="Ends it: of the stable version's, 2.")
@click.option("--min-requests", type=click.IntRange(1, 1_000_000), help="Before which times are not compared, 50.")
@_no_gate_option
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
    tell(describe.canaries([found]), found.model_dump(mode="json"), as_json)


@adapters.command()
@click.argument("name", shell_complete=complete_models)
@click.argument("alias", default=DEFAULT_ALIAS)
@json_option
def rollback(name: str, alias: str, as_json: bool) -> None:
    """Point ALIAS (default prod) of NAME back at where it pointed before its last move, or end its canary."""
    with open_catalog() as catalog:
        moved = catalog.rollback(name, alias)
        shown = _moved_json(catalog, name, moved) if as_json else None
    tell(f"{name}@{alias} is version {moved.version} again", shown, as_json)


@adapters.command()
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
    with open_catalog() as catalog:
        catalog.delete(name, version)
    tell(f"deleted {model}; `loray adapters restore {model}` brings it back", {"deleted": model}, as_json)


@adapters.command()
@click.argument("model", shell_complete=complete_models)
@json_option
def restore(model: str, as_json: bool) -> None:
    """Restore a deleted MODEL, `name` or `name@3`."""
    name, version = _name_and_version(model)
    with open_catalog() as catalog:
        catalog.restore(name, version)
    tell(f"restored {model}", {"restored": model}, as_json)


@adapters.command()
@click.argument("model", shell_complete=complete_models)
@json_option
def release(model: str, as_json: bool) -> None:
    """Serve MODEL again, `name`, `name@3` or `name@canary`, on which replicas have died, before its time is over."""
    name, selector = split_model(model)
    with open_catalog() as catalog:
        version = find_version(catalog, name, selector)
        catalog.release(name, version)
    tell(f"released {name}@{version}: the next request tries it", {"released": f"{name}@{version}"}, as_json)


def _moved_json(catalog: CatalogClient | CatalogService, name: str, moved: AliasResource) -> dict[str, Any]:
    """Returns the alias, and the version that it points at. `name`: as it was given, for it may be another tenant's."""
    return describe.version_json(catalog.version(name, moved.version)) | moved.model_dump(mode="json")


def _bounds(
    catalog: CatalogClient | CatalogService, name: str, alias: str, version: int, wanted: Mapping[str, float]
) -> CanaryBounds:
    """Returns the bounds of the version's running canary, else the defaults, with what is wanted instead."""
    try:
        known = catalog.canary(name, alias)
    except NotFoundError:
        return CanaryBounds.model_validate(wanted)
    runs = known.outcome is None and known.version == version
    return CanaryBounds.model_validate((known.bounds if runs else CanaryBounds()).model_dump() | dict(wanted))


def _precondition(
    catalog: CatalogClient | CatalogService, name: str, alias: str, expected: int | None
) -> tuple[str | None, bool]:
    """Returns (ETag, whether the alias must not be set) for `--expected`."""
    if expected is None:
        return None, False
    try:
        state = catalog.alias(name, alias)
    except NotFoundError:
        if expected == 0:
            return None, True
        raise
    if state.version != expected:
        raise ConflictError(
            f"alias {alias!r} of {name!r} points at version {state.version}, not {expected or 'unset'}; to move it "
            f"all the same, give --expected {state.version}"
        )
    return state.etag, False


def _name_and_version(model: str) -> tuple[str, int | None]:
    """Returns the parts of `name` or `name@3`."""
    name, selector = split_model(model)
    if selector is None:
        return name, None
    if not (selector.isascii() and selector.isdigit()):
        raise click.UsageError(f"{model!r} must be a name or one version of it, as in {name}@3")
    return name, int(selector)


@adapters.command()
@click.argument("text", default="")
@click.option("--tag", "tags", multiple=True, metavar="KEY[=VALUE]", help="With this tag; may be given several times.")
@click.option("--base", help="Of this base model.")
@click.option("--method", type=click.Choice(get_args(Method)))
@click.option("--tenant", help="Of this tenant.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True)
@json_option
def search(
    text: str,
    tags: tuple[str, ...],
    base: str | None,
    method: str | None,
    tenant: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List adapters whose names contain TEXT, in upper or lower case."""
    wanted: dict[str, Any] = {"search": text or None, "tags": parse_tags(tags), "base": base, "method": method}
    with open_catalog() as catalog:
        found = islice(catalog.adapters(**wanted, tenant=tenant), limit + 1)
        rows = [describe.adapter_json(adapter) for adapter in found]
    none = "no adapter is like that; `loray adapters ls` lists all"
    tell(describe.adapters(rows[:limit]) if rows else none, rows[:limit], as_json)
    if len(rows) > limit and not as_json:
        click.echo(f"the first {limit}; there are more (--limit)")


@adapters.command()
@click.argument("name", shell_complete=complete_models)
@click.argument("tags", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--unset", "unset", multiple=True, metavar="KEY", help="Take this tag away; may be given several times.")
@json_option
def tag(name: str, tags: tuple[str, ...], unset: tuple[str, ...], as_json: bool) -> None:
    """Set tags of NAME, take some away, and show those that it has then.

    Tags are for people and programs that look for adapters: `loray adapters search --tag KEY=VALUE`.
    """
    wanted = parse_tags(tags)
    valueless = [key for key, value in wanted.items() if value is None]
    if valueless:
        raise SpecError(f"give {valueless[0]!r} a value, as {valueless[0]}=VALUE")
    with open_catalog() as catalog:
        for key, value in wanted.items():
            catalog.set_tag(name, key, value or "")
        for key in unset:
            catalog.delete_tag(name, key)
        found = catalog.tags(name)
    tell(pairs(list(found.items())) if found else f"{name} has no tags", found, as_json)


@adapters.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Publish it as the next version of this adapter.")
@click.option("--base", help="The server's base model that it was trained on (default: found from the folder).")
@click.option("--alias", "aliases", multiple=True, help="Point this alias at it; may be given several times.")
@_no_gate_option
@click.option("--licence", help="Its licence, as an SPDX identifier.")
@click.option("--description", help="One line for people.")
@click.option("--tool-parser", type=click.Choice(get_args(ToolParserName)), help="How it writes tool calls.")
@json_option
def push(
    folder: Path,
    name: str,
    base: str | None,
    aliases: tuple[str, ...],
    no_gate: str | None,
    licence: str | None,
    description: str | None,
    tool_parser: ToolParserName | None,
    as_json: bool,
) -> None:
    """Upload FOLDER, an adapter saved by PEFT, to the server of LORAY_URL, and publish it there.

    An upload that broke off is continued when the command is repeated. The server checks the folder as a whole.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the one with the adapter's adapter_config.json")
    manifest = [path for path in (folder / AdapterManifest.FILE,) if path.is_file()]
    files = {path: file_sha256(path) for path in published_files(folder) + manifest}
    content = hashlib.sha256(repr(sorted((p.name, sha256) for p, sha256 in files.items())).encode()).hexdigest()
    with needed_remote() as client, progress_bar() as progress:
        upload = client.begin_upload(content)
        there = {file.name: file.sha256 for file in upload.files}
        for i, (path, sha256) in enumerate(files.items()):
            if not upload.published and there.get(path.name) != sha256:
                client.put_file(upload.id, path)
            progress("uploading", (i + 1) / len(files))
        version = client.register(
            name,
            upload=upload.id,
            aliases=aliases,
            no_gate=no_gate,
            base=base,
            licence=licence,
            description=description,
            tool_parser=tool_parser,
        )
    tell(f"published {version.label}", version.model_dump(mode="json"), as_json)


@adapters.command()
@click.argument("model", shell_complete=complete_models)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(get_args(DownloadForm)), default="peft", show_default=True)
@json_option
def pull(model: str, target: Path, form: DownloadForm, as_json: bool) -> None:
    """Write MODEL to the new folder TARGET, from the server of LORAY_URL or from the store.

    \b
    peft    what PEFT loads, and `push` and `import` take
    merged  base and adapter as one checkpoint, as `loray adapters convert --to merged` makes it
    gguf    GGUF-LoRA for llama.cpp: TARGET is the new file
    """
    name, selector = split_model(model)
    with open_catalog() as catalog:
        version = find_version(catalog, name, selector)
        catalog.fetch(name, version, target, form)
    label = f"{name}@{version}"
    tell(f"downloaded {label} to {target}", {"model": label, "path": target, "format": form}, as_json)


adapters.add_command(pull, "download")


@adapters.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Publish it as the next version of this adapter.")
@click.option("--base", "base_name", help="The base model it was trained on (default: found from the folder).")
@click.option("--alias", "aliases", multiple=True, help="Point this alias at it; may be given several times.")
@click.option("--version", type=int, help="Ask for this version number; refused where another adapter has it.")
@_no_gate_option
@click.option("--licence", help="Its licence, as an SPDX identifier.")
@click.option("--description", default="", help="One line for people.")
@click.option(
    "--tool-parser", type=click.Choice(get_args(ToolParserName)), help="How it writes tool calls (default: its base)."
)
@click.option("--rank", type=click.IntRange(1), help="Make LoRA of this rank of another kind of adapter.")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="Or LoRA with this share of the change.")
@click.option(
    "--max-energy-lost", type=click.FloatRange(0, 1), help="Refuse where more is lost (default 0.01, or by --energy)."
)
@json_option
def import_(
    folder: Path,
    name: str,
    base_name: str | None,
    aliases: tuple[str, ...],
    version: int | None,
    no_gate: str | None,
    licence: str | None,
    description: str,
    tool_parser: ToolParserName | None,
    rank: int | None,
    energy: float | None,
    max_energy_lost: float | None,
    as_json: bool,
) -> None:
    """Publish FOLDER, an adapter saved by PEFT of a method that is served (or one published by another loray).

    Checked first: format, options, shapes against the base, file hashes. Only safetensors are read. A
    chat_template.jinja in FOLDER is published with it.

    Other kinds that add to linear modules (LoHa, LoKr, FourierFT and more) become LoRA with --rank or --energy, which
    loads the base in float32 and says how much of the change is lost.
    """
    if rank is not None and energy is not None:
        raise click.UsageError("give --rank or --energy, not both")
    if max_energy_lost is not None and rank is None and energy is None:
        raise click.UsageError("--max-energy-lost is for --rank and --energy")
    if (template := folder / AdapterManifest.TEMPLATE_FILE).is_file():
        ChatTemplate(template.read_text(encoding="utf-8", errors="replace"))  # refuses what is not valid
    with open_services() as services:
        home = services.settings.home
        base = get_base(home, base_name) if base_name else base_of(folder, home)
        to = Destination(name, services.store, services.catalog, aliases=aliases, version=version, no_gate=no_gate)
        about: dict[str, Any] = {"licence": licence, "description": description, "tool_parser": tool_parser}
        if rank is None and energy is None:
            published = import_folder(folder, base, to, **about)
            tell(f"published {published.label}", describe.version_json(published), as_json)
            return
        published, made = import_as_lora(
            folder, base, to, rank=rank, energy=energy, max_energy_lost=max_energy_lost, **about
        )
    shown = describe.version_json(published) | {"approximation": made._asdict()}
    tell(f"published {published.label}, {made}", shown, as_json)


@adapters.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List all adapters."""
    with open_catalog() as catalog:
        rows = [describe.adapter_json(adapter) for adapter in catalog.adapters()]
    none = "no adapters yet; publish one with `loray train`, `loray adapters import` or `loray adapters push`"
    tell(describe.adapters(rows) if rows else none, rows, as_json)


@adapters.command()
@click.argument("model", shell_complete=complete_models)
@json_option
def show(model: str, as_json: bool) -> None:
    """Show MODEL: versions, aliases, where it comes from and what was measured.

    A server does not tell how aliases moved, nor what its gate would refuse.
    """
    name, selector = split_model(model)
    with open_catalog() as catalog:
        version = catalog.version(name, find_version(catalog, name, selector))
        adapter = catalog.adapter(name)
        versions = [catalog.version(name, number) for number in adapter.versions]
        here = None if isinstance(catalog, CatalogClient) else catalog
        moves = None if here is None else here.moves(name)
        canaries = () if here is None else here.canaries(name)
        gate = None if here is None else describe.objections(version.manifest, version.evaluations, here.settings)
    if as_json:
        emit(describe.detail_json(adapter, version, versions, moves))
        return
    out = console()
    out.print(describe.lineage(version, gate))
    if version.evaluations:
        out.print(describe.evaluations(version.evaluations))
    out.print(describe.versions(adapter, versions))
    if moves:
        out.print(describe.moves(moves))
    if canaries:
        out.print(describe.canaries(canaries))


@adapters.command()
@click.argument("model", shell_complete=complete_models)
@click.option("--to", "form", type=click.Choice(list(_NEEDED)), required=True, help="What it is to become.")
@click.option("--name", help="lora: publish it as the next version of this adapter.")
@click.option("--alias", "aliases", multiple=True, help="lora: point this alias at it; may be given several times.")
@_no_gate_option
@click.option("--folder", type=click.Path(path_type=Path), help="merged: the new folder of the checkpoint.")
@click.option("--file", type=click.Path(path_type=Path), help="gguf: the new file.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="merged: its tensors' (default the base's).")
@click.option("--as-trained", is_flag=True, default=None, help="merged: into the base as it was quantized in training.")
@json_option
def convert(
    model: str,
    form: str,
    name: str | None,
    aliases: tuple[str, ...],
    no_gate: str | None,
    folder: Path | None,
    file: Path | None,
    dtype: str | None,
    as_trained: bool | None,
    as_json: bool,
) -> None:
    """Make MODEL something that other tools know.

    \b
    lora    a VeRA or MiSS adapter as a LoRA adapter that computes the same, published under --name
    merged  base and adapter as one checkpoint in --folder: RoPE scaling, norms and embeddings included
    gguf    GGUF-LoRA in --file, which llama.cpp loads beside the base's GGUF
    """
    given: dict[str, object] = {"name": name, "no_gate": no_gate, "aliases": aliases, "file": file}
    given |= {"folder": folder, "dtype": dtype, "as_trained": as_trained}
    needed, *may = _NEEDED[form]
    if given[needed] is None or any(given[option] for option in given.keys() - {needed, *may}):
        raise click.UsageError(f"--to {form} needs --{needed}, and nothing of the other forms")
    with open_services() as services:
        ref = services.catalog.adapters.resolve(model)
        manifest = services.catalog.adapters.version(ref.name, ref.version).manifest
        base = base_with(services.settings.home, manifest.base_fingerprint, manifest.base)
        if name is None:
            if folder is not None:
                merge_into_base(ref, folder, base=base, store=services.store, dtype=dtype, as_trained=bool(as_trained))
                line = f"merged {ref.label} into {base.name}: {folder}"
            else:
                assert file is not None
                save_as_gguf(ref, file, base=base, store=services.store)
                line = f"wrote {ref.label} as GGUF: {file}"
            tell(line, {"adapter": ref.label, "digest": ref.digest, needed: str(given[needed])}, as_json)
            return
        version = convert_to_lora(
            ref, base, Destination(name, services.store, services.catalog, aliases=aliases, no_gate=no_gate)
        )
    tell(f"published {version.label}, converted from {ref.label}", describe.version_json(version), as_json)


@adapters.command()
@click.argument("model", required=False, shell_complete=complete_models)
@click.option("--all", "every", is_flag=True, help="Verify every version of every adapter.")
@json_option
def verify(model: str | None, every: bool, as_json: bool) -> None:
    """Hash the stored bytes of MODEL again and compare with its digest."""
    if (model is None) != every:
        raise click.UsageError("give either MODEL or --all")
    with open_services() as services:
        if every:
            refs = [ref for entry in services.catalog.snapshot().models() for _, ref in sorted(entry.versions.items())]
        else:
            refs = [services.catalog.adapters.resolve(model or "")]
        verified: list[Verification] = []
        with progress_bar() as progress:
            for i, ref in enumerate(refs):
                error = None
                try:
                    services.store.verify(ref.digest)
                except (IntegrityError, NotFoundError) as e:
                    error = f"{ref.label}: {e}"
                verified.append(Verification(ref.label, {"digest": ref.digest}, error))
                progress("verifying", (i + 1) / len(refs))
    report(verified, as_json)
