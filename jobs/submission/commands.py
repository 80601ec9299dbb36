"""Submissions to Ray's job server: a command line, its environment, and metadata.

A recipe that is no file goes to the driver's standard input, from a file that Ray uploads: a command line has no room
for a large one.

Ray's dashboard shows a job's environment, so no password is sent to a cluster of other machines. Its nodes have their
own AWS credentials and, if the catalog's URL holds a password, their own LORAY_CATALOG.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from loray.errors import DataError
from loray.local.cluster import current_cluster
from loray.locations import is_this_machine
from loray.recipes.load import STDIN, Recipe
from loray.recipes.sources import uploaded_files
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, DataSpec, TrainSpec, qualified_name

_DRIVER = ("-P", "-m", "jobs.train")  # -P: a module in the recipe's folder must not shadow one of ours
_OF_TRACKERS = ("MLFLOW_", "WANDB_")
_SWEEP_DRIVER = ("-P", "-m", "jobs.sweeps.driver")
_PLAN = "plan.json"
_RECIPE = "recipe.json"
# The shell exits with the message if the cluster's nodes have no LORAY_CATALOG.
_OWN_CATALOG = ': "${LORAY_CATALOG:?must be set on the nodes of the cluster: URLs with a password are not sent to it}"'


class Submission(NamedTuple):
    """The arguments of `JobSubmissionClient.submit_job` of these names."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    entrypoint_resources: dict[str, float] | None = None


def local(recipe: Recipe, settings: Settings, *, resume: bool, stage: Path, no_plan: bool = False) -> Submission:
    """Returns a job on this machine: in this Python, in the recipe's folder, with absolute paths. Nothing is uploaded
    but a recipe that is no file, from `stage`.

    Raises DataError if a data file does not exist, which the job would report only after it has started.
    """
    for data in _sources(recipe.data()):
        _local_files(data, recipe)
    environment: dict[str, Any] = {"env_vars": _env_here(settings)}
    redirect = ""
    if recipe.path is None:
        source, redirect = STDIN, f"exec {_staged(recipe.spec, stage)} && "
        environment["working_dir"] = str(stage)
    else:  # a shipped recipe is passed by name, because its paths are relative to this folder, not to the package's
        source = str(recipe.path) if recipe.path.is_relative_to(recipe.folder) else recipe.path.stem
    command = _command(sys.executable, source, resume=resume, no_plan=no_plan)
    entrypoint = f"{redirect}cd {shlex.quote(str(recipe.folder))} && exec {command}"
    return Submission(entrypoint, environment, _metadata(recipe.spec), _of_driver(settings))


def remote(
    recipe: Recipe, settings: Settings, *, address: str, resume: bool, stage: Path, no_plan: bool = False
) -> Submission:
    """Returns a job on a cluster that has loray installed. Puts the recipe, with its defaults, and local data files
    into `stage`, which Ray uploads.

    Raises SettingsError if the cluster cannot reach the store or the catalog; DataError for data outside the recipe's
    folder, or named by an absolute path of this machine.
    """
    settings.check_reachable_from(address)
    redirect = ""
    if recipe.path is None:
        source, redirect = STDIN, f" {_staged(recipe.spec, stage)}"
    else:
        source = recipe.path.name
        (stage / source).write_text(yaml.safe_dump(recipe.spec.model_dump(mode="json"), sort_keys=False))
    _stage_data(recipe, address, stage)
    command = _command("python", source, resume=resume, no_plan=no_plan) + redirect
    runtime_env = {"working_dir": str(stage), "env_vars": settings.to_remote_env()}
    return Submission(_with_own_catalog(command, settings), runtime_env, _metadata(recipe.spec), _of_driver(settings))


