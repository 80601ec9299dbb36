"""`loray recipes`, and the options with which commands are given a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click

from loray.bases.presets import shapes_in
from loray.cli.output import console, emit, json_option, table
from loray.errors import ConflictError
from loray.machine import hardware
from loray.methods import METHODS
from loray.recipes.fields import given, merge, to_yaml
from loray.recipes.load import (
    ADAPTERS,
    STDIN,
    Recipe,
    load_recipe,
    purpose,
    read_recipe,
    shipped,
    size_of_base,
)
from loray.recipes.many import load_many
from loray.recipes.resolve import on_hardware
from loray.settings import Settings
from loray.spec import BaseSize, TrackerName, TrainSpec

FIELDS = {  # option → field
    "name": "name",
    "base": "base",
    "method": "adapter.method",
    "data": "data.train",
    "eval_data": "data.eval",
    "workers": "num_workers",
}


class RecipeSource(NamedTuple):
    """A recipe as a command line asks for it. `arguments` say the same again."""

    recipe: str | None
    over: dict[str, Any]
    arguments: tuple[str, ...]

    def load(self, home: Path, *, is_example: bool = False) -> Recipe:
        """Loads the recipe, with defaults for its base, which may be in `home`. An example may lack name and data."""
        return load_recipe(self.recipe, over=self.over, shape_of=shapes_in(home), is_example=is_example)


class RecipeSources(NamedTuple):
    """Recipes as a command line asks for them: one, several, one that lists adapters, or one for each of some files."""

    source: RecipeSource
    more: tuple[str, ...]
    each: str | None

    @property
    def arguments(self) -> tuple[str, ...]:
        """They say the same again."""
        each = () if self.each is None else ("--each", self.each)
        return (*self.source.arguments[:1], *self.more, *self.source.arguments[1:], *each)

    @property
    def is_one(self) -> bool:
        """Says whether it is one recipe of one adapter."""
        if self.more or self.each is not None:
            return False
        name = self.source.recipe
        return name in (None, STDIN) or ADAPTERS not in read_recipe(name, {})[0]

    def load(self, home: Path, *, is_example: bool = False) -> tuple[str, list[Recipe]]:
        """Loads all, and returns them with the name of their job. Raises SpecError."""
        names, over, shape_of = (self.source.recipe, *self.more), self.source.over, shapes_in(home)
        return load_many(names, over=over, each=self.each, shape_of=shape_of, is_example=is_example)


def several_recipes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes `command` RecipeSources as `sources`; `recipe_options` stands above it."""

    @wraps(command)
    def with_sources(*args: Any, source: RecipeSource, more: tuple[str, ...], each: str | None, **options: Any) -> Any:
        return command(*args, sources=RecipeSources(source, more, each), **options)

    decorated = click.option(
        "--each", metavar="PATTERN", help="Train RECIPE on each of these files, as NAME-STEM: 'customers/*.jsonl'."
    )(with_sources)
    return click.argument("more", nargs=-1, metavar="[RECIPE]...")(decorated)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes `command` a RecipeSource as `source`."""

    @wraps(command)
    def with_source(
        *args: Any, recipe: str | None, trackers: tuple[str, ...], assignments: tuple[str, ...], **options: Any
    ) -> Any:
        values = {option: options.pop(option) for option in FIELDS}
        shown = [] if recipe is None else [recipe]
        pairs = []
        for option, value in values.items():
            if value is not None:
                pairs.append(f"{FIELDS[option]}={value}")
                shown += [f"--{option.replace('_', '-')}", str(value)]
        if trackers:
            pairs.append(f"tracking=[{','.join(trackers)}]")
        for tracker in trackers:
            shown += ["--track", tracker]
        for assignment in assignments:
            shown += ["--set", assignment]
        over = merge(given(pairs), given(assignments))
        return command(*args, source=RecipeSource(recipe, over, tuple(shown)), **options)

    for decorate in reversed(_OPTIONS):
        with_source = decorate(with_source)
    return with_source


_OPTIONS = (
    click.argument("recipe", required=False),
    click.option("--name", help="Of the adapter; needed without RECIPE."),
    click.option("--base", help="The base model to train on."),
    click.option("--method", type=click.Choice(list(METHODS))),
    click.option("--data", metavar="FILE|URL", help="Rows to train on (see `loray data show`); needed without RECIPE."),
    click.option("--eval-data", metavar="FILE|URL", help="Held-out data; without it, a part of the data is held out."),
    click.option("--workers", type=click.IntRange(min=1), help="num_workers."),
    click.option(
        "--track",
        "trackers",
        multiple=True,
        type=click.Choice(get_args(TrackerName)),
        help="Where metrics go, instead of the recipe's `tracking`; may be given several times.",
    ),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Any field of a recipe, as optimizer.learning_rate=1e-3; may be given several times.",
    ),
)


@click.group()
def recipes() -> None:
    """List the shipped recipes, explain one, or write one to edit."""


@recipes.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List the shipped recipes and what they are for."""
    rows = []
    for file in shipped():
        spec = load_recipe(file).spec
        name = file.removesuffix(".yaml")
        rows.append({"name": name, "method": spec.adapter.method, "base": spec.base, "purpose": purpose(file)})
    if as_json:
        emit(rows)
        return
    console().print(table(("NAME", "METHOD", "BASE", "FOR"), [tuple(row.values()) for row in rows]))


@recipes.command("show")
@recipe_options
@json_option
def show(source: RecipeSource, as_json: bool) -> None:
    """Print RECIPE, or that of the options alone, with every default filled in and the reason of each value."""
    home = Settings.from_env().home
    spec = source.load(home, is_example=True).spec
    if as_json:
        emit(spec.model_dump(mode="json"))
    else:
        click.echo(explained(spec, home), nl=False)


@recipes.command("init")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@recipe_options
@click.option("--force", is_flag=True, help="Write over a file that exists.")
def init(file: Path, source: RecipeSource, force: bool) -> None:
    """Write a recipe to edit to FILE, as `show` prints it. Data paths are then relative to FILE."""
    home = Settings.from_env().home
    if file.exists() and not force:
        raise ConflictError(f"{file} exists; choose another name, or overwrite it with --force")
    recipe = source.load(home, is_example=True)
    moved = _with_data_from(recipe, file.absolute().parent)
    file.write_text(to_yaml(moved, _size(moved, home)), encoding="utf-8")
    click.echo(f"wrote {file}: edit it, then `loray plan {file}` and `loray train {file}`")


def explained(spec: TrainSpec, home: Path) -> str:
    """Writes the recipe as YAML with the reason of each value, and what it leaves to the hardware as it is here."""
    chosen, why = on_hardware(spec, hardware())
    here = {}
    if spec.dtype == "auto":
        here["dtype"] = f"here {chosen.dtype}, because {why}"
    if spec.use_gpu == "auto":
        here["use_gpu"] = f"here {str(chosen.use_gpu).lower()}"
    return to_yaml(spec, _size(spec, home), here)


def _size(spec: TrainSpec, home: Path) -> BaseSize:
    return size_of_base(spec.base, shapes_in(home))


def _with_data_from(recipe: Recipe, folder: Path) -> TrainSpec:
    """Changes the recipe for a file in `folder`: paths of data files that exist start there."""
    data = recipe.spec.data
    found = dict(zip(data.paths, recipe.data().paths, strict=True))
    moved = data.with_paths(lambda s: os.path.relpath(found[s], folder) if Path(found[s]).exists() else s)
    return recipe.spec.model_copy(update={"data": moved})
