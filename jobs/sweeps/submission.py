"""Submits a sweep for a caller of the API, as one job of the caller's tenant."""

from __future__ import annotations

from jobs.submission.tracker import JobTracker
from jobs.sweeps.spec import SweepPlan
from loray.catalog import Job
from loray.errors import PermissionDenied


def submit(plan: SweepPlan, jobs: JobTracker) -> Job:
    """As `JobTracker.submit`. For a caller with a limit of workers one trial runs at a time, so that the sweep has no
    more than its job counts for; PermissionDenied where `num_workers` varies then.
    """
    if jobs.limits.workers is not None:
        if any(trial.recipe.num_workers != plan.recipe.num_workers for trial in plan.trials):
            raise PermissionDenied("num_workers cannot vary where a limit of workers is set")
        plan = plan.model_copy(update={"max_concurrent": 1})
    return jobs.submit_sweep(plan.recipe, [trial.recipe for trial in plan.trials], plan.model_dump_json())
