"""The argument and options from which commands make a recipe: a file, values on top of it, or values alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click

from loray.bases.presets import shapes_in
from loray.recipes.defaults import METHODS
from loray.recipes.fields import given, merge
from loray.recipes.load import Recipe, load_recipe
from loray.spec import TrackerName

_FIELDS = {  # option → field
    "name": "name",
    "base": "base",
    "method": "adapter.method",
    "data": "data.train",
    "eval_data": "data.eval",
    "workers": "num_workers",
}


class RecipeSource(NamedTuple):
    """What a command line says of a recipe. `arguments` say the same again."""

    recipe: str | None
    over: dict[str, Any]
    arguments: tuple[str, ...]

    def load(self, home: Path, *, is_example: bool = False) -> Recipe:
        """The recipe, with defaults for its base, which is looked for in `home`. An example may lack name and data."""
        return load_recipe(self.recipe, over=self.over, shape_of=shapes_in(home), is_example=is_example)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes `command` a RecipeSource as `source`."""

    @wraps(command)
    def with_source(
        *args: Any, recipe: str | None, trackers: tuple[str, ...], assignments: tuple[str, ...], **options: Any
    ) -> Any:
        values = {option: options.pop(option) for option in _FIELDS}
        shown = [] if recipe is None else [recipe]
        pairs = []
        for option, value in values.items():
            if value is not None:
                pairs.append(f"{_FIELDS[option]}={value}")
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
    click.option("--method", type=click.Choice(METHODS)),
    click.option("--data", metavar="FILE|URL", help="JSONL or Parquet to train on; needed without RECIPE."),
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
