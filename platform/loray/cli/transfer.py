"""`loray adapters push, pull`: folders of adapters to the server of LORAY_URL, and from it or the store."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import get_args

import click

from loray.adapters.manifest import published_files
from loray.api.uploads import DownloadForm
from loray.bases.registry import base_with
from loray.catalog import split_model
from loray.cli.interactive.completing import complete_models
from loray.cli.lifecycle import no_gate_option, version_of
from loray.cli.output import emit, json_option, progress_bar
from loray.cli.services import Services, needed_remote, open_remote, open_services
from loray.errors import DataError
from loray.files import appearing, file_sha256
from loray.publishing.convert import merge_into_base, save_as_gguf
from loray.spec import AdapterManifest, ToolParserName


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Publish it as the next version of this adapter.")
@click.option("--base", help="The server's base model that it was trained on (default: found from the folder).")
@click.option("--alias", "aliases", multiple=True, help="Point this alias at it; may be given several times.")
@no_gate_option
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
    """Upload FOLDER, a LoRA or VeRA adapter saved by PEFT, to the server of LORAY_URL, and publish it there.

    An upload that broke off is continued when the command is repeated. The server checks the folder as a whole.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
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
    if as_json:
        emit(version.model_dump(mode="json"))
    else:
        click.echo(f"published {version.label}")


@click.command()
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
    with open_remote() as client:
        if client is not None:
            version = version_of(client, name, selector)
            client.fetch(name, version, target, form)
            label = f"{name}@{version}"
        else:
            with open_services() as services:
                label = _from_store(services, model, target, form)
    if as_json:
        emit({"model": label, "path": target, "format": form})
    else:
        click.echo(f"downloaded {label} to {target}")


def _from_store(services: Services, model: str, target: Path, form: DownloadForm) -> str:
    ref = services.catalog.resolve(model)
    if form == "peft":
        with appearing(target) as made:
            services.store.fetch(ref.digest, made)
        return ref.label
    base = base_with(services.settings.home, ref.base_fingerprint, "its base")
    if form == "merged":
        merge_into_base(ref, target, base=base, store=services.store)
    else:
        save_as_gguf(ref, target, base=base, store=services.store)
    return ref.label
