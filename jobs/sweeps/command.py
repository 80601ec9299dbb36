"""`loray sweep`: trains a recipe with several values of its fields, and publishes the best adapter."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from jobs.command import connect, fail, follow
from jobs.events.messages import describe
from jobs.submission import commands
from jobs.submission.commands import Submission
from jobs.sweeps.picture import draw
from jobs.sweeps.spec import SweepSpec
from jobs.sweeps.terminal import SweepView
from jobs.sweeps.trials import SweepPlan, Trial, label
from loray.cli.planning.check import check_plan
from loray.cli.planning.devices import device_option
from loray.cli.recipes.options import RecipeSource, recipe_options
from loray.errors import LorayError, SpecError
from loray.locations import is_this_machine
from loray.recipes.fields import merge
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.spec import TrainSpec
from loray.store import open_store


@click.command()
@recipe_options
@click.argument("ranges", nargs=-1, metavar="[FIELD=RANGE]...")
@click.option("--grid", multiple=True, metavar="FIELD=VALUE,…", help="All of these; of several options each with each.")
@click.option("--random", "num_draws", type=click.IntRange(1), metavar="N", help="Draw N times from the ranges.")
@click.option("--draw-seed", type=click.IntRange(0), default=0, show_default=True, help="Of --random.")
@click.option("--max-concurrent", type=click.IntRange(1), help="Trials at once; default: as many as fit.")
@click.option("--no-early-stopping", is_flag=True, help="Train every trial to its end.")
@click.option("--resume", "resumed", metavar="NAME", help="Go on with the latest sweep of this adapter.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Write the losses by step as SVG.")
@click.option("--address", help="Ray's job server, http://HOST:8265; without it a local cluster, which is started.")
@device_option("For the plan of each trial; on this machine without GPUs its memory is known.")
@click.option("--no-plan", is_flag=True, help="Start even what the plan says cannot fit.")
@click.option("--dry-run", is_flag=True, help="Check and plan all trials, and start none.")
@click.option("--json", "as_json", is_flag=True, help="Print the best adapter and all trials as JSON.")
def sweep(
    source: RecipeSource,
    ranges: tuple[str, ...],
    grid: tuple[str, ...],
    num_draws: int | None,
    draw_seed: int,
    max_concurrent: int | None,
    no_early_stopping: bool,
    resumed: str | None,
    picture: Path | None,
    address: str | None,
    device_name: str | None,
    no_plan: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train RECIPE with several values of its fields, and publish the adapter with the lowest held-out loss.

    \b
    loray sweep mine.yaml --grid optimizer.learning_rate=1e-4,3e-4 --grid adapter.rank=8,16
    loray sweep mine.yaml --random 12 'optimizer.learning_rate=loguniform(1e-5,1e-3)' adapter.method=lora,vera

    Ranges: loguniform, uniform, randint, lograndint (without the upper bound), or values to choose from.
    """
    console = Console(stderr=as_json)
    settings = Settings.from_env()
    address = address or settings.address
    if address is None and settings.url is not None:
        raise LorayError("a sweep is submitted to Ray's job server: give its --address; LORAY_URL takes single jobs")
    with tempfile.TemporaryDirectory(prefix="loray-sweep-") as stage:
        if resumed is not None:
            if grid or ranges or num_draws or source.arguments:
                raise SpecError("--resume goes on with a sweep as it was: give neither RECIPE nor what varies")
            name, job = resumed, commands.resumed_sweep(resumed, settings, address=address, no_plan=no_plan)
        else:
            source, ranges = _without_ranges(source, ranges)
            asked = {"grid": grid, "ranges": ranges, "num_draws": num_draws, "draw_seed": draw_seed}
            asked |= {"max_concurrent": max_concurrent, "stops_early": not no_early_stopping}
            plan, recipe = _plan(source, settings, address, SweepSpec.parse(asked, source="the command"))
            if not no_plan:
                _check_plans(plan.trials, settings, device_name, address, console)
            if dry_run:
                _show_trials(plan, console)
                return
            name, text = plan.name, plan.model_dump_json()
            job = commands.sweep(recipe, text, settings, address=address, stage=Path(stage), no_plan=no_plan)
            console.print(f"{len(plan.trials)} trials of {name}", highlight=False)
        view = _run(job, settings, address, console)
    if view.published is None:
        fail(view, view.server, view.job, console)
        return
    if picture is not None:
        picture.write_text(
            draw(f"{name}: held-out loss", view.records, view.best, keep_best=view.keep_best), encoding="utf-8"
        )
    if as_json:
        click.echo(json.dumps(_as_json(view), indent=2))
    else:
        console.print(view.table())
        console.print(describe(view.published), style="green", highlight=False, soft_wrap=True)


