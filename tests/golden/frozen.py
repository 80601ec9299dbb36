"""What users, operators and importers hold on to, as the texts of golden files: `TEXTS` names each file's function.

A text depends on the code alone, and on the libraries of `LIBRARIES`, which write a part of it.
"""

from __future__ import annotations

import inspect
import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NotRequired, get_args, get_origin, get_type_hints
from unittest.mock import Mock

import click
import yaml
from fastapi import FastAPI
from pydantic import TypeAdapter

from jobs.events import Event, encode
from jobs.sweeps.driver import main as run_sweep
from jobs.train import main as run_training
from loray.bases.config import ModelConfig
from loray.bases.presets import preset
from loray.catalog import Catalog
from loray.cli.main import cli
from loray.errors import SettingsError
from loray.recipes.load import load_recipe
from loray.recipes.resolve import resolve
from loray.settings import Settings
from loray.spec import FIGURES, AdapterManifest, FleetSpec, ServeSpec, TrainSpec, UsageEvent
from loray.telemetry import METRICS, TRAINING_METRICS, Metric, figure_metrics
from serve_apps.api.services import Services
from serve_apps.api.site import create_app as catalog_app
from serve_apps.gateway.app import create_app as gateway_app
from tests.infra.manifests import QWEN3_8B

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent.parent
LIBRARIES = ("click", "fastapi", "gguf", "numpy", "peft", "pydantic", "safetensors", "torch", "transformers")


def as_json(data: Any) -> str:
    """Sorted JSON with one value a line."""
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def as_rows(data: Mapping[str, Any]) -> str:
    """A JSON object with one member a line, in the order of `data`."""
    rows = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in data.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


def versions() -> str:
    """The versions of the libraries that write a part of the golden files."""
    return as_rows({name: version(name) for name in LIBRARIES})


# -- HTTP -------------------------------------------------------------------------------------------------------------


def _gateway() -> str:
    """The gateway's OpenAPI document."""
    return as_json(gateway_app(Mock(), Mock(), files=Mock(), tuning=Mock()).openapi())


def _catalog_api() -> str:
    """The OpenAPI document of the catalog's API. The application opens neither store nor catalog for it."""
    with TemporaryDirectory() as home:
        services = Services(Settings.from_env({"LORAY_HOME": home}), Mock(), Mock())
        app: FastAPI = catalog_app(services, Mock())
        return as_json(app.openapi())


# -- commands ---------------------------------------------------------------------------------------------------------


def _commands() -> str:
    """Every command with its options, and the programs that jobs start."""
    programs = {"loray": cli, "python -m jobs.train": run_training, "python -m jobs.sweeps.driver": run_sweep}
    return "\n".join(line for name, command in programs.items() for line in _command(command, name, None))


