"""`loray base`: the base models of this machine."""

from __future__ import annotations

import math
from typing import Any

import click

from loray.bases.checkpoint import tensor_infos
from loray.bases.registry import BaseModel, add_base, get_base, list_bases, verify_base
from loray.cli.output import Verification, count, json_option, pairs, progress_bar, report, table, tell
from loray.errors import IntegrityError
from loray.settings import Settings
from loray.spec import format_size


@click.group()
def base() -> None:
    """Base models: add, list and verify them."""


@base.command()
@click.argument("source")
@click.option("--name", help="What to call it (default: smollm2, the folder's or the model's name).")
@json_option
def add(source: str, name: str | None, as_json: bool) -> None:
    """Add SOURCE: `smollm2`, a folder with a Hugging Face checkpoint, or a Hugging Face id (OWNER/NAME).

    Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE checkpoints in safetensors are covered. Adding the same one
    again verifies it.
    """
    with progress_bar() as progress:
        added = add_base(source, home=Settings.from_env().home, name=name, progress=progress)
    tell(_shown(added), _as_json(added), as_json)


@base.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List the base models of this machine."""
    shown = [_as_json(b) for b in list_bases(Settings.from_env().home)]
    columns = ("NAME", "ARCHITECTURE", "PARAMETERS", "SIZE", "CONTEXT", "FINGERPRINT", "SOURCE")
    rows = [
        (
            f["name"],
            f["architecture"],
            count(f["num_parameters"]),
            format_size(f["nbytes"]),
            f["context_length"],
            f["fingerprint"][:12],
            f["source"],
        )
        for f in shown
    ]
    none = "no base models yet; add one with `loray base add smollm2`"
    tell(table(columns, rows, right=("PARAMETERS", "SIZE", "CONTEXT")) if rows else none, shown, as_json)


@base.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Verify all base models.")
@json_option
def verify(name: str | None, every: bool, as_json: bool) -> None:
    """Hash the weights of NAME again and compare with its fingerprint."""
    if (name is None) != every:
        raise click.UsageError("give either NAME or --all")
    home = Settings.from_env().home
    verified: list[Verification] = []
    with progress_bar() as progress:
        for b in list_bases(home) if every else [get_base(home, name or "")]:
            error = None
            try:
                verify_base(b, progress)
            except IntegrityError as e:
                error = str(e)
            verified.append(Verification(b.name, {} if error else {"fingerprint": b.fingerprint}, error))
    report(verified, as_json)


def _as_json(b: BaseModel) -> dict[str, Any]:
    infos = tensor_infos(b.path)
    return {
        "name": b.name,
        "architecture": b.config.architecture,
        "num_parameters": sum(math.prod(info.shape) for info in infos),
        "nbytes": sum(info.stop - info.start for info in infos),
        "context_length": b.config.max_position_embeddings,
        "fingerprint": b.fingerprint,
        "source": b.source,
        "path": str(b.path),
    }


def _shown(b: BaseModel) -> Any:
    f = _as_json(b)
    return pairs(
        [
            ("base model", b.name),
            ("architecture", f["architecture"]),
            ("parameters", f"{count(f['num_parameters'])} ({format_size(f['nbytes'])})"),
            ("context", f"{f['context_length']} tokens"),
            ("fingerprint", b.fingerprint),
            ("source", b.source),
            ("folder", b.path),
        ]
    )
