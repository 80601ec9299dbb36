"""The plan that `loray train` makes before it starts anything: one line, or the reason why the run cannot work."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from loray.bases.presets import shapes_in
from loray.cli.planning.devices import device_of, measured
from loray.cli.planning.parents import with_parent
from loray.errors import NotFoundError, SpecError
from loray.machine import Machine, hardware
from loray.planning.devices import ASSUMED_GPU, Device, gpu_here, host
from loray.planning.plan import Plan, make_plan
from loray.planning.run import run_of
from loray.recipes.resolve import on_hardware
from loray.spec import TrainSpec, format_seconds, format_size


def check_plan(spec: TrainSpec, home: Path, *, device_name: str | None, is_here: bool, to: Console) -> None:
    """Print what a run takes. Raises SpecError where it cannot fit, with what to change.

    Where workers run here, this machine is measured once, at a time when it is not busy; before that, no time is told.
    Where they run elsewhere, and no device is named, nobody knows their memory: then a run that would not fit the usual
    GPU is only warned of. A base of unknown shape has no plan.
    """
    model = shapes_in(home)(spec.base)
    if model is None:
        to.print(f"no plan: the base {spec.base} is not on this machine", highlight=False, soft_wrap=True)
        return
    try:
        spec = with_parent(spec, model)
    except NotFoundError as e:
        to.print(f"no plan: {e}", highlight=False, soft_wrap=True)
        return
    device = _device(spec, home, device_name, is_here)
    if device is None:
        to.print("no plan of memory: name the workers' --device to have one", highlight=False, soft_wrap=True)
        return
    plan = make_plan(run_of(spec, model, dtype=device.training_dtype), device)
    is_assumed = device_name is None and device.name == ASSUMED_GPU
    why = on_hardware(spec, hardware()).why if is_here and device_name is None else None
    is_timed = not device.is_host or Machine.here(home).rates is not None
    to.print(_line(plan, why, is_timed=is_timed), highlight=False, soft_wrap=True)
    for problem in plan.problems:
        text = f"{problem.message}; {problem.remedy}"
        if problem.severity == "refusal" and not is_assumed:
            raise SpecError(f"{text}. `loray plan` shows all of it; --no-plan starts it all the same")
        hint = "; --device says which GPU it is" if problem.severity == "refusal" else ""
        to.print(f"warning: {text}{hint}", highlight=False, markup=False, soft_wrap=True)


def _device(spec: TrainSpec, home: Path, device_name: str | None, is_here: bool) -> Device | None:
    """The device of the workers; None where it is not known."""
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
    step = (
        f", about {format_seconds(plan.time.step_s)} a step ({plan.time.tokens_per_s:,.0f} tokens/s)"
        if is_timed
        else ""
    )
    return f"plan: {memory} a worker on {plan.device.name}{step}, in {dtype}"
