"""Submissions to Ray's job server: a driver's work, at a place, as a command line, its environment, and metadata.

A recipe or a sweep's plan goes to the driver's standard input, from a file that Ray uploads: a command line has no room
for a large one.

Ray's dashboard shows a job's environment, so no password is sent to a cluster of other machines. Its nodes have their
own AWS credentials and, if the catalog's URL holds a password, their own LORAY_CATALOG.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loray.errors import DataError
from loray.local.cluster import current_cluster
from loray.locations import is_this_machine
from loray.recipes.load import STDIN, Recipe
from loray.recipes.many import ManyPlan
from loray.recipes.sources import uploaded_files
from loray.settings import Settings
from loray.spec import DEFAULT_TENANT, DataSpec, RlSpec, TrainSpec, qualified_name

_OF_SERVICES = ("MLFLOW_", "WANDB_", "TEACHER_API_KEY")
_INPUT = "loray-input.json"
# The shell exits with the message if the cluster's nodes have no LORAY_CATALOG.
_OWN_CATALOG = ': "${LORAY_CATALOG:?must be set on the nodes of the cluster: URLs with a password are not sent to it}"'


class Work(NamedTuple):
    """A job's driver runs `python -m MODULE ARGUMENTS`, with `text` as its standard input.

    metadata  of the job, for people
    recipes   whose data the driver reads; none: it needs nothing of this machine
    """

    module: str
    arguments: tuple[str, ...]
    metadata: dict[str, str]
    recipes: tuple[Recipe, ...] = ()
    text: str | None = None

    @classmethod
    def training(
        cls, recipe: Recipe, *, resume: bool = False, no_plan: bool = False, tenant: str = DEFAULT_TENANT
    ) -> Work:
        arguments = [STDIN, *_chosen({"--resume": resume, "--no-plan": no_plan})]
        if tenant != DEFAULT_TENANT:
            arguments += ["--tenant", tenant]
        spec = recipe.spec
        metadata = {"loray_name": qualified_name(tenant, spec.name), "loray_method": spec.adapter.method}
        # With what is null: left out, it would be given its default.
        module = "jobs.rl.driver" if isinstance(spec.objective, RlSpec) else "jobs.train"
        return cls(module, tuple(arguments), metadata, (recipe,), spec.model_dump_json())

    @classmethod
    def many(
        cls,
        name: str,
        recipes: Sequence[Recipe],
        *,
        is_elsewhere: bool = False,
        resume: bool = False,
        no_plan: bool = False,
        tenant: str = DEFAULT_TENANT,
    ) -> Work:
        """Trains the adapters of these recipes as one job. `is_elsewhere`: where their folders are not."""
        arguments = [STDIN, *_chosen({"--resume": resume, "--no-plan": no_plan})]
        if tenant != DEFAULT_TENANT:
            arguments += ["--tenant", tenant]
        below = _folders(recipes) if is_elsewhere else {}
        plan = ManyPlan.of(name, recipes, lambda recipe: below.get(recipe.folder, str(recipe.folder)))
        metadata = {"loray_name": qualified_name(tenant, name), "loray_adapters": str(len(recipes))}
        return cls("jobs.many.driver", tuple(arguments), metadata, tuple(recipes), plan.model_dump_json())

    @classmethod
    def sweep(cls, recipe: Recipe, plan: str, *, no_plan: bool = False) -> Work:
        """Runs the trials of `recipe` that are in `plan`, as JSON."""
        arguments = (STDIN, *_chosen({"--no-plan": no_plan}))
        metadata = {"loray_name": recipe.spec.name, "loray_method": recipe.spec.adapter.method}
        return cls("jobs.sweeps.driver", arguments, metadata, (recipe,), plan)

    @classmethod
    def resumed_sweep(cls, name: str, *, no_plan: bool = False) -> Work:
        """Goes on with the latest sweep of the adapter `name`."""
        arguments = ("--resume", name, *_chosen({"--no-plan": no_plan}))
        return cls("jobs.sweeps.driver", arguments, {"loray_name": name})


def _folders(recipes: Sequence[Recipe]) -> dict[Path, str]:
    """Names the folders of recipes below the one that Ray uploads: of several each has one of its own there."""
    found = dict.fromkeys(recipe.folder for recipe in recipes)
    return {folder: str(number) if len(found) > 1 else "." for number, folder in enumerate(found)}


def _chosen(flags: dict[str, bool]) -> list[str]:
    return [flag for flag, is_given in flags.items() if is_given]


class Place(NamedTuple):
    """Where a job runs, and the environment that it is given there.

    stage    a folder that Ray uploads, and in which the driver starts
    address  of another cluster, whose nodes have loray installed; None: this machine, or the cluster of this process,
             whose nodes have its Python
    is_here  the driver runs in the recipe's folder, on this machine
    """

    settings: Settings
    stage: Path
    env: dict[str, str]
    address: str | None = None
    is_here: bool = False

    @classmethod
    def at(cls, address: str | None, settings: Settings, stage: Path) -> Place:
        """Returns the place of a command's job. Without an address it is this machine's own cluster.

        Raises SettingsError if the cluster cannot reach the store or the catalog.
        """
        if address is not None and not is_this_machine(address):
            settings.check_reachable_from(address)
            return cls(settings, stage, settings.to_remote_env(), address)
        # What other services ask for, too: on this machine, only its user sees a job's environment.
        ours = {name: value for name, value in os.environ.items() if name.startswith(_OF_SERVICES)}
        ours.pop("WANDB_SERVICE", None)  # of this process alone
        return cls(settings, stage, settings.to_env() | ours, is_here=True)

    @classmethod
    def of_server(cls, settings: Settings, stage: Path) -> Place:
        """Returns the place of a job that a process of the cluster submits, the API's server."""
        is_private = current_cluster(settings.home) is not None  # only this user can read its dashboard
        return cls(settings, stage, settings.to_env(secrets=is_private))

    def provide(self, recipe: Recipe, below: str = ".") -> None:
        """Copies local data files to where Ray uploads them from, if the job runs on another cluster. Raises DataError
        for those that are missing, which a job would report only after it has started, and those that it could not
        open: outside the recipe's folder, or named by an absolute path of this machine. A server's job has no folder
        that relative paths could start at, and its absolute ones are those of the driver's machine.
        """
        named = _local(recipe.spec.data)
        if self.address is None and not self.is_here:
            for path in named:
                if not Path(path).is_absolute():
                    raise DataError(f"data file {path!r} is a relative path; name an s3:// URL or an absolute path")
            return
        for path, source in zip(named, _local(recipe.data()), strict=True):
            if self.address is not None and not Path(source).is_relative_to(recipe.folder):
                raise DataError(
                    f"{source} lies outside {recipe.folder}, which is all that is uploaded to {self.address}; "
                    "move it there, or put it on object storage and name its s3:// URL"
                )
            files = uploaded_files(source)
            for file in files:
                if not file.is_file():
                    raise DataError(f"data file {file} does not exist; relative paths start at {recipe.folder}")
            if self.address is None:
                continue
            if Path(path).expanduser().is_absolute():
                raise DataError(
                    f"data file {source} is uploaded to {self.address}, where that path leads nowhere: write it "
                    f"relative to the recipe, as {Path(source).relative_to(recipe.folder)}"
                )
            for file in files:
                target = self.stage / below / file.relative_to(recipe.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        self._provide_code(recipe)

    def _provide_code(self, recipe: Recipe) -> None:
        """Copies the module of a recipe's own rewards, if it lies beside the recipe; else it is installed there."""
        objective = recipe.spec.objective
        if self.address is None or not isinstance(objective, RlSpec) or objective.runs_code is None:
            return
        module = objective.runs_code.partition(":")[0].partition(".")[0]
        if (file := recipe.folder / f"{module}.py").is_file():
            shutil.copyfile(file, self.stage / file.name)
        elif (package := recipe.folder / module).is_dir():
            shutil.copytree(package, self.stage / module, ignore=shutil.ignore_patterns("__pycache__"))


class Submission(NamedTuple):
    """The arguments of `JobSubmissionClient.submit_job` of these names."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    entrypoint_resources: dict[str, float] | None = None

    @classmethod
    def of(cls, work: Work, place: Place) -> Submission:
        """Returns the job that does `work` at `place`. Raises DataError for data that it could not read there."""
        python = sys.executable if place.address is None else "python"
        # -P: a module in the recipe's folder must not shadow one of ours
        steps = [f"exec {shlex.join([python, '-P', '-m', work.module, *work.arguments, '--events'])}"]
        runtime_env: dict[str, Any] = {"env_vars": place.env}
        for recipe in work.recipes:
            place.provide(recipe, _folders(work.recipes)[recipe.folder])
        if work.recipes and place.is_here:
            steps.insert(0, f"cd {shlex.quote(str(work.recipes[0].folder))}")
        if work.text is not None:
            (place.stage / _INPUT).write_text(work.text, encoding="utf-8")
            steps.insert(0, f"exec < {_INPUT}")
            runtime_env["working_dir"] = str(place.stage)
        if "LORAY_CATALOG" not in place.env:
            steps.insert(0, _OWN_CATALOG)
        # A training group says what the driver takes of its node; without one Ray starts it on the head node.
        group = place.settings.training_group
        return cls(" && ".join(steps), runtime_env, work.metadata, None if group is None else group.driver)


def for_server(recipe: Recipe, url: str) -> TrainSpec:
    """Returns the recipe for a server at `url`, whose cluster opens the data itself. Raises DataError for data that it
    cannot open: files of this machine, unless the server is on it.
    """
    here = [source for source in _local(recipe.data()) if any(path.exists() for path in uploaded_files(source))]
    if here and not is_this_machine(url):
        raise DataError(
            f"{here[0]} is a file of this machine, and the cluster of {url} cannot read it; put it on object storage "
            "and name its s3:// URL"
        )
    return recipe.spec.model_copy(update={"data": recipe.data()})


def _local(data: DataSpec) -> list[str]:
    """Returns the sources that are files of this machine."""
    return [source for source in data.paths if "://" not in source]
