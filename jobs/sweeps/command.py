"""`loray sweep`, with its view in a terminal and the picture of its trials' losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import click
from rich.console import Console
from rich.table import Table

from jobs.command import submit, watch
from jobs.events import SweepEvent, TrialEvent, decode, describe, number
from jobs.submission.commands import Work
from jobs.sweeps.spec import SweepPlan, SweepSpec, Trial, TrialRecord, label, ranked
from jobs.view import RunView
from loray.cli.output import table
from loray.cli.plan import check_plan, device_option
from loray.cli.recipes import RecipeSource, recipe_options
from loray.errors import LorayError, SpecError
from loray.locations import is_this_machine
from loray.recipes.fields import merge
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.spec import TrainSpec

_WIDTH, _PLOT_H, _MARGIN, _LEFT, _TOP = 860, 320, 24, 70, 64
_LINE_H, _MAX_NAMED, _NUM_TICKS = 20, 20, 5  # a line of the legend, trials in it; of each axis
_BEST, _OTHER = "#c44870", "#5b7db1"


def draw(title: str, records: Sequence[TrialRecord], best: int | None, *, keep_best: bool = True) -> str:
    """Draws the losses by step, as SVG. `best`: the trial to emphasise, if any. `keep_best`: as of the recipe."""
    order = ranked(records, keep_best=keep_best)
    losses = [loss for record in records for _, loss in record.losses] or [0.0]
    low, num_steps = min(losses), max([record.num_steps or 1 for record in records], default=1)
    spread, bottom, right = max(losses) - low or 1.0, _TOP + _PLOT_H, _WIDTH - _MARGIN

    def x(step: float) -> float:
        return _LEFT + (right - _LEFT) * step / num_steps

    def y(loss: float) -> float:
        return bottom - _PLOT_H * (loss - low) / spread

    parts = [_text(_MARGIN, _MARGIN + 14, title, size=18), _text(right, bottom + 36, "step", anchor="end")]
    for share in (i / (_NUM_TICKS - 1) for i in range(_NUM_TICKS)):
        loss, step = low + share * spread, round(share * num_steps)
        parts.append(f"<path d='M{_LEFT} {y(loss):.1f}H{right}' stroke='#ddd'/>")
        parts.append(_text(_LEFT - 8, y(loss) + 4, f"{loss:.4g}", anchor="end"))
        parts.append(_text(x(step), bottom + 18, f"{step:,}", anchor="middle"))
    measured = [record for record in reversed(order) if record.losses]
    for record in sorted(measured, key=lambda record: record.trial == best):  # the best on top
        colour, width = (_BEST, 3.0) if record.trial == best else (_OTHER, 1.5)
        dashes = " stroke-dasharray='5 4'" if record.status == "stopped" else ""
        points = [(x(step), y(loss)) for step, loss in record.losses]
        path = "L".join(f"{at:.1f} {height:.1f}" for at, height in points)
        parts.append(
            f"<path d='M{path}' fill='none' stroke='{colour}' stroke-width='{width}'{dashes}>"
            f"<title>{escape(_name(record))}</title></path>"
        )
        parts += (f"<circle cx='{at:.1f}' cy='{height:.1f}' r='{width}' fill='{colour}'/>" for at, height in points)
    line = bottom + 56
    for record in order[:_MAX_NAMED]:
        found = record.loss(keep_best=keep_best)
        figure = "–" if found is None else f"{found:.4f}"
        colour = _BEST if record.trial == best else _OTHER
        parts.append(f"<rect x='{_LEFT}' y='{line - 6}' width='14' height='8' fill='{colour}'/>")
        parts.append(_text(_LEFT + 22, line + 4, _name(record)))
        said = figure if record.status == "completed" else f"{record.status}, {figure}"
        parts.append(_text(right, line + 4, said, anchor="end"))
        line += _LINE_H
    if len(order) > _MAX_NAMED:
        parts.append(_text(_LEFT, line + 4, f"and {len(order) - _MAX_NAMED} more"))
        line += _LINE_H
    height = line + _MARGIN
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' "
        f"viewBox='0 0 {_WIDTH} {height}' font-family='system-ui, Helvetica, Arial, sans-serif'>"
    )
    return "\n".join([head, f"<rect width='{_WIDTH}' height='{height}' fill='white'/>", *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 13) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}'>{escape(content)}</text>"


def _name(record: TrialRecord) -> str:
    return f"{record.trial}: {label(record.values)}"


class SweepView(RunView):
    """Keeps the trials' records, and the event of the sweep's end in `ended`."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.ended: SweepEvent | None = None
        self._trials: dict[int, TrialRecord] = {}

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        return tuple(self._trials[trial] for trial in sorted(self._trials))

    @property
    def best(self) -> int | None:
        return None if self.ended is None else self.ended["best"]

    @property
    def keep_best(self) -> bool:
        return self.ended is None or self.ended["keep_best"]

    def feed(self, line: str) -> None:
        event = decode(line)
        if event is None:
            super().feed(line)
        elif event["event"] == "trial":
            self._trial(event)
        elif event["event"] == "sweep":
            self.ended = event
            self._print(event)
        else:
            super().feed(line)

    def table(self) -> Table:
        """Lists all trials, the best first."""
        records = ranked(self.records, keep_best=self.keep_best)
        paths = list(records[0].values) if records else []
        rows = [
            (
                f"{record.trial} *" if record.trial == self.best else record.trial,
                *(record.values[path] for path in paths),
                record.status,
                f"{record.step}/{record.num_steps or '?'}",
                number(record.loss(keep_best=self.keep_best)) if record.losses else "–",
            )
            for record in records
        ]
        return table(("TRIAL", *paths, "STATUS", "STEP", "LOSS"), rows, right=("TRIAL", "STEP", "LOSS"))

    def _trial(self, event: TrialEvent) -> None:
        record = TrialRecord.model_validate({name: event[name] for name in TrialRecord.model_fields})  # type: ignore[literal-required]
        self._trials[record.trial] = record
        ended = sum(known.has_ended for known in self._trials.values())
        figures = f"trial {record.trial}: held out {number(record.losses[-1][1])}" if record.losses else ""
        num_trials = event["num_trials"]
        self._show("trials", ended, num_trials, f"{ended}/{num_trials}  {figures}", None)
        if record.has_ended:
            self._print(event)


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
    if resumed is not None:
        if grid or ranges or num_draws or source.arguments:
            raise SpecError("--resume goes on with a sweep as it was: give neither RECIPE nor what varies")
        name, work = resumed, Work.resumed_sweep(resumed, no_plan=no_plan)
    else:
        source, ranges = _without_ranges(source, ranges)
        asked = {"grid": grid, "ranges": ranges, "num_draws": num_draws, "draw_seed": draw_seed}
        asked |= {"max_concurrent": max_concurrent, "stops_early": not no_early_stopping}
        plan, recipe = _plan(source, settings, address, SweepSpec.parse(asked, source="the command"))
        if not no_plan:
            _check_plans(plan.trials, settings, device_name, address, console)
        if dry_run:
            for i, trial in enumerate(plan.trials):
                line = f"trial {i}: {label(trial.values)}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            return
        name, work = plan.name, Work.sweep(recipe, plan.model_dump_json(), no_plan=no_plan)
        console.print(f"{len(plan.trials)} trials of {name}", highlight=False)
    server, job = submit(work, settings, address)
    console.print(f"sweep runs as job {job}", highlight=False)
    view = SweepView(console)
    resumed_by = f"loray sweep --resume {name}"
    published = watch(view, server, job, console, what="the sweep", resumed=resumed_by)
    if picture is not None:
        picture.write_text(
            draw(f"{name}: held-out loss", view.records, view.best, keep_best=view.keep_best), encoding="utf-8"
        )
    if as_json:
        click.echo(json.dumps(published | {"job_id": job} | _as_json(view), indent=2))
    else:
        console.print(view.table())
        console.print(describe(published), style="green", highlight=False, soft_wrap=True)


def _without_ranges(source: RecipeSource, ranges: tuple[str, ...]) -> tuple[RecipeSource, tuple[str, ...]]:
    """Corrects a recipe of options alone, which has no RECIPE: what stands in its place is the first range."""
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
    """Prints the plans, equal ones once. Raises SpecError for the first trial that cannot fit."""
    is_here, said = address is None or is_this_machine(address), set()
    for trial in trials:
        try:
            with console.capture() as captured:
                check_plan(trial.recipe, settings.home, device_name=device_name, is_here=is_here, to=console)
        except SpecError as e:
            raise SpecError(f"trial {label(trial.values)}: {e}") from e
        if (plan := captured.get()) not in said:
            said.add(plan)
            line = f"{label(trial.values)}: {plan.rstrip()}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _as_json(view: SweepView) -> dict[str, Any]:
    trials = [
        record.model_dump(mode="json") | {"step": record.step, "loss": record.loss(keep_best=view.keep_best)}
        for record in view.records
    ]
    assert view.ended is not None
    found = {"sweep": view.ended["sweep"], "folder": view.ended["folder"], "best": view.ended["best"]}
    return found | {"trials": trials}
