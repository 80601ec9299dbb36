"""Recipes on pages: the fields of the form, the recipe that a form makes, its text, and what a run of it takes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jobs.submission.tracker import limits_of
from loray.bases.presets import shapes_in
from loray.catalog import Catalog
from loray.errors import NotFoundError, PermissionDenied, SpecError
from loray.machine import Machine
from loray.planning.devices import ASSUMED_GPU, PRESETS, gpu_here, host
from loray.planning.plan import Plan, make_plan
from loray.planning.run import shape_of
from loray.recipes.defaults import FIRST_METHOD, complete, defaults_of
from loray.recipes.fields import fields_of, given, merge, parse_plain, to_yaml
from loray.recipes.load import size_of_base
from loray.recipes.resolve import continued, on_hardware
from loray.settings import Settings
from loray.spec import TrainSpec
from serve_apps.console.rendering import Form

# What people set; whatever else a recipe has is written as YAML.
_PATHS = (
    "name",
    "base",
    "data.train",
    "data.eval",
    "adapter.method",
    "adapter.rank",
    "data.max_length",
    "optimizer.learning_rate",
    "num_epochs",
    "max_steps",
    "num_workers",
    "publish.aliases",
)
_REQUIRED = ("name", "data.train")
_MOST_WORKERS = 1024  # an estimate goes through the ranks one by one
_MOST_SEQUENCE = 32


class Field(NamedTuple):
    """`default`: on a small base, as text; empty where there is none."""

    path: str
    why: str
    default: str
    is_required: bool


class RunEstimate(NamedTuple):
    """`is_timed`: the rates of the device are known, and not its memory alone. `is_assumed`: nobody said which GPU."""

    plan: Plan
    is_timed: bool
    is_assumed: bool


def recipe_text(spec: TrainSpec, home: Path) -> str:
    """Write YAML with the reasons of values, from which the same recipe is made again. `home` has this node's bases."""
    return to_yaml(spec, size_of_base(spec.base, shapes_in(home)))


def form_fields() -> list[Field]:
    """Return the fields of the form, with the reasons and defaults of the first method's recipe."""
    fields, defaults = fields_of(FIRST_METHOD), defaults_of(FIRST_METHOD)
    shown = []
    for path in _PATHS:
        default = defaults[path].on("small")
        value = fields[path].default if default is None else default
        text = "" if value is None or value == () else str(value)
        shown.append(Field(path, defaults[path].why, text, path in _REQUIRED))
    return shown


def is_begun(form: Form) -> bool:
    """Tell whether something of the form's recipe has been typed that has no default."""
    return any(form.get(name) for name in (*_REQUIRED, "rest"))


def recipe_of(form: Form, home: Path) -> TrainSpec:
    """Make the recipe of a form: its YAML, its fields on top of that, and defaults. Raises SpecError."""
    rest = parse_plain(form.get("rest") or "{}", source="the rest of the recipe")
    if not isinstance(rest, dict):
        raise SpecError("the rest of the recipe is a YAML mapping, such as `batch: {rows: 4}`")
    fields = merge(rest, given([f"{path}={form.get(path)}" for path in _PATHS if form.get(path)]))
    base = fields.get("base", TrainSpec.model_fields["base"].default)
    return TrainSpec.parse(complete(fields, size_of_base(base, shapes_in(home))), source="the recipe")


def plan_of(spec: TrainSpec, catalog: Catalog, settings: Settings) -> RunEstimate:
    """Estimate what `loray plan` does, on this machine, or for a recipe with GPUs on its GPU, else on the one that is
    assumed. Nothing is measured.

    Raises SpecError where the driver would refuse it and where the estimate would take long, PermissionDenied for more
    workers than the caller may have, and NotFoundError for a base of unknown shape.
    """
    machine = Machine.here(settings.home)
    device, is_timed, is_assumed = host(machine, spec.num_workers), machine.rates is not None, False
    if on_hardware(spec, machine.hardware).spec.use_gpu:
        known = gpu_here(machine)
        device, is_timed, is_assumed = known or PRESETS[ASSUMED_GPU], True, known is None
    _check_size(spec, catalog, settings)
    model = shapes_in(settings.home)(spec.base)
    if model is None:
        raise NotFoundError(f"the base {spec.base} is not on this machine, so there is no estimate")
    if spec.init_adapter is not None:
        ref = catalog.adapters.resolve(spec.init_adapter)
        spec = continued(spec, catalog.adapters.version(ref.name, ref.version).manifest, ref.label, model)
    return RunEstimate(make_plan(shape_of(spec, model, dtype=device.training_dtype), device), is_timed, is_assumed)


def _check_size(spec: TrainSpec, catalog: Catalog, settings: Settings) -> None:
    limit = limits_of(catalog.principal, settings).workers
    if limit is not None and spec.num_workers > limit:
        raise PermissionDenied(f"num_workers is {spec.num_workers}, and at most {limit} are allowed")
    if spec.num_workers > _MOST_WORKERS or spec.parallel.sequence > _MOST_SEQUENCE:
        raise SpecError(
            f"the console estimates at most {_MOST_WORKERS} workers (num_workers: {spec.num_workers}) in sequence "
            f"groups of at most {_MOST_SEQUENCE} (parallel.sequence: {spec.parallel.sequence}); ask `loray plan`"
        )
