"""`loray bench`."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Mapping

import click

_MODULES: Mapping[str, str] = {
    "publish": "benchmarks.serving.publish",
    "serving": "benchmarks.serving",
    "training": "benchmarks.training",
    "front": "benchmarks.front",
    "cluster": "benchmarks.cluster",
    "catalog": "benchmarks.catalog",
}


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name", type=click.Choice(list(_MODULES)))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, arguments: tuple[str, ...]) -> None:
    """Run the benchmark NAME of a checkout of loray on this machine. ARGUMENTS are its own; its --help explains them.

    \b
    publish   a trainer's publishes on a deployment that serves others: how soon a version answers
    serving   the engine, `loray serve` and `loray up` beside peers
    training  steps, beside peers
    front     what gateways cost
    cluster   routing and scaling over a trace
    catalog   lookups and publications of a large catalog
    """
    if importlib.util.find_spec("benchmarks") is None:
        raise click.ClickException("the package has no benchmarks; run this in a checkout of loray, which has them")
    sys.argv = [_MODULES[name], *arguments]
    runpy.run_module(_MODULES[name], run_name="__main__", alter_sys=True)