def _without_ranges(source: RecipeSource, ranges: tuple[str, ...]) -> tuple[RecipeSource, tuple[str, ...]]:
    """A recipe of options alone has no RECIPE: what stands in its place is the first range."""
    first = source.recipe
    if first is None or "=" not in first or first.lstrip().startswith("{") or Path(first).exists():
        return source, ranges
    return source._replace(recipe=None), (first, *ranges)


def _plan(source: RecipeSource, settings: Settings, address: str | None, asked: SweepSpec) -> tuple[SweepPlan, Recipe]:
    recipe = source.load(settings.home)

    def load(values: dict[str, Any]) -> TrainSpec:
        return source._replace(over=merge(merge({}, source.over), values)).load(settings.home).spec

    is_elsewhere = address is not None and not is_this_machine(address)
    return asked.plan(recipe.spec, load, folder="." if is_elsewhere else str(recipe.folder)), recipe


def _check_plans(
    trials: tuple[Trial, ...], settings: Settings, device_name: str | None, address: str | None, console: Console
) -> None:
    """Print the plans, equal ones once. Raises SpecError for the first trial that cannot fit."""
    is_here, said = address is None or is_this_machine(address), set()
    for trial in trials:
        try:
            with console.capture() as captured:
                check_plan(trial.recipe, settings.home, device_name=device_name, is_here=is_here, to=console)
        except SpecError as e:
            raise SpecError(f"trial {label(trial.values)}: {e}") from e
        if captured.get() not in said:
            said.add(captured.get())
            text = captured.get().rstrip()
            console.print(f"{label(trial.values)}: {text}", highlight=False, markup=False, soft_wrap=True)


def _show_trials(plan: SweepPlan, console: Console) -> None:
    for i, trial in enumerate(plan.trials):
        console.print(f"trial {i}: {label(trial.values)}", highlight=False, markup=False, soft_wrap=True)


def _run(job: Submission, settings: Settings, address: str | None, console: Console) -> SweepView:
    """Submits the job and follows it to its end. Without an address, the local cluster is used, and started."""
    if address is None or is_this_machine(address):
        open_store(settings.store).check()
    if address is None:
        from loray.local.cluster import ensure_started

        address = ensure_started(settings).address
    server = connect(address)
    job_id = server.submit(job)
    console.print(f"sweep runs as job {job_id}", highlight=False)
    view = SweepView(console, server, job_id)
    try:
        with view:
            asyncio.run(follow(server, job_id, view.feed))
    except KeyboardInterrupt:
        console.print(
            f"\nno longer following; the sweep goes on as job {job_id}\n"
            f"  follow  loray jobs logs {job_id} --follow\n"
            f"  stop    loray jobs stop {job_id}\n"
            "  resume  loray sweep --resume NAME   (once stopped)",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(130)
    return view


def _as_json(view: SweepView) -> dict[str, Any]:
    trials = [
        record.model_dump(mode="json") | {"step": record.step, "loss": record.loss(keep_best=view.keep_best)}
        for record in view.records
    ]
    assert view.ended is not None
    found = {"sweep": view.ended["sweep"], "folder": view.ended["folder"], "best": view.ended["best"]}
    return dict(view.published or {}) | {"job_id": view.job, **found, "trials": trials}
