"""A simulation that is asked for while somebody waits: its bounds and what comes of it, as JSON for another process."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

POLICY_NAMES = ("loray", "ray", "random", "dynamo", "oracle")
MOST_REQUESTS = 20_000


class Asked(BaseModel):
    """A deployment of at most `replicas` under made-up requests, whose work is `utilization` of what all can do."""

    model_config = ConfigDict(extra="forbid")

    replicas: Annotated[int, Field(ge=1, le=64)] = 4
    adapters: Annotated[int, Field(ge=1, le=10_000)] = 100
    minutes: Annotated[float, Field(gt=0, le=60)] = 10
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    policies: Annotated[tuple[str, ...], Field(min_length=1, max_length=len(POLICY_NAMES))] = ("loray", "ray")


class Line(BaseModel):
    """What came of one policy: `summary` has the fields of `loray.simulation.simulator.Summary`. By time: the 99th
    percentile of seconds to the first token, None where no request came, and replicas.
    """

    policy: str
    summary: dict[str, Any]
    p99_s: tuple[float | None, ...]
    replicas: tuple[float, ...]


class Told(BaseModel):
    """`minutes`: when the parts of `lines` end. `profile`: what replicas cost is that of."""

    profile: str
    num_requests: int
    minutes: tuple[float, ...]
    lines: tuple[Line, ...]
