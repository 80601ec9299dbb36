"""The plan that `loray train` makes before it starts anything: one line, or the reason why the run cannot work."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from loray.bases.presets import shapes_in
from loray.cli.planning.devices import device_of
from loray.cli.planning.parents import with_parent
from loray.errors import NotFoundError, SpecError
from loray.planning.devices import ASSUMED_GPU, THIS_MACHINE, Device, host
from loray.planning.plan import Plan, make_plan
from loray.planning.rates import kept_rates
from loray.planning.run import run_of
from loray.spec import TrainSpec, format_size


def check_plan(spec: TrainSpec, home: Path, *, device_name: str | None, is_here: bool, to: Console) -> None:
    """Print what a run takes. Raises SpecError where it cannot fit, with what to change.

    Nothing is measured. Where workers run elsewhere or on GPUs, and no device is named, nobody knows their memory:
    then a run that would not fit the usual GPU is only warned of. A base of unknown shape has no plan.
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
    run, device = run_of(spec, model), _device(spec, home, device_name, is_here)
    if device is None:
        to.print("no plan of memory: name the workers' --device to have one", highlight=False, soft_wrap=True)
        return
    plan = make_plan(run, device)
    is_assumed = device_name is None and device.name == ASSUMED_GPU
    to.print(
        _line(plan, is_timed=device.name != THIS_MACHINE or kept_rates(home) is not None),
        highlight=False,
        soft_wrap=True,
    )
    for problem in plan.problems:
        text = f"{problem.message}; {problem.remedy}"
        if problem.severity == "refusal" and not is_assumed:
            raise SpecError(f"{text}. `loray plan` shows all of it; --no-plan starts it all the same")
        hint = "; --device says which GPU it is" if problem.severity == "refusal" else ""
        to.print(f"warning: {text}{hint}", highlight=False, markup=False, soft_wrap=True)


def _device(spec: TrainSpec, home: Path, device_name: str | None, is_here: bool) -> Device | None:
    if device_name is not None:
        return device_of(device_name, home, spec.num_workers)
    if spec.use_gpu:
        return device_of(ASSUMED_GPU, home, spec.num_workers)
    if not is_here:
        return None
    return host(kept_rates(home), spec.num_workers)


def _line(plan: Plan, *, is_timed: bool) -> str:
    memory = f"{format_size(plan.memory.peak_bytes)} of {format_size(plan.device.usable_bytes)}"
    step = f", about {plan.time.step_s:.3g} s a step" if is_timed else ""
    return f"plan: {memory} a worker on {plan.device.name}{step}"
