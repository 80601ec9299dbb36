"""Options of commands for the device and the base of an estimate. Imports neither torch nor Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import psutil

from loray.bases.config import ModelConfig
from loray.bases.presets import known_shape
from loray.bases.sources import read_config
from loray.errors import LorayError, SpecError
from loray.machine import Machine, Rates
from loray.planning.devices import PRESETS, THIS_MACHINE, Device, gpu_here, host

_BUSY_S, _BUSY_PERCENT = 0.5, 25.0  # for so long all cores together have more than that to do


def device_option(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--device",
        "device_name",
        metavar="NAME|FILE",
        help=f"Of one worker: {', '.join(PRESETS)}, {THIS_MACHINE} (measured once), or a YAML file with its memory and "
        f"rates. {default}",
    )


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The config.json of a base that is not on this machine.",
)


def device_of(name: str, home: Path, num_workers: int, *, use_gpu: bool = False) -> Device:
    """The device by preset, YAML file, or this machine, of which `use_gpu` takes a GPU. SpecError if there is none."""
    if name == THIS_MACHINE:
        machine = measured(home)
        device = gpu_here(machine) if use_gpu else host(machine, num_workers)
        if device is None:
            raise SpecError("this machine has no GPU; name the workers' --device, or set use_gpu: false")
        return device
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).is_file():
        return Device.from_yaml(Path(name))
    known = ", ".join([*PRESETS, THIS_MACHINE])
    raise SpecError(f"no device {name!r}; there are {known}, or name a YAML file with its memory and rates")


def shape_of(base: str, config: Path | None, home: Path) -> ModelConfig:
    """The shape in `config` if it is given, else of the base on this machine, else of a well-known base."""
    return known_shape(base, home) if config is None else _read(config)


def _read(path: Path) -> ModelConfig:
    if path.name == "config.json":
        return read_config(path.parent)
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SpecError(f"{path} is not the config.json of a model: {e!r}") from e


def measured(home: Path, *, even_if_busy: bool = True) -> Machine:
    """This machine with its rates, which are measured where `home` does not have them: in another process, because
    torch takes seconds and memory. Where something else computes they are measured for now alone, or not at all without
    `even_if_busy`. Raises LorayError.
    """
    machine = Machine.here(home)
    if machine.rates is not None:
        return machine
    is_busy = psutil.cpu_percent(_BUSY_S) > _BUSY_PERCENT
    if is_busy and not even_if_busy:
        return machine
    click.echo("measuring this machine" + (", which is busy: it may be faster" if is_busy else ", once"), err=True)
    done = subprocess.run([sys.executable, "-m", "loray.train.rates"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LorayError(f"this machine could not be measured; name a --device: {done.stderr.strip()[-500:]}")
    machine = machine._replace(rates=Rates.from_json(json.loads(done.stdout)))
    if not is_busy:
        machine.cache(home)
    return machine
