"""`loray eval tasks`: tasks of lm-evaluation-harness, through a server."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from loray.bases.registry import get_base
from loray.catalog import split_model
from loray.cli.connect import find_version, open_catalog, open_remote, open_services
from loray.cli.output import console, emit, json_option, table
from loray.errors import EvaluationError, SpecError
from loray.schemas.resources import VersionDetail
from loray.settings import Settings
from loray.spec import Evaluation

_DEFAULT_URL = "http://127.0.0.1:8000"
_LAST_LINES = 15


@click.command("tasks")
@click.argument("model")
@click.argument("tasks", nargs=-1, required=True)
@click.option("--url", help=f"Of the server that serves MODEL; default: LORAY_URL, else {_DEFAULT_URL}.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before each question; default: the task's.")
@click.option("--limit", type=click.IntRange(1), help="Only so many questions of each task.")
@click.option("--num-concurrent", type=click.IntRange(1), default=8, show_default=True, help="Requests at once.")
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of the harness's task files, beside its own tasks.",
)
@click.option("--no-record", is_flag=True, help="Do not keep the figures in the catalog.")
@json_option
def tasks(
    model: str,
    tasks: tuple[str, ...],
    url: str | None,
    num_fewshot: int | None,
    limit: int | None,
    num_concurrent: int,
    include_path: Path | None,
    no_record: bool,
    as_json: bool,
) -> None:
    """Run TASKS of lm-evaluation-harness on a published adapter, MODEL, through a server's completions.

    The harness is a package of its own: pip install 'lm-eval[api]'. The version that the name means now is measured.
    """
    if find_spec("lm_eval") is None:
        raise SpecError("lm-evaluation-harness is not installed: pip install 'lm-eval[api]'")
    settings = Settings.from_env()
    version = _version_of(model)
    options = {"--num_fewshot": num_fewshot, "--limit": limit, "--include_path": include_path}
    with tempfile.TemporaryDirectory(prefix="loray-tasks-") as folder:
        arguments = {
            "model": version.label,
            "base_url": f"{url or settings.url or _DEFAULT_URL}/v1/completions",
            "tokenizer": str(get_base(settings.home, version.manifest.base).path),
            "num_concurrent": num_concurrent,
        }
        _run(settings, arguments, tasks, {k: v for k, v in options.items() if v is not None}, Path(folder))
        measured = read_results(Path(folder))
    if not no_record:
        _record(version, measured)
    _show(version, measured, is_recorded=not no_record, as_json=as_json)


def _version_of(model: str) -> VersionDetail:
    name, selector = split_model(model)
    with open_catalog() as catalog:
        return catalog.version(name, find_version(catalog, name, selector))


def _record(version: VersionDetail, measured: Sequence[Evaluation]) -> None:
    with open_remote() as client:
        if client is not None:
            client.report_evaluations(version.name, version.version, measured)
            return
    with open_services() as services:
        services.catalog.evaluations.record(version.digest, measured)


def _run(
    settings: Settings, model: Mapping[str, Any], tasks: Sequence[str], options: Mapping[str, Any], output: Path
) -> None:
    """Runs the harness, whose progress goes to stderr. Raises EvaluationError with its last lines."""
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in model.items())),
        *("--tasks", ",".join(tasks), "--output_path", str(output)),
        *(str(part) for pair in options.items() for part in pair),
    ]
    env = os.environ | ({"OPENAI_API_KEY": settings.api_key} if settings.api_key else {})
    lines: list[str] = []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as harness:
        assert harness.stdout is not None
        for line in harness.stdout:
            lines = [*lines, line][-_LAST_LINES:]
            click.echo(line, nl=False, err=True)
    if harness.returncode:
        raise EvaluationError(f"lm_eval ended with code {harness.returncode}:\n{''.join(lines).rstrip()}")


def read_results(folder: Path) -> tuple[Evaluation, ...]:
    """Reads the harness's figures in its results below `folder`, but no standard errors. Raises EvaluationError."""
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise EvaluationError("lm_eval wrote no results; name other TASKS")
    found = json.loads(files[-1].read_text(encoding="utf-8"))
    counts: Mapping[str, Any] = found.get("n-samples", {})
    measured = []
    for task, figures in found["results"].items():
        for name, value in figures.items():
            metric, _, filtered = name.partition(",")
            is_figure = isinstance(value, int | float) and not isinstance(value, bool) and filtered
            if is_figure and not metric.endswith("_stderr") and math.isfinite(value):
                count = counts.get(task, {}).get("effective")
                named = metric if filtered == "none" else f"{metric}/{filtered}"
                measured.append(Evaluation(metric=named, value=value, dataset=task, count=count))
    if not measured:
        raise EvaluationError(f"lm_eval's results have no figure: {', '.join(found['results'])}; name other TASKS")
    return tuple(measured)


def _show(version: VersionDetail, measured: Sequence[Evaluation], *, is_recorded: bool, as_json: bool) -> None:
    if as_json:
        evaluations = [e.model_dump(mode="json", exclude_none=True) for e in measured]
        emit({"model": version.label, "digest": version.digest, "evaluations": evaluations, "recorded": is_recorded})
        return
    rows = [(e.dataset, e.metric, f"{e.value:.4g}", e.count) for e in measured]
    console().print(table(("TASK", "METRIC", "VALUE", "QUESTIONS"), rows, right=("VALUE", "QUESTIONS")))
    if is_recorded:
        click.echo(f"recorded with {version.label}")
