"""`loray adapters`: published adapters, their versions and aliases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import click

from loray.api.canaries import CanaryResource
from loray.bases.registry import base_with, get_base
from loray.catalog import AdapterVersion, split_model
from loray.cli import describe
from loray.cli.access.share import share, transfer
from loray.cli.interactive.completing import complete_models
from loray.cli.lifecycle import canary, no_gate_option, promote, release, restore, rm, rollback
from loray.cli.output import Verification, console, emit, json_option, progress_bar, report
from loray.cli.search import search, tag
from loray.cli.services import open_remote, open_services
from loray.cli.transfer import pull, push
from loray.errors import IntegrityError, NotFoundError
from loray.publishing import Destination, base_of, import_folder
from loray.publishing.convert import convert_to_lora, merge_into_base, save_as_gguf
from loray.settings import Settings
from loray.spec import AdapterManifest, ToolParserName
from loray.text.templates import ChatTemplate


@click.group()
def adapters() -> None:
    """Published adapters: import, list, search, tag, show, promote, roll back, share, convert and verify them.

    MODEL is `name` (its alias prod where it is set, else its newest version), `name@3` or `name@alias`; an adapter of
    another tenant than `default` is `tenant/name`.
    """


# Form → the option that it needs, and those that it may have.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "lora": ("name", "aliases", "no_gate"),
    "merged": ("folder", "dtype", "as_trained"),
    "gguf": ("file",),
}

for command in (search, tag, share, transfer, promote, canary, rollback, rm, restore, release, push, pull):
    adapters.add_command(command)
adapters.add_command(pull, "download")


@adapters.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Publish it as the next version of this adapter.")
@click.option("--base", "base_name", help="The base model it was trained on (default: found from the folder).")
@click.option("--alias", "aliases", multiple=True, help="Point this alias at it; may be given several times.")
@click.option("--version", type=int, help="Ask for this version number; refused where another adapter has it.")
@no_gate_option
@click.option("--licence", help="Its licence, as an SPDX identifier.")
@click.option("--description", default="", help="One line for people.")
@click.option(
    "--tool-parser", type=click.Choice(get_args(ToolParserName)), help="How it writes tool calls (default: its base)."
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
    as_json: bool,
) -> None:
    """Publish FOLDER, a LoRA or VeRA adapter saved by PEFT (or one published by another loray).

    Checked first: format, options, shapes against the base, file hashes. Only safetensors are read. A
    chat_template.jinja in FOLDER is published with it.
    """
    if (template := folder / AdapterManifest.TEMPLATE_FILE).is_file():
        ChatTemplate(template.read_text(encoding="utf-8", errors="replace"))  # refuses what is not valid
    with open_services() as services:
        home = services.settings.home
        base = get_base(home, base_name) if base_name else base_of(folder, home)
        published = import_folder(
            folder,
            base,
            Destination(name, services.store, services.catalog, aliases=aliases, version=version, no_gate=no_gate),
            licence=licence,
            description=description,
            tool_parser=tool_parser,
        )
    _print_version(published, as_json, f"published {published.label}")


@adapters.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List all adapters."""
    with open_remote() as client:
        if client is not None:
            rows = describe.of_resources(client.adapters())
        else:
            with open_services() as services:
                rows = describe.all_adapters(services.catalog.snapshot())
    if as_json:
        emit(rows)
    elif not rows:
        click.echo("no adapters yet; publish one with `loray train`, `loray adapters import` or `loray adapters push`")
    else:
        console().print(describe.adapters(rows))