def _command(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """A command and those below it, without `--help`, which all have and click makes when it is first asked for."""
    ctx = click.Context(command, info_name=name, parent=parent, **command.context_settings)
    yield " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)]) + " (hidden)" * command.hidden
    yield f"  {_first_paragraph(command.help)}"
    for option in command.params:
        if isinstance(option, click.Option):
            yield from _option(option, ctx)
    yield ""
    if isinstance(command, click.Group):
        for below in sorted(command.list_commands(ctx)):
            child = command.get_command(ctx, below)
            assert child is not None, below
            yield from _command(child, below, ctx)


def _option(option: click.Option, ctx: click.Context) -> Iterator[str]:
    names = " / ".join(", ".join(group) for group in (option.opts, option.secondary_opts) if group)
    default = option.get_default(ctx, call=False)
    marks = [
        "" if option.is_flag else f"{option.make_metavar(ctx)}{_bounds(option.type)}",
        f"= {default!r}" if isinstance(default, str | int | float | list | tuple) and default is not False else "",
        "= computed" if callable(default) else "",
        f"from {option.envvar}" if option.envvar else "",
        "required" * option.required,
        "repeated" * option.multiple,
        "hidden" * option.hidden,
    ]
    yield "    " + " ".join([names, *filter(None, marks)])
    if option.help:
        yield f"        {_first_paragraph(option.help)}"


def _bounds(kind: click.ParamType[Any]) -> str:
    told: Mapping[str, Any] = {**kind.to_info_dict()}
    found = [f"{sign}{told[bound]}" for bound, sign in (("min", "≥"), ("max", "≤")) if told.get(bound) is not None]
    return f" ({', '.join(found)})" if found else ""


def _first_paragraph(text: str | None) -> str:
    """It is one line of the file, wherever the code breaks its lines."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


# -- metrics and settings ---------------------------------------------------------------------------------------------


def _metrics() -> str:
    """Metrics of serving, and then of training."""
    tables = METRICS, TRAINING_METRICS, figure_metrics(FIGURES)
    return "".join(f"{_metric(m)}\n" for table in tables for m in table.values())


def _metric(metric: Metric) -> str:
    labels = f"{{{','.join(metric.labels)}}}" if metric.labels else ""
    return " ".join([f"{metric.name}{labels}", metric.kind, *(f"{bound:g}" for bound in metric.buckets)])


def _settings() -> str:
    """The variables that are known, and the value of each setting where none is set."""
    told = ""
    try:
        Settings.from_env({"LORAY_NOT_KNOWN": "1"})
    except SettingsError as e:
        told = str(e).partition("known are")[2]
    names = re.findall(r"LORAY_\w+", told)
    chosen = Settings.from_env({"LORAY_HOME": "/home"})
    defaults = [f"{field.name} = {_shown(getattr(chosen, field.name))}" for field in fields(Settings)]
    return "\n".join([*sorted(names), "", "LORAY_HOME=/home", *defaults]) + "\n"


def _shown(value: object) -> str:
    return repr(str(value) if isinstance(value, Path) else value)


# -- recipes and serve specs ------------------------------------------------------------------------------------------


def _shape(base: str) -> ModelConfig | None:
    if base == "qwen3-8b":
        return ModelConfig.from_hf(QWEN3_8B)
    return preset("smollm2" if base.startswith("smollm2") else base)


def _shipped() -> Iterator[tuple[str, Path, Any]]:
    """(folder/name, path, content) of each YAML document that is shipped."""
    for folder in ("platform", "serve_apps", "infra", "examples"):
        for path in sorted((REPOSITORY / folder).rglob("*.yaml")):
            for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
                if isinstance(document, dict):
                    yield f"{path.parent.name}/{path.stem}", path, document


def _recipes() -> str:
    """Every shipped recipe with its defaults, and what it means on its base."""
    found = {}
    for name, path, document in _shipped():
        if document.keys() >= {"adapter", "data"}:
            spec = load_recipe(str(path), shape_of=_shape).spec
            base = _shape(spec.base)
            assert base is not None, f"the shape of {spec.base} is not known here; add it"
            resolved = resolve(spec, base)
            assert name not in found, path
            found[name] = {
                "recipe": spec.model_dump(mode="json"),
                "context": resolved.context,
                "original_context": resolved.original_context,
                "row_length": resolved.row_length,
                "group_size": resolved.group_size,
                "rope": resolved.rope and resolved.rope.model_dump(mode="json"),
            }
    return as_json(found)


def _serve_specs() -> str:
    """The deployment of every shipped Serve configuration, and those that are used where a file gives nothing."""
    found = {"default": FleetSpec.of(ServeSpec()), "default/cuda": FleetSpec.of(ServeSpec(device="cuda"))}
    for name, _, document in _shipped():
        inner = document.get("spec")
        config = inner.get("serveConfigV2") if isinstance(inner, dict) else None
        for application in (yaml.safe_load(config) if config else document).get("applications", ()):
            if application["import_path"] == "serve_apps.app:build":
                found[name] = FleetSpec.parse(application["args"], source=name)
    return as_json({name: fleet.model_dump(mode="json") for name, fleet in found.items()})


# -- formats ----------------------------------------------------------------------------------------------------------


def _schemas() -> str:
    """JSON schemas of what crosses a boundary, without descriptions: these are prose, and the format is frozen here."""
    schemas = {
        model.__name__: model.model_json_schema() for model in (TrainSpec, ServeSpec, FleetSpec, AdapterManifest)
    }
    schemas["UsageEvent"] = TypeAdapter(UsageEvent).json_schema()
    return as_json({name: _without_prose(schema) for name, schema in schemas.items()})


def _without_prose(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_prose(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for name, value in schema.items():
        if name in ("properties", "$defs"):
            kept[name] = {member: _without_prose(part) for member, part in value.items()}
        elif name not in ("title", "description"):
            kept[name] = _without_prose(value)
    return kept


def _events() -> str:
    """The fields of a run's events, and lines as they are written."""
    found: dict[str, dict[str, str]] = {}
    for kind in get_args(Event):
        hints = get_type_hints(kind, include_extras=True)
        (name,) = get_args(hints.pop("event"))
        found[name] = {field: _type(hint) for field, hint in sorted(hints.items())}
    for name in ("step", "eval"):
        found[name] |= dict.fromkeys(FIGURES, "float | None?")
    step: Any = {"event": "step", "step": 3, "loss": float("nan"), "lr": 1e-3, "rewards/margins": 0.5}
    used = UsageEvent(
        request_id="r-1",
        tenant="acme",
        key_id=None,
        model="acme/tone",
        digest="0" * 64,
        num_prompt_tokens=12,
        num_cached_tokens=8,
        num_output_tokens=3,
        tier="default",
        seconds=0.25,
        outcome="ok",
        created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )
    return as_json({"events": found, "lines": {"step": encode(step), "usage": used.to_json()}})


def _type(hint: Any) -> str:
    """A type as one writes it. A field that may be missing has a question mark."""
    if get_origin(hint) is NotRequired:
        return f"{_type(get_args(hint)[0])}?"
    is_plain = isinstance(hint, type) and not get_args(hint)
    return str(hint.__name__ if is_plain else hint).replace("typing.", "")


def _tables() -> str:
    """The tables of a new catalog: columns with their types, keys and indexes, whatever migrations made them."""
    lines = []
    with TemporaryDirectory() as folder:
        file = Path(folder) / "catalog.db"
        Catalog(f"sqlite:///{file}").close()
        with closing(sqlite3.connect(file)) as database:
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
            for (table,) in tables.fetchall():
                if not table.startswith("sqlite_"):
                    lines += [table, *sorted(_columns(database, table)), *sorted(_indexes(database, table)), ""]
            (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return "\n".join([*lines, f"revision {revision}"]) + "\n"


def _columns(database: sqlite3.Connection, table: str) -> Iterator[str]:
    references = {row[3]: f" → {row[2]}.{row[4]}" for row in database.execute(f"PRAGMA foreign_key_list({table})")}
    for _, name, kind, is_needed, default, key in database.execute(f"PRAGMA table_info({table})"):
        needed = " NOT NULL" * is_needed
        given = "" if default is None else f" DEFAULT {default}"
        place = f" KEY {key}" if key else ""
        yield f"  {name} {kind}{needed}{given}{place}{references.get(name, '')}"


def _indexes(database: sqlite3.Connection, table: str) -> Iterator[str]:
    for _, name, is_unique, *_ in database.execute(f"PRAGMA index_list({table})").fetchall():
        columns = [row[2] or "…" for row in database.execute(f"PRAGMA index_info({name})")]
        shown = "" if name.startswith("sqlite_") else f" {name}"
        yield f"  {'unique' if is_unique else 'index'}{shown} ({', '.join(columns)})"


TEXTS: Mapping[str, Callable[[], str]] = {
    "openapi-gateway.json": _gateway,
    "openapi-catalog.json": _catalog_api,
    "commands.txt": _commands,
    "metrics.txt": _metrics,
    "settings.txt": _settings,
    "recipes.json": _recipes,
    "serve-specs.json": _serve_specs,
    "schemas.json": _schemas,
    "events.json": _events,
    "tables.txt": _tables,
}
