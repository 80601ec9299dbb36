"""Advice: which method, what a run takes, and how many replicas, as forms with pictures."""

from __future__ import annotations

from typing import get_args

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from loray.bases.presets import known_shape
from loray.planning.devices import ASSUMED_GPU, PRESETS, THIS_MACHINE
from loray.recommend import Answers, Constraint, Scale, recommend
from loray.recommend import Estimate as Cost
from loray.simulation.asked import POLICY_NAMES, Asked
from loray.spec import Method
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console.backend import COUNTED_AS_ADVICE, ConsoleDep
from serve_apps.console.recipes import form_fields, plan_of, recipe_of
from serve_apps.console.rendering import MOST_SUGGESTED, checked, read_form, router_of
from serve_apps.console.simulation import simulated

# Of a recipe's form, those that a plan needs; the rest of it is what the run is called and where its data is.
_PLANNED = ("base", "adapter.method", "adapter.rank", "data.max_length", "num_workers")
_UNPLANNED = {"name": "plan", "data.train": "/rows.jsonl"}

router = router_of("/advice")


class Questions(BaseModel):
    """The fields of the recommender's form."""

    model_config = ConfigDict(extra="forbid")

    context_length: int = Field(ge=2, le=1 << 24)
    num_tasks: int = Field(ge=1, le=10**9)
    resource_constraint: Constraint = "medium"
    deployment_scale: Scale = "single"
    base: str = Field(default="smollm2", max_length=96)
    device: str = ASSUMED_GPU


@router.get("")
@may("identify")
def show_forms(console: ConsoleDep, request: Request, asking: CurrentPrincipal) -> Response:
    return console.renderer.page(
        request,
        "advice.html",
        bases=list(console.backend.catalog_of(asking).bases())[:MOST_SUGGESTED],
        devices=tuple(PRESETS),
        assumed=ASSUMED_GPU,
        here=THIS_MACHINE,
        constraints=get_args(Constraint),
        scales=get_args(Scale),
        methods=get_args(Method),
        fields=[field for field in form_fields() if field.path in _PLANNED],
        unplanned=_UNPLANNED,
        simulation=Asked(),
        policies=POLICY_NAMES,
    )


@router.post("/recommend", dependencies=COUNTED_AS_ADVICE)
@may("identify")
async def show_recommendation(console: ConsoleDep, request: Request) -> Response:
    """What `loray recommend` says. Raises SpecError, and NotFoundError for a base of unknown shape."""
    form = await read_form(request)
    asked = checked(Questions, {name: form.get(name) for name in Questions.model_fields if form.get(name)})
    device = PRESETS.get(asked.device, PRESETS[ASSUMED_GPU])
    answers = Answers(asked.context_length, asked.num_tasks, asked.resource_constraint, asked.deployment_scale)
    home = console.backend.settings.home
    found = await run_in_threadpool(lambda: recommend(answers, asked.base, known_shape(asked.base, home), device))
    most = max(cost.adapters_per_gib for cost in found.estimates)
    rows: list[tuple[Cost, float]] = [(cost, cost.adapters_per_gib / most) for cost in found.estimates]
    best = max(score.score for score in found.scores)
    scores = [(score, score.score / best) for score in found.scores]
    return console.renderer.page(request, "parts/recommendation.html", found=found, rows=rows, scores=scores)


@router.post("/plan", dependencies=COUNTED_AS_ADVICE)
@may("identify")
async def show_plan(console: ConsoleDep, request: Request, asking: CurrentPrincipal) -> Response:
    """What `loray plan` says of the form."""
    form, settings = await read_form(request), console.backend.settings
    estimate = await run_in_threadpool(
        lambda: plan_of(
            recipe_of(form, settings.home), console.backend.catalog_of(asking), settings, form.get("device")
        )
    )
    return console.renderer.page(request, "parts/plan.html", plan=estimate, problem="")


@router.post("/simulate")
@may("identify")
async def show_simulation(console: ConsoleDep, request: Request, asking: CurrentPrincipal) -> Response:
    """What `loray simulate` says of made-up requests, within bounds."""
    form = await read_form(request)
    given = {name: form.get(name) for name in Asked.model_fields if name != "policies" and form.get(name)}
    asked = checked(Asked, given | {"policies": form.all("policies")})
    found = await run_in_threadpool(simulated, asked, asking.account)
    return console.renderer.page(request, "parts/simulation.html", **found._asdict())
