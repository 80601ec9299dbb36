"""Routes of training jobs, and of the recommendation of a method."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated, Literal, NamedTuple

from fastapi import Depends, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from loray.bases.presets import known_shape, shapes_in
from loray.errors import SpecError
from loray.planning.devices import PRESETS
from loray.policy.auth import check
from loray.recipes.defaults import complete
from loray.recipes.fields import parse_plain
from loray.recipes.load import ADAPTERS, size_of_base
from loray.recipes.many import expand
from loray.recommend import Answers, Estimate, Quote, recommend
from loray.schemas.resources import RECIPE_EXAMPLE, JobResource, Page, Resource
from loray.settings import Settings
from loray.spec import JobId, JobStatus, Name, QualifiedName, TrainSpec
from loray.spec.fields import mistakes
from serve_apps.api.problems import InvalidFields, fields_of, responses
from serve_apps.api.routes import CREATED, router_of
from serve_apps.api.services import Limit, ServicesDep, linked
from serve_apps.auth import CurrentPrincipal, may, until_revoked
from serve_apps.console import Jobs
from serve_apps.http import HeldResponse, parse_json, read, schema_reference

JSON = "application/json"
YAML = ("application/yaml", "application/x-yaml", "text/yaml")
LONGEST_FOLLOWED_S = 3600.0


class Submitted(NamedTuple):
    """What is to be trained: one adapter, or several as one job that is called `name`."""

    name: str
    recipes: tuple[TrainSpec, ...]
    is_one: bool


async def _read(request: Request) -> Submitted:
    media_type = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if media_type not in (JSON, *YAML):
        raise HTTPException(415, f"a recipe is {JSON} or {YAML[0]}, not {media_type or 'without a type'}")
    return await read(request, partial(_parse, is_yaml=media_type in YAML))


def _parse(raw: bytes, *, is_yaml: bool) -> Submitted:
    try:
        data = parse_plain(raw, source="the recipe") if is_yaml else parse_json(raw)
    except SpecError as e:
        raise InvalidFields(str(e), ()) from e
    except (ValueError, RecursionError) as e:
        raise InvalidFields(f"the recipe is not valid JSON: {e}", ()) from e
    if isinstance(data, dict) and ADAPTERS in data:
        try:
            name, recipes = expand(data, shapes_in(Settings.from_env().home))
        except SpecError as e:
            raise InvalidFields(str(e), ()) from e
        return Submitted(name, tuple(recipe.spec for recipe in recipes), is_one=False)
    try:
        spec = TrainSpec.model_validate(_completed(data))
    except ValidationError as e:
        raise InvalidFields("the recipe is not valid", fields_of(mistakes(e))) from e
    return Submitted(spec.name, (spec,), is_one=True)


def _completed(data: object) -> object:
    if not isinstance(data, dict):
        return data
    base = data.get("base", TrainSpec.model_fields["base"].default)
    return complete(data, size_of_base(base, shapes_in(Settings.from_env().home)))


RecipeBody = Annotated[Submitted, Depends(_read)]
JobPath = Annotated[JobId, Path(description="Ray's submission id, or what `?id=` chose for it")]
ChosenId = Annotated[
    JobId | None,
    Query(max_length=111, description="begins its id, and names it in the own tenant; made up where left out"),
]
DeviceName = Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb"]
_RECIPE = {"schema": schema_reference(TrainSpec.__name__), "example": RECIPE_EXAMPLE}
_BODY = {"requestBody": {"required": True, "content": dict.fromkeys((JSON, YAML[0]), _RECIPE)}}

router, methods_router = router_of("jobs"), router_of("methods")


@router.post(
    "/jobs",
    status_code=201,
    openapi_extra=_BODY,
    responses=responses(403, 409, 415) | CREATED,
)
@may("train")
def submit_job(
    jobs: Jobs,
    request: Request,
    response: Response,
    asking: CurrentPrincipal,
    submitted: RecipeBody,
    id: ChosenId = None,
    resume: Annotated[bool, Query(description="go on with the latest run of this recipe")] = False,
) -> JobResource:
    """Train the adapter of a recipe and publish it. `data` names s3:// URLs, or absolute paths on the cluster.

    With `adapters`, a list of objects with a name and fields that each has of its own, several are trained as one job.
    """
    name, recipes, is_one = submitted
    if any(recipe.publish.aliases for recipe in recipes):
        check(asking, "promote")
    job = jobs.submit(recipes[0], id, resume=resume) if is_one else jobs.submit_many(name, recipes, id, resume=resume)
    response.headers["Location"] = request.url_for("get_job", id=job.id).path
    return job


@router.get("/jobs", responses=responses())
@may("follow")
def list_jobs(
    jobs: Jobs,
    request: Request,
    response: Response,
    limit: Limit = 100,
    cursor: Annotated[JobId | None, Query(description="`next` of the page before")] = None,
    status: Annotated[JobStatus | None, Query(description="only jobs with this status")] = None,
    name: Annotated[QualifiedName | None, Query(description="only jobs that train this adapter")] = None,
) -> Page[JobResource]:
    """Jobs of the own tenant, newest first."""
    found = jobs.page(limit, cursor, status, name)
    return linked(Page[JobResource](items=found.items, next=found.next), request, response)


@router.get("/jobs/{id}", responses=responses(404))
@may("follow")
def get_job(jobs: Jobs, id: JobPath) -> JobResource:
    """One job, as Ray knows it now."""
    return jobs.get(id)


@router.get(
    "/jobs/{id}/logs",
    response_class=PlainTextResponse,
    responses=responses(404, 410, 429) | {200: {"description": "What the driver and its workers wrote"}},
)
@may("follow")
async def get_logs(
    services: ServicesDep,
    jobs: Jobs,
    request: Request,
    asking: CurrentPrincipal,
    id: JobPath,
    follow: Annotated[bool, Query(description="go on until the job ends")] = False,
    tail: Annotated[
        int | None, Query(ge=1, le=10_000, description="so many last lines, of which the last MiB; not with `follow`")
    ] = None,
) -> Response:
    """The job's log: one JSON object per event, between other lines. It is followed for an hour at most. 410: Ray does
    not have it any more. 429: the key, or its tenant, reads as many logs as it may.
    """
    if tail is not None and not follow:
        return PlainTextResponse(await run_in_threadpool(jobs.tail, id, tail))
    async with AsyncExitStack() as held:
        await held.enter_async_context(services.followers.one(asking.tenant, asking.account))
        pieces: AsyncIterator[str] | Iterator[str]
        if follow:
            pieces = _for_an_hour(until_revoked(request, await run_in_threadpool(jobs.follow, id)))
        else:
            pieces = await run_in_threadpool(jobs.logs, id)
        return HeldResponse(pieces, held.pop_all(), media_type="text/plain")


@router.post("/jobs/{id}/stop", status_code=202, responses=responses(404))
@may("train")
def stop_job(jobs: Jobs, id: JobPath) -> JobResource:
    """Stop a job; it is shown as stopped once its driver has ended. One that has ended stays as it is."""
    return jobs.stop(id)


async def _for_an_hour(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    ends_at = asyncio.get_running_loop().time() + LONGEST_FOLLOWED_S
    while True:
        try:
            async with asyncio.timeout_at(ends_at):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            yield "… the log goes on; follow it again\n"
            return
        yield piece


_QUOTE = {
    "source": "PEFT 0.19.2, Llama-3.2-3B",
    "task": "GSM8K, accuracy",
    "method": "lora",
    "settings": "LoRA r32 on q, v",
    "trained_parameters": 9175040,
    "score": 47.8,
    "spread": None,
}
_ESTIMATE = {
    "method": "lora",
    "settings": "r16 on all linear",
    "problem": None,
    "trained_parameters": 4884480,
    "adapter_bytes": 9768960,
    "training_bytes": 3900000000,
    "step_s": 0.02,
    "tokens_per_s": 100000.0,
    "checkpointing": False,
    "adapters_per_gib": 291.2,
    "served_pool_bytes": 3687186432,
    "served_devices": 1,
    "throughput": 0.7,
}
_REMARK = "methods combine: VeRA trained and S-LoRA served is one choice, not two"


class RecommendationResource(Resource):
    """`quotes`: quality by published comparisons, PEFT's and ours; `estimates`: costs on the base and the device."""

    base: str = Field(examples=["smollm2"])
    device: str = Field(examples=["a100-80gb"])
    quotes: tuple[Quote, ...] = Field(examples=[[_QUOTE]])
    estimates: tuple[Estimate, ...] = Field(examples=[[_ESTIMATE]])
    remarks: tuple[str, ...] = Field(examples=[[_REMARK]])


async def _count(services: ServicesDep, asking: CurrentPrincipal) -> None:
    services.rates.take_advice(asking, time.monotonic())


@methods_router.get(
    "/recommend",
    dependencies=[Depends(_count)],
    responses=responses(404, 429),
)
@may("identify")
def recommend_methods(
    services: ServicesDep,
    context_length: Annotated[int, Query(ge=2, le=1 << 24, description="tokens of the longest row")],
    num_tasks: Annotated[int, Query(ge=1, le=10**9, description="adapters that there will be")],
    base: Annotated[Name, Query(description="a base of this node, or a well-known one")] = "smollm2",
    device: Annotated[DeviceName, Query(description="what each worker and each replica has")] = "a100-80gb",
) -> RecommendationResource:
    """Adapter methods by the quality that was measured of each, and by what each would cost on this base and device."""
    answers = Answers(context_length, num_tasks)
    found = recommend(answers, base, known_shape(base, services.settings.home), PRESETS[device])
    return RecommendationResource.model_validate(found.to_dict())