def _stage_data(recipe: Recipe, address: str, stage: Path) -> None:
    """Copies local data files to where Ray uploads them from. Raises DataError as `remote` does."""
    for named, source_path in zip(_sources(recipe.spec.data), _sources(recipe.data()), strict=True):
        if not Path(source_path).is_relative_to(recipe.folder):
            raise DataError(
                f"{source_path} lies outside {recipe.folder}, which is all that is uploaded to {address}; "
                "move it there, or put it on object storage and name its s3:// URL"
            )
        if Path(named).expanduser().is_absolute():
            _local_files(source_path, recipe)
            raise DataError(
                f"data file {source_path} is uploaded to {address}, where that path leads nowhere: write it "
                f"relative to the recipe, as {Path(source_path).relative_to(recipe.folder)}"
            )
    for path in {file: None for source in _sources(recipe.data()) for file in _local_files(source, recipe)}:
        target = stage / path.relative_to(recipe.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def sweep(
    recipe: Recipe, plan: str, settings: Settings, *, address: str | None, stage: Path, no_plan: bool = False
) -> Submission:
    """Returns a job that runs a sweep of `recipe`, whose trials are in `plan`, as JSON. Ray uploads the plan from
    `stage`, and local data where `address` is another machine's. Raises as `local` and `remote` do.
    """
    if address is not None and not is_this_machine(address):
        settings.check_reachable_from(address)
        _stage_data(recipe, address, stage)
    else:
        for data in _sources(recipe.data()):
            _local_files(data, recipe)
    (stage / _PLAN).write_text(plan, encoding="utf-8")
    job = _sweep([_PLAN, *_unplanned(no_plan)], settings, address, _metadata(recipe.spec))
    return job._replace(runtime_env={"working_dir": str(stage), **job.runtime_env})


def resumed_sweep(name: str, settings: Settings, *, address: str | None, no_plan: bool = False) -> Submission:
    """Returns a job that goes on with the latest sweep of the adapter `name`."""
    return _sweep(["--resume", name, *_unplanned(no_plan)], settings, address, {"loray_name": name})


def _sweep(arguments: list[str], settings: Settings, address: str | None, metadata: dict[str, str]) -> Submission:
    is_here = address is None or is_this_machine(address)
    command = shlex.join([sys.executable if is_here else "python", *_SWEEP_DRIVER, *arguments, "--events"])
    if not is_here:
        settings.check_reachable_from(str(address))
        command = _with_own_catalog(command, settings)
    env = _env_here(settings) if is_here else settings.to_remote_env()
    return Submission(command, {"env_vars": env}, metadata, _of_driver(settings))


def for_server(recipe: Recipe, url: str) -> TrainSpec:
    """Returns the recipe for a server at `url`, whose cluster opens the data itself. Raises DataError for data that it
    cannot open: files of this machine, unless the server is on it.
    """
    here = [source for source in _sources(recipe.data()) if any(path.exists() for path in uploaded_files(source))]
    if here and not is_this_machine(url):
        raise DataError(
            f"{here[0]} is a file of this machine, and the cluster of {url} cannot read it; put it on object storage "
            "and name its s3:// URL"
        )
    return recipe.spec.model_copy(update={"data": recipe.data()})


def from_spec(
    spec: TrainSpec, settings: Settings, *, stage: Path, resume: bool = False, tenant: str = DEFAULT_TENANT
) -> Submission:
    """Returns a job for `tenant` of a recipe without a file, submitted by a process of the cluster (the API server)
    with its settings, and its Python, which the cluster's nodes have too. Ray uploads the recipe from `stage`.

    Raises DataError for a relative data path, which has no folder to start from: data is an s3:// URL, or an absolute
    path on the driver's machine.
    """
    for source in _sources(spec.data):
        if not Path(source).is_absolute():
            raise DataError(f"data file {source!r} is a relative path; name an s3:// URL or an absolute path")
    command = f"{_command(sys.executable, STDIN, resume=resume, tenant=tenant)} {_staged(spec, stage)}"
    is_private = current_cluster(settings.home) is not None  # only this user can read its dashboard
    if not is_private:
        command = _with_own_catalog(f"exec {command}", settings)
    environment = {"working_dir": str(stage), "env_vars": settings.to_env(secrets=is_private)}
    return Submission(command, environment, _metadata(spec, tenant), _of_driver(settings))


def _env_here(settings: Settings) -> dict[str, str]:
    """Adds what the libraries of trackers read: on this machine, only its user sees a job's environment."""
    ours = {name: value for name, value in os.environ.items() if name.startswith(_OF_TRACKERS)}
    ours.pop("WANDB_SERVICE", None)  # of this process alone
    return settings.to_env() | ours


def _of_driver(settings: Settings) -> dict[str, float] | None:
    """Returns what the driver takes of its node; None for nothing, and Ray starts it on the head node."""
    return None if settings.training_group is None else settings.training_group.driver


def _with_own_catalog(command: str, settings: Settings) -> str:
    """Requires LORAY_CATALOG on the cluster's nodes if the catalog's URL holds a password, which is not sent."""
    return f"{_OWN_CATALOG} && {command}" if settings.catalog_has_password else command


def _command(python: str, source: str, *, resume: bool, tenant: str = DEFAULT_TENANT, no_plan: bool = False) -> str:
    flags = [
        *(["--resume"] if resume else []),
        *_unplanned(no_plan),
        *([] if tenant == DEFAULT_TENANT else ["--tenant", tenant]),
    ]
    return shlex.join([python, *_DRIVER, source, "--events", *flags])


def _unplanned(no_plan: bool) -> list[str]:
    return ["--no-plan"] if no_plan else []


def _staged(spec: TrainSpec, stage: Path) -> str:
    """Writes the recipe to `stage`, with what is null: left out, it would be given its default. Returns the redirection
    with which a shell in that folder passes it to a driver whose recipe is STDIN.
    """
    (stage / _RECIPE).write_text(spec.model_dump_json(), encoding="utf-8")
    return f"< {_RECIPE}"


def _metadata(spec: TrainSpec, tenant: str = DEFAULT_TENANT) -> dict[str, str]:
    return {"loray_name": qualified_name(tenant, spec.name), "loray_method": spec.adapter.method}


def _sources(data: DataSpec) -> list[str]:
    """Returns the sources that are files of this machine."""
    return [source for source in data.paths if "://" not in source]


def _local_files(source: str, recipe: Recipe) -> tuple[Path, ...]:
    """Returns the files that `source`, an absolute path, is read from. Raises DataError where there is none."""
    files = uploaded_files(source)
    for path in files:
        if not path.is_file():
            raise DataError(f"data file {path} does not exist; relative paths start at {recipe.folder}")
    return files
