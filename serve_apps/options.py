"""What `loray up` and `loray serve` share: the options of a serve spec, its file, and the refusal of a taken port."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from loray.errors import ConflictError
from loray.spec import ServeSpec, ToolParserName

_OPTIONS = (
    click.option("--spec", "spec_file", type=click.Path(path_type=Path), help="A YAML file with ServeSpec's fields."),
    click.option("--base", help="The base model (default smollm2)."),
    click.option("--host", help="Address to listen at (default 127.0.0.1)."),
    click.option("--port", type=int, help="Port to listen at (default 8000)."),
    click.option("--pool-bytes", help="Memory for KV cache and adapters, for instance 512MiB."),
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
    """Adds the options of both commands. `spec_file` and `s3` are not fields of ServeSpec."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_spec(file: Path | None, options: dict[str, Any]) -> ServeSpec:
    """The file's fields, overridden by the command line's. `options`: None where an option was left out."""
    given = {name: value for name, value in options.items() if value is not None}
    fields = {} if file is None else ServeSpec.from_yaml(file).model_dump(exclude_unset=True)
    bounds = {name: given.pop(name) for name in ("min_replicas", "max_replicas") if name in given}
    fields |= given
    if bounds:
        fields["autoscaling"] = (fields.get("autoscaling") or {}) | bounds
    return ServeSpec.parse(fields, source="the command line" if file is None else f"{file} with the command line")


def cannot_listen(spec: ServeSpec, error: OSError, command: str) -> ConflictError:
    return ConflictError(
        f"cannot listen at {spec.host}:{spec.port} ({error.strerror}); choose another port, as in `{command} --port "
        f"{spec.port + 1}`"
    )
