"""`loray plan`, and the check of a plan before `loray train`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from loray.bases.config import ModelConfig
from loray.bases.presets import known_shape, shapes_in
from loray.bases.registry import read_config
from loray.cli.output import console, count, emit, json_option, pairs, table
from loray.cli.recipes import RecipeSources, recipe_options, several_recipes
from loray.errors import LorayError, NotFoundError, SpecError
from loray.machine import Machine, Rates, hardware
from loray.planning.compute import ExchangeVolume
from loray.planning.devices import ASSUMED_GPU, PRESETS, THIS_MACHINE, Device, gpu_here, host
from loray.planning.many import Load, ManyPlan, plan_many
from loray.planning.memory import WHAT, MemoryPlan
from loray.planning.plan import Plan, make_plan
from loray.planning.run import shape_of
from loray.recipes.load import Recipe
from loray.recipes.many import on_one_worker
from loray.recipes.resolve import continued, on_hardware
from loray.settings import Settings
from loray.spec import RlSpec, TrainSpec, format_seconds, format_size

_FITS = {True: "fits", False: "does not fit"}
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
    """Finds the device: a preset, a YAML file, or this machine, of which `use_gpu` takes a GPU. SpecError for none."""
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


def shape_of_recipe(base: str, config: Path | None, home: Path) -> ModelConfig:
    """Returns the shape in `config` if it is given, else of the base on this machine, else of a well-known base."""
    if config is None:
        return known_shape(base, home)
    if config.name == "config.json":
        return read_config(config.parent)
    try:
        return ModelConfig.from_hf(json.loads(config.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SpecError(f"{config} is not the config.json of a model: {e!r}") from e


def measured(home: Path, *, even_if_busy: bool = True) -> Machine:
    """Returns this machine with its rates, which are measured where `home` does not have them: in another process, as
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
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # rates are of all cores
    done = subprocess.run(
        [sys.executable, "-m", "loray.train.rates"], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LorayError(f"this machine could not be measured; name a --device: {done.stderr.strip()[-500:]}")
    machine = machine._replace(rates=Rates.from_json(json.loads(done.stdout)))
    if not is_busy:
        machine.cache(home)
    return machine


def _with_parent(spec: TrainSpec, model: ModelConfig) -> TrainSpec:
    """Adds the RoPE of `init_adapter`, if the recipe has one. Raises NotFoundError, and SpecError as `continued`."""
    if spec.init_adapter is None:
        return spec
    from loray.cli.connect import open_services  # the catalog, which other plans do not need

    with open_services() as services:
        ref = services.catalog.adapters.resolve(spec.init_adapter)
        parent = services.catalog.adapters.version(ref.name, ref.version).manifest
    return continued(spec, parent, ref.label, model)


def show(plan: Plan, spec: TrainSpec, to: Console) -> None:
    to.print(_run(plan, spec))
    memory, host, usable = plan.memory, plan.host, plan.device.usable_bytes
    to.print(f"\n[bold]Memory of a worker[/bold] ({plan.device.name}: {format_size(usable)} to use)")
    to.print(_items(memory))
    moments = ", ".join(f"{format_size(memory.at(moment))} {moment} ({what})" for moment, what in WHAT.items())
    more = [("moments", moments)]
    if plan.measuring:
        more.append(
            ("measuring", f"{format_size(plan.measuring)}, before publishing: {_FITS[plan.measuring <= usable]}")
        )
    to.print(_peak(memory, *more, fits=memory.peak_bytes <= usable))
    if host is not None:
        of = "" if host.usable_bytes is None else f": {format_size(host.usable_bytes)} to use"
        to.print(f"\n[bold]Memory of a node[/bold] (its own, with {host.num_workers} workers and the driver{of})")
        to.print(_items(host))
        to.print(_peak(host, fits=host.fits))
    if rows := plan.exchanges:
        to.print("\n[bold]Sent by a worker for one layer, forward[/bold] (×: under Ulysses; backward: as much again)")
        to.print(_exchanges(rows))
    to.print("\n[bold]A step of a worker[/bold] (estimates; shares of the peak are assumed)")
    to.print(_step(plan))
    for problem in plan.problems:
        style = "red" if problem.severity == "refusal" else "yellow"
        to.print(f"\n[{style}]{problem.severity}[/{style}]: {problem.message}", soft_wrap=True)
        to.print(f"  {problem.remedy}", soft_wrap=True, markup=False)


def _run(plan: Plan, spec: TrainSpec) -> Table:
    run = plan.run
    share = run.trained.total / run.base.total
    rows = f"{run.num_rows} pairs × 2" if run.row_size > 1 else f"{run.num_rows}"
    attention = "dense" if run.group_size is None else f"S2-Attn, G = {run.group_size}"
    if run.shared_dense is not None:
        attention += f", ulysses over {run.sequence} workers"
    keeps = "layer inputs (checkpointing)" if run.checkpointing else "all activations"
    layout = f"{run.num_workers} workers: {run.num_data_groups} data × {run.sequence} sequence, {run.strategy}"
    return pairs(
        [
            ("recipe", f"{spec.name}: {spec.adapter.method} on {spec.base}"),
            ("parameters", f"{count(run.base.total)}, {count(run.trained.total)} trained ({share:.2%}), {run.dtype}"),
            ("rows", f"{rows} × {run.padded_length} tokens × {run.accumulation} micro-batches; {attention}"),
            ("workers", f"{layout}; {run.tokens_per_worker} tokens each; keep {keeps}"),
            *_rollouts(spec),
        ]
    )


def _rollouts(spec: TrainSpec) -> list[tuple[str, str]]:
    objective = spec.objective
    if not isinstance(objective, RlSpec):
        return []
    answers = f"{objective.group_size} answers to each of {objective.prompts_per_step} prompts a step"
    return [
        ("rollouts", f"{answers}, up to {objective.max_tokens} tokens each, by the deployment of {spec.base}"),
        ("", "and in its pool and its KV cache; what follows is the trainer's, and a pass of the rows above"),
    ]


def _items(memory: MemoryPlan) -> Table:
    rows = []
    for item in memory.items:
        share = f"{item.nbytes / memory.peak_bytes:.1%}" if memory.peak_moment in item.moments else "–"
        when = "throughout" if item.moments == memory.moments else ", ".join(item.moments)
        rows.append((item.name, format_size(item.nbytes), share, when))
    return table(("ITEM", "SIZE", "OF PEAK", "WHEN"), rows, right=("SIZE", "OF PEAK"))


def _peak(memory: MemoryPlan, *more: tuple[str, str], fits: bool) -> Table:
    peak, most = f"{format_size(memory.peak_bytes)}, at {memory.peak_moment}: {_FITS[fits]}", memory.dominant
    return pairs([("peak", peak), ("dominant", f"{most.name}, {format_size(most.nbytes)}"), *more])


def _exchanges(rows: list[list[ExchangeVolume]]) -> Table:
    groups = [exchange.group_size for exchange in rows[0]]
    columns = ["P", "TOKENS"]
    for group in groups:
        columns += [f"HALO, G = {group}", "HOPS"]
    columns += ["ULYSSES", "RING"]
    cells = []
    for row in rows:
        first = row[0]
        line: list[object] = [first.sequence, first.num_tokens // first.sequence]
        for exchange in row:
            times = exchange.ulysses_bytes / exchange.halo_bytes if exchange.halo_bytes else float("inf")
            line += [f"{format_size(exchange.halo_bytes)} ({times:.1f}×)", exchange.num_hops]
        cells.append([*line, format_size(first.ulysses_bytes), format_size(first.ring_bytes)])
    return table(columns, cells, right=columns)


def _reference(plan: Plan) -> list[tuple[str, str]]:
    if not plan.run.has_reference:
        return []
    once = f"{format_seconds(plan.time.reference_s)} for a step's rows, once, before the first step"
    return [("reference", f"{plan.flops.reference:.3g} FLOPs, {once}; kept for further runs")]


def _step(plan: Plan) -> Table:
    flops, time, traffic, device = plan.flops, plan.time, plan.traffic, plan.device
    sent = [
        (f"{format_size(traffic.halo_bytes)} halo", traffic.halo_bytes),
        (f"{format_size(traffic.dense_bytes)} of dense attention", traffic.dense_bytes),
        (f"{format_size(traffic.gradient_bytes)} gradients", traffic.gradient_bytes),
        (f"{format_size(traffic.gather_bytes)} gathered weights", traffic.gather_bytes),
    ]
    return pairs(
        [
            (
                "FLOPs",
                f"{flops.forward:.3g} forward, {flops.backward:.3g} backward, {flops.recompute:.3g} recomputed; "
                f"attention forward {flops.attention:.2g}, dense {flops.dense_attention:.2g}",
            ),
            ("sends", ", ".join(text for text, nbytes in sent if nbytes) or "nothing"),
            (
                "time",
                f"{format_seconds(time.step_s)}: products {format_seconds(time.matmul_s)}, attention "
                f"{format_seconds(time.attention_s)}, elementwise {format_seconds(time.memory_s)}, AdamW "
                f"{format_seconds(time.optimizer_s)}, communication not hidden {format_seconds(time.communication_s)}",
            ),
            *_reference(plan),
            ("tokens/s", f"{time.tokens_per_s:.0f} over all workers; MFU {time.mfu:.1%}"),
            (
                "assumes",
                f"{device.flops / 1e12:.3g} TFLOP/s, of which products reach {device.matmul_share:.0%} and attention "
                f"{device.attention_share:.0%}; {device.bandwidth / 1e9:.0f} GB/s memory, "
                f"{device.link_bandwidth / 1e9:.0f} GB/s between workers; "
                f"{format_size(device.framework_bytes)} framework, {device.fragmentation:.0%} fragmentation of what "
                "comes and goes",
            ),
        ]
    )


@click.command()
@recipe_options
@several_recipes
@device_option("Default: a100-80gb where the recipe uses GPUs, else this-machine.")
@config_option
@json_option
def plan(sources: RecipeSources, device_name: str | None, config: Path | None, as_json: bool) -> None:
    """Estimate memory, traffic and time of RECIPE (a YAML file, a shipped recipe's name, or a JSON object), or of the
    recipe that the options describe. Of several adapters, which `loray train` trains as one job, it has a line or two.

    Exits with 1 where the recipe cannot run as it is; the plan says what would have to change.
    """
    home = Settings.from_env().home
    if not sources.is_one:
        recipes = sources.load(home, is_example=True)[1]
        first = recipes[0].spec
        model = shape_of_recipe(first.base, config, home)
        device = _device(first, home, device_name, is_here=True) or PRESETS[ASSUMED_GPU]
        plans = _plan_cohorts(recipes, model, device)
        if as_json:
            emit([_cohort(each) for each in plans])
        else:
            _print_cohorts(plans, console())
        return
    spec = sources.source.load(home, is_example=True).spec
    model = shape_of_recipe(spec.base, config, home)
    spec = _with_parent(spec, model)
    found = hardware()
    here = on_hardware(spec, found)
    is_elsewhere = device_name is None and here.spec.use_gpu and not found.gpus
    name = device_name or (ASSUMED_GPU if is_elsewhere else THIS_MACHINE)
    device = device_of(name, home, spec.num_workers, use_gpu=bool(here.spec.use_gpu))
    made = make_plan(shape_of(spec, model, dtype=device.training_dtype), device)
    if as_json:
        emit({"recipe": spec.name, "base": spec.base} | made.to_dict())
    else:
        show(made, spec, console())
    if made.is_refused:
        raise click.exceptions.Exit(1)


def check_plan(spec: TrainSpec, home: Path, *, device_name: str | None, is_here: bool, to: Console) -> None:
    """Prints what a run takes. Raises SpecError where it cannot fit, with what to change.

    Where workers run here, this machine is measured once, at a time when it is not busy; before that, no time is told.
    Where they run elsewhere, and no device is named, nobody knows their memory: then a run that would not fit the usual
    GPU is only warned of. A base of unknown shape has no plan.
    """
    model = shapes_in(home)(spec.base)
    if model is None:
        to.print(f"no plan: the base {spec.base} is not on this machine", highlight=False, soft_wrap=True)
        return
    try:
        spec = _with_parent(spec, model)
    except NotFoundError as e:
        to.print(f"no plan: {e}", highlight=False, soft_wrap=True)
        return
    device = _device(spec, home, device_name, is_here)
    if device is None:
        to.print("no plan of memory: name the workers' --device to have one", highlight=False, soft_wrap=True)
        return
    plan = make_plan(shape_of(spec, model, dtype=device.training_dtype), device)
    is_assumed = device_name is None and device.name == ASSUMED_GPU
    why = on_hardware(spec, hardware()).why if is_here and device_name is None else None
    is_timed = not device.is_host or Machine.here(home).rates is not None
    cut = f"; {plan.run.num_rows} rows at once × {plan.run.accumulation} a step"
    line = _line(plan, why, is_timed=is_timed) + (cut if spec.batch.accumulation == "auto" else "")
    to.print(line, highlight=False, soft_wrap=True)
    for problem in plan.problems:
        text = f"{problem.message}; {problem.remedy}"
        if problem.severity == "refusal" and not is_assumed:
            raise SpecError(f"{text}. `loray plan` shows all of it; --no-plan starts it all the same")
        hint = "; --device says which GPU it is" if problem.severity == "refusal" else ""
        to.print(f"warning: {text}{hint}", highlight=False, markup=False, soft_wrap=True)


def check_plans(recipes: Sequence[Recipe], home: Path, *, device_name: str | None, is_here: bool, to: Console) -> None:
    """Prints what a job of several adapters takes, as `check_plan` does for one. Raises SpecError where they cannot be
    trained in one job, or do not fit, and UnsupportedError for one that is to be trained alone.
    """
    first = recipes[0].spec
    model = shapes_in(home)(first.base)
    if model is None:
        to.print(f"no plan: the base {first.base} is not on this machine", highlight=False, soft_wrap=True)
        return
    device = _device(first, home, device_name, is_here)
    if device is None:
        to.print("no plan of memory: name the workers' --device to have one", highlight=False, soft_wrap=True)
        return
    _print_cohorts(_plan_cohorts(recipes, model, device), to)


def _plan_cohorts(recipes: Sequence[Recipe], model: ModelConfig, device: Device) -> list[ManyPlan]:
    """Plans what is trained together, by the longest rows; steps that only the data tells count once."""
    from loray.train.many.cohort import cohorts

    specs = [recipe.spec for recipe in recipes]
    num_workers = max(spec.num_workers // spec.parallel.sequence for spec in specs)
    found = []
    for cohort in cohorts([on_one_worker(spec) for spec in specs], model):
        loads = {}
        for spec in cohort:
            run = make_plan(shape_of(spec, model, dtype=device.training_dtype), device).run
            loads[spec.name] = Load(run, spec.max_steps or 1, run.tokens_per_step)
        found.append(plan_many(loads, device, num_workers))
    return found


def _cohort(plan: ManyPlan) -> dict[str, Any]:
    return {
        "adapters": [name for share in plan.shares for name in share],
        "device": plan.device.name,
        "tokens_per_pass": plan.tokens_per_pass,
        "memory": plan.memory.to_dict(),
        "round_s": plan.round_s,
        "total_s": plan.total_s,
    }


def _print_cohorts(plans: Sequence[ManyPlan], to: Console) -> None:
    for each in plans:
        number = sum(map(len, each.shares))
        to.print(f"plan: {number} adapters together: {each.memory_line()}", highlight=False, soft_wrap=True)
        if not each.device.is_host or Machine.here(Settings.from_env().home).rates is not None:
            to.print(f"      {each.time_line()}", highlight=False, soft_wrap=True)


def _device(spec: TrainSpec, home: Path, device_name: str | None, is_here: bool) -> Device | None:
    """Returns the device of the workers; None where it is not known."""
    if device_name is not None:
        return device_of(device_name, home, spec.num_workers, use_gpu=spec.use_gpu is True)
    if not is_here:
        return device_of(ASSUMED_GPU, home, spec.num_workers) if spec.use_gpu is True else None
    if not on_hardware(spec, hardware()).spec.use_gpu:
        return host(measured(home, even_if_busy=False), spec.num_workers)
    return gpu_here(Machine.here(home)) or device_of(ASSUMED_GPU, home, spec.num_workers)


def _line(plan: Plan, why: str | None, *, is_timed: bool) -> str:
    memory = f"{format_size(plan.memory.peak_bytes)} of {format_size(plan.device.usable_bytes)}"
    dtype = plan.run.dtype if why is None else f"{plan.run.dtype}: {why}"
    step = ""
    if is_timed:
        step = f", about {format_seconds(plan.time.step_s)} a step ({plan.time.tokens_per_s:,.0f} tokens/s)"
        if plan.run.has_reference:
            step += f" after {format_seconds(plan.time.reference_s)} for its rows' reference"
    return f"plan: {memory} a worker on {plan.device.name}{step}, in {dtype}"
