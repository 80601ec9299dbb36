"""The route of recommendations: `loray recommend` over HTTP."""

from __future__ import annotations

import time
from typing import Annotated, Literal

from fastapi import Depends, Query

from loray.advice.estimates import Estimate
from loray.advice.recommendation import recommend
from loray.advice.scorecard import Answers, Constraint, Scale, Score
from loray.api.resources import Resource
from loray.bases.presets import known_shape
from loray.planning.devices import PRESETS
from loray.spec import Name
from serve_apps.access import may
from serve_apps.api import examples
from serve_apps.api.problems import responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import Asking, ServicesDep

router = router_of("methods")

DeviceName = Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb"]


class RecommendationResource(Resource):
    """`scores`: a score card that knows neither base nor device, best first; `estimates`: ours, of both."""

    base: str
    device: str
    scores: tuple[Score, ...]
    estimates: tuple[Estimate, ...]
    remarks: tuple[str, ...]


async def _count(services: ServicesDep, asking: Asking) -> None:
    services.rates.take_advice(asking, time.monotonic())


@router.get(
    "/recommend",
    dependencies=[Depends(_count)],
    responses=responses(404, 429) | examples.ok(examples.RECOMMENDATION),
)
@may("identify")
def recommend_methods(
    services: ServicesDep,
    context_length: Annotated[int, Query(ge=2, le=1 << 24, description="tokens of the longest row")],
    num_tasks: Annotated[int, Query(ge=1, le=10**9, description="adapters that there will be")],
    resource_constraint: Annotated[Constraint, Query(description="how scarce memory and money are")] = "medium",
    deployment_scale: Annotated[Scale, Query(description="one machine, or a cluster")] = "single",
    base: Annotated[Name, Query(description="a base of this node, or a well-known one")] = "smollm2",
    device: Annotated[DeviceName, Query(description="what each worker and each replica has")] = "a100-80gb",
) -> RecommendationResource:
    """LoRA, VeRA, LongLoRA and S-LoRA by the score card, and what each would cost on this base and device."""
    answers = Answers(context_length, num_tasks, resource_constraint, deployment_scale)
    found = recommend(answers, base, known_shape(base, services.home), PRESETS[device])
    return RecommendationResource.model_validate(found.to_dict())
