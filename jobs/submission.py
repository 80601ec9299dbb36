"""What `loray train` hands to Ray's job server: a command line and its environment."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jobs.recipe import Recipe
from loray.errors import DataError, SettingsError
from loray.settings import Settings

_DRIVER = ("-P", "-m", "jobs.train")  # -P: a module of the recipe's folder must not pass for one of ours
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


class Submission(NamedTuple):
    entrypoint: str
    runtime_env: dict[str, Any]


def is_remote(address: str) -> bool:
    """False for a job server on this machine, whose jobs see this machine's disk."""
    return urlsplit(address if "://" in address else f"http://{address}").hostname not in _LOOPBACK


def local(recipe: Recipe, settings: Settings, *, resume: bool) -> Submission:
    """In this Python, in the recipe's data folder, with absolute paths: nothing is uploaded, however large.

    Raises DataError for a data file that is not there: a job would only say so after it has started.
    """
    for path in _local_files(recipe):
        _check_exists(path, recipe)
    # A shipped recipe is named, for its paths are relative to this folder and not to the package's.
    source = str(recipe.path) if recipe.path.is_relative_to(recipe.folder) else recipe.path.stem
    command = [sys.executable, *_DRIVER, source, "--events", *(["--resume"] if resume else [])]
    entrypoint = f"cd {shlex.quote(str(recipe.folder))} && exec {shlex.join(command)}"
    return Submission(entrypoint, {"env_vars": settings.to_env()})


def remote(recipe: Recipe, settings: Settings, *, address: str, resume: bool, stage: Path) -> Submission:
    """On a cluster that has loray installed. Recipe and local data files are copied to `stage`, which Ray uploads.

    Raises SettingsError where the cluster could not reach the store or the catalog, DataError for data outside the
    recipe's folder.
    """
    if settings.is_local:
        raise SettingsError(
            f"a cluster at {address} cannot reach this machine's disk, where LORAY_STORE or LORAY_CATALOG lie; it "
            "needs a store on s3://, which this version does not have yet: train on this machine, without --address"
        )
    shutil.copyfile(recipe.path, stage / recipe.path.name)
    for path in _local_files(recipe):
        if not path.is_relative_to(recipe.folder):
            raise DataError(
                f"{path} lies outside {recipe.folder}, which is all that is uploaded to {address}; "
                "move it there, or put it on object storage and name its s3:// URL"
            )
        _check_exists(path, recipe)
        target = stage / path.relative_to(recipe.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    command = ["python", *_DRIVER, recipe.path.name, "--events", *(["--resume"] if resume else [])]
    shared = {name: value for name, value in settings.to_env().items() if name != "LORAY_HOME"}  # a home is a machine's
    return Submission(shlex.join(command), {"working_dir": str(stage), "env_vars": shared})


def _local_files(recipe: Recipe) -> list[Path]:
    data = recipe.data()
    return [Path(source) for source in (data.train, data.eval) if source is not None and "://" not in source]


def _check_exists(path: Path, recipe: Recipe) -> None:
    if not path.is_file():
        raise DataError(f"data file {path} does not exist; relative paths start at {recipe.folder}")
