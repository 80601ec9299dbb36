"""The pages of training jobs: the list, the form of a recipe, one run, and runs beside each other."""

from __future__ import annotations

import time
from typing import Annotated, Any, get_args
from urllib.parse import quote

from fastapi import Path, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from jobs.rl.promotion import publish_rollout
from jobs.submission.tracker import JobTracker
from loray.catalog import AdapterVersion, Job
from loray.errors import ConflictError, LorayError, SpecError
from loray.policy.auth import check
from loray.recipes.sources import UPLOADED
from loray.spec import JobId, JobStatus, Method, Sha256
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console.backend import Console, ConsoleDep, Jobs, Service
from serve_apps.console.recipes import form_fields, is_begun, plan_of, recipe_of, recipe_text
from serve_apps.console.rendering import MOST_SUGGESTED, led_to, page_router, read_form
from serve_apps.console.runs import REWARDED, Seen, compare, curve_of, loss_rows, rank, spread

_PAGE = 50
_COMPARED = 4
_ROWS = 12  # of a table beside a curve
JobPath = Annotated[JobId, Path()]

router = page_router()


@router.get("/jobs")
@may("follow")
def list_jobs(
    console: ConsoleDep,
    jobs: Jobs,
    request: Request,
    cursor: JobId | None = None,
    status: JobStatus | None = None,
) -> Response:
    """Jobs of the own tenant, newest first."""
    page = jobs.page(_PAGE, cursor, status, None)
    return console.renderer.page(
        request,
        "jobs.html",
        jobs=page.items,
        more=page.next,
        chosen=status,
        statuses=get_args(JobStatus),
        prefix=UPLOADED,
    )


@router.get("/jobs/new")
@may("train")
def show_form(
    console: ConsoleDep, service: Service, request: Request, file: Annotated[str, Query(max_length=64)] = ""
) -> Response:
    """Show the form of a recipe, which learns from an uploaded file where one is named."""
    catalog = service.catalog
    return console.renderer.page(
        request,
        "new_job.html",
        fields=form_fields(),
        values={"data.train": UPLOADED + file} if file else {},
        bases=list(catalog.bases.fingerprints())[:MOST_SUGGESTED],
        methods=get_args(Method),
        uploaded=catalog.files.page(purposes=["fine-tune"], limit=MOST_SUGGESTED).files,
        prefix=UPLOADED,
    )


@router.post("/jobs/plan")
@may("train")
async def show_plan(console: ConsoleDep, service: Service, request: Request, asking: CurrentPrincipal) -> Response:
    """Show what `loray plan` says of the form; where it is no recipe yet, why."""
    form, settings = await read_form(request), console.backend.settings
    if not is_begun(form):
        hint = "What a run takes is shown here once the recipe has a name and data."
        return console.renderer.page(request, "parts/plan.html", plan=None, problem=hint)
    try:
        console.backend.rates.take_advice(asking, time.monotonic())
        estimate = await run_in_threadpool(lambda: plan_of(recipe_of(form, settings.home), service.catalog, settings))
    except LorayError as e:
        return console.renderer.page(request, "parts/plan.html", plan=None, problem=str(e))
    return console.renderer.page(request, "parts/plan.html", plan=estimate, problem="")


@router.post("/jobs")
@may("train")
async def submit_job(console: ConsoleDep, jobs: Jobs, request: Request, asking: CurrentPrincipal) -> Response:
    """Train the recipe of the form and publish it, as `POST /api/v1/jobs` does."""
    form = await read_form(request)

    def submit() -> Job:
        recipe = recipe_of(form, console.backend.settings.home)
        if recipe.publish.aliases:
            check(asking, "promote")
        return jobs.submit(recipe, None, resume=False)

    job = await run_in_threadpool(submit)
    return led_to(request, f"/jobs/{job.id}")


@router.get("/jobs/compare")
@may("follow")
def compare_jobs(
    console: ConsoleDep,
    jobs: Jobs,
    request: Request,
    job: Annotated[list[JobId], Query(max_length=_COMPARED)] = [],  # noqa: B006 - not changed
) -> Response:
    """The runs of some jobs beside each other."""
    ids = list(dict.fromkeys(job))
    if not ids:
        raise SpecError(f"choose up to {_COMPARED} jobs of the list, and compare them")
    found = [jobs.get(id) for id in ids]
    seen = {each.id: (each, _look(console, jobs, each)) for each in found}
    return console.renderer.page(request, "compare.html", **compare(seen)._asdict())


@router.get("/jobs/{id}/live")
@router.get("/jobs/{id}")
@may("follow")
def show_job(console: ConsoleDep, jobs: Jobs, request: Request, id: JobPath) -> Response:
    job = jobs.get(id)
    recipe = recipe_text(job.recipe, console.backend.settings.home)
    return console.renderer.followed(request, "job.html", recipe=recipe, **_state(console, jobs, job))


def _state(console: Console, jobs: JobTracker, job: Job) -> dict[str, Any]:
    seen = _look(console, jobs, job)
    lines = {
        "rate": {step.step: step.lr for step in seen.steps if step.lr is not None},
        "pace": {step.step: step.tokens_per_s for step in seen.steps if step.tokens_per_s is not None},
    }
    return {
        "job": job,
        "parts": jobs.parts(job),
        "files": [path.removeprefix(UPLOADED) for path in job.recipe.data.paths if path.startswith(UPLOADED)],
        "log": seen.log,
        "problem": seen.problem,
        "stage": seen.stage,
        "samples": seen.samples,
        "rewards": curve_of(seen.rewards),
        "mismatch": curve_of(seen.mismatch),
        "rewarded": loss_rows({**seen.rewards, **seen.mismatch}, _ROWS, REWARDED) if seen.rewards else (),
        "rollout": seen.rollout,
        "sweep": None if seen.trials is None else rank(seen.trials),
        "curve": seen.curve,
        "subjects": list(seen.lines),
        "losses": loss_rows(seen.lines, _ROWS),
        "last": seen.steps[-1] if seen.steps else None,
        "steps": spread(seen.steps, _ROWS)[::-1],
        "rate": curve_of({"learning rate": lines["rate"]}),
        "pace": curve_of({"tokens/s": lines["pace"]}),
    }


def _look(console: Console, jobs: JobTracker, job: Job) -> Seen:
    return console.histories.of(job, console.backend.settings).look(job, jobs.tail)


@router.post("/jobs/{id}/publish")
@may("publish")
async def publish_rollout_version(
    console: ConsoleDep, jobs: Jobs, service: Service, request: Request, id: JobPath, digest: Sha256
) -> Response:
    """Publish the version that a run samples with now, which goes on. `digest`: the one on the page."""

    def published() -> AdapterVersion:
        job = jobs.get(id)
        seen = _look(console, jobs, job).rollout
        if seen is None or seen.digest != digest:
            raise ConflictError("the run has gone on, and has another version now; look at it again")
        return publish_rollout(job, digest, console.backend.settings, service.catalog)

    version = await run_in_threadpool(published)
    tenant, _, name = version.name.rpartition("/")
    whose = f"?tenant={quote(tenant)}" if tenant else ""
    return led_to(request, f"/adapters/{quote(name)}/versions/{version.version}{whose}")


@router.post("/jobs/{id}/stop")
@may("train")
def stop_job(jobs: Jobs, request: Request, id: JobPath) -> Response:
    job = jobs.stop(id)
    return led_to(request, f"/jobs/{job.id}")
