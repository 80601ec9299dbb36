"""`loray plan`: what a recipe will cost on a device, and whether it can run there at all. Neither torch nor Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import click

from loray.bases.config import ModelConfig
from loray.bases.registry import get_base
from loray.bases.sources import read_config
from loray.cli.output import console, emit, json_option
from loray.cli.plan_tables import show
from loray.errors import BaseNotFound, LorayError, SpecError
from loray.planning.devices import PRESETS, THIS_MACHINE, Device, HostRates, host
from loray.planning.plan import make_plan
from loray.planning.run import run_of
from loray.planning.shapes import preset, preset_names
from loray.recipe import load_recipe
from loray.settings import Settings
from loray.spec import TrainSpec

_RATES_FILE = "rates.json"


@click.command()
@click.argument("recipe")
@click.option("--workers", type=click.IntRange(min=1), help="Instead of the recipe's num_workers.")
@click.option(
    "--device",
    "device_name",
    metavar="NAME|FILE",
    help=f"Of one worker: {', '.join(PRESETS)}, {THIS_MACHINE} (measured once), or a YAML file with its memory and "
    "rates. Default: a100-80gb where the recipe uses GPUs, else this-machine.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The config.json of a base that is not on this machine.",
)
@json_option
def plan(recipe: str, workers: int | None, device_name: str | None, config: Path | None, as_json: bool) -> None:
    """Estimate memory, traffic and time of RECIPE (a YAML file, a shipped recipe's name, or a JSON object).

    Exits with 1 where the recipe cannot run as it is; the plan says what would have to change.
    """
    settings = Settings.from_env()
    spec = load_recipe(recipe).spec
    if workers is not None:
        source = f"{spec.name} with {workers} workers"
        spec = TrainSpec.parse(spec.model_dump() | {"num_workers": workers}, source=source)
    model = _shape(spec.base, settings.home) if config is None else _read(config)
    run = run_of(spec, model)
    made = make_plan(run, _device(device_name, spec, settings.home))
    if as_json:
        emit({"recipe": spec.name, "base": spec.base} | made.to_dict())
    else:
        show(made, spec, console())
    if made.is_refused:
        raise click.exceptions.Exit(1)


def _shape(base: str, home: Path) -> ModelConfig:
    """Of the base on this machine, else of the well-known one by that name."""
    try:
        return get_base(home, base).config
    except BaseNotFound as e:
        if (known := preset(base)) is not None:
            return known
        raise BaseNotFound(
            f"no base model {base!r} on this machine, and its shape is not among those known "
            f"({', '.join(preset_names())}): give its configuration with --config, or add it with `loray base add`"
        ) from e


def _read(path: Path) -> ModelConfig:
    if path.name == "config.json":
        return read_config(path.parent)
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SpecError(f"{path} is not the config.json of a model: {e!r}") from e


def _device(name: str | None, spec: TrainSpec, home: Path) -> Device:
    name = name or ("a100-80gb" if spec.use_gpu else THIS_MACHINE)
    if name == THIS_MACHINE:
        return host(_rates(home), spec.num_workers)
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).is_file():
        return Device.from_yaml(Path(name))
    known = ", ".join([*PRESETS, THIS_MACHINE])
    raise SpecError(f"no device {name!r}; there are {known}, or name a YAML file with its memory and rates")


def _rates(home: Path) -> HostRates:
    """Of this machine, measured in a process of its own (torch takes seconds and memory). Kept in `home`, unless the
    machine had something else to do.
    """
    path = home / _RATES_FILE
    try:
        return HostRates(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    is_busy = os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    click.echo("measuring this machine" + (", which is busy: it may be faster" if is_busy else ", once"), err=True)
    done = subprocess.run([sys.executable, "-m", "loray.train.rates"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LorayError(f"this machine could not be measured; name a --device: {done.stderr.strip()[-500:]}")
    rates = HostRates(**json.loads(done.stdout))
    if not is_busy:
        home.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(rates)) + "\n", encoding="utf-8")
        temporary.replace(path)
    return rates
