"""`loray plan`: the cost of a recipe on a device, and whether it can run there. Imports neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path

import click

from loray.cli.output import console, emit, json_option
from loray.cli.planning.devices import config_option, device_of, device_option, shape_of
from loray.cli.planning.parents import with_parent
from loray.cli.planning.tables import show
from loray.cli.recipes.options import RecipeSource, recipe_options
from loray.machine import hardware
from loray.planning.devices import ASSUMED_GPU, THIS_MACHINE
from loray.planning.plan import make_plan
from loray.planning.run import run_of
from loray.recipes.resolve import on_hardware
from loray.settings import Settings


@click.command()
@recipe_options
@device_option("Default: a100-80gb where the recipe uses GPUs, else this-machine.")
@config_option
@json_option
def plan(source: RecipeSource, device_name: str | None, config: Path | None, as_json: bool) -> None:
    """Estimate memory, traffic and time of RECIPE (a YAML file, a shipped recipe's name, or a JSON object), or of the
    recipe that the options describe.

    Exits with 1 where the recipe cannot run as it is; the plan says what would have to change.
    """
    home = Settings.from_env().home
    spec = source.load(home, is_example=True).spec
    model = shape_of(spec.base, config, home)
    spec = with_parent(spec, model)
    found = hardware()
    here = on_hardware(spec, found)
    is_elsewhere = device_name is None and here.spec.use_gpu and not found.gpus
    name = device_name or (ASSUMED_GPU if is_elsewhere else THIS_MACHINE)
    device = device_of(name, home, spec.num_workers, use_gpu=bool(here.spec.use_gpu))
    made = make_plan(run_of(spec, model, dtype=device.training_dtype), device)
    if as_json:
        emit({"recipe": spec.name, "base": spec.base} | made.to_dict())
    else:
        show(made, spec, console())
    if made.is_refused:
        raise click.exceptions.Exit(1)