@adapters.command()
@click.argument("model", shell_complete=complete_models)
@json_option
def show(model: str, as_json: bool) -> None:
    """Show MODEL: versions, aliases, where it comes from and what was measured.

    A server does not tell how aliases moved, nor what its gate would refuse.
    """
    name, selector = split_model(model)
    settings: Settings | None = None
    with open_remote() as client:
        if client is not None:
            detail = describe.detail_of(client, name)
            shown = detail.entry.select(selector)
        else:
            with open_services() as services:
                shown = services.catalog.resolve(model)
                detail = services.catalog.adapter(shown.name)
                settings = services.settings
    version = next(v for v in detail.versions if v.version == shown.version)
    if as_json:
        described = describe.detail_json(detail, version)
        if client is not None:
            del described["alias_moves"]
        emit(described)
        return
    out = console()
    out.print(describe.lineage(version, settings))
    if version.evaluations:
        out.print(describe.evaluations(version.evaluations))
    out.print(describe.versions(detail))
    if detail.moves:
        out.print(describe.moves(detail))
    if detail.canaries:
        out.print(describe.canaries(map(CanaryResource.of, detail.canaries)))


@adapters.command()
@click.argument("model", shell_complete=complete_models)
@click.option("--to", "form", type=click.Choice(list(_NEEDED)), required=True, help="What it is to become.")
@click.option("--name", help="lora: publish it as the next version of this adapter.")
@click.option("--alias", "aliases", multiple=True, help="lora: point this alias at it; may be given several times.")
@no_gate_option
@click.option("--folder", type=click.Path(path_type=Path), help="merged: the new folder of the checkpoint.")
@click.option("--file", type=click.Path(path_type=Path), help="gguf: the new file.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="merged: its tensors' (default the base's).")
@click.option("--as-trained", is_flag=True, default=None, help="merged: into the base as it was quantised in training.")
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
    lora    a VeRA adapter as a LoRA adapter that computes the same, published under --name
    merged  base and adapter as one checkpoint in --folder: RoPE scaling, norms and embeddings included
    gguf    GGUF-LoRA in --file, which llama.cpp loads beside the base's GGUF
    """
    given: dict[str, object] = {"name": name, "no_gate": no_gate, "aliases": aliases, "file": file}
    given |= {"folder": folder, "dtype": dtype, "as_trained": as_trained}
    needed, *may = _NEEDED[form]
    if given[needed] is None or any(given[option] for option in given.keys() - {needed, *may}):
        raise click.UsageError(f"--to {form} needs --{needed}, and nothing of the other forms")
    with open_services() as services:
        ref = services.catalog.resolve(model)
        manifest = services.catalog.version(ref.name, ref.version).manifest
        base = base_with(services.settings.home, manifest.base_fingerprint, manifest.base)
        if name is None:
            if folder is not None:
                merge_into_base(ref, folder, base=base, store=services.store, dtype=dtype, as_trained=bool(as_trained))
                line = f"merged {ref.label} into {base.name}: {folder}"
            else:
                assert file is not None
                save_as_gguf(ref, file, base=base, store=services.store)
                line = f"wrote {ref.label} as GGUF: {file}"
            if as_json:
                emit({"adapter": ref.label, "digest": ref.digest, needed: str(given[needed])})
            else:
                click.echo(line)
            return
        version = convert_to_lora(
            ref, base, Destination(name, services.store, services.catalog, aliases=aliases, no_gate=no_gate)
        )
    _print_version(version, as_json, f"published {version.label}, converted from {ref.label}")


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
            refs = [ref for entry in services.catalog.adapters() for _, ref in sorted(entry.versions.items())]
        else:
            refs = [services.catalog.resolve(model or "")]
        verified: list[Verification] = []
        with progress_bar() as progress:
            for i, ref in enumerate(refs):
                try:
                    services.store.verify(ref.digest)
                except (IntegrityError, NotFoundError) as e:
                    verified.append(Verification(ref.label, {"digest": ref.digest}, error=f"{ref.label}: {e}"))
                else:
                    verified.append(Verification(ref.label, {"digest": ref.digest}))
                progress("verifying", (i + 1) / len(refs))
    report(verified, as_json)


def _print_version(version: AdapterVersion, as_json: bool, line: str) -> None:
    if as_json:
        emit(describe.version_json(version))
    else:
        click.echo(line)
