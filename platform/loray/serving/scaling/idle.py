"""Scale to zero: when a base that nobody asks has no replica any more.

Beside `scaling`, which says how many replicas the demand needs while there is one: it never says none. The last replica
goes when no request has come and none has been under way for `downscale_to_zero_delay_s`. Ray Serve itself starts one
where a request waits and none runs, before it asks a policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loray.serving.scaling.decision import Decision, ScalingState, decide
from loray.serving.scaling.observation import Observation
from loray.spec import AutoscalingSpec


@dataclass(frozen=True, slots=True)
class IdleState:
    """`since`: the time at or before which the base was last asked; None: it is asked, or a replica is silent."""

    since: float | None = None


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What is remembered between two decisions."""

    scaling: ScalingState = field(default_factory=ScalingState)
    idle: IdleState = field(default_factory=IdleState)


def decide_from_zero(
    observations: Sequence[Observation | None],
    spec: AutoscalingSpec,
    state: PolicyState,
    *,
    target: int,
    num_queued: float,
    now: float,
) -> tuple[Decision, PolicyState]:
    """As `scaling.decide`, of a deployment that may have no replica. To zero it goes from one replica alone.

    `num_queued`: requests that wait at gateways for a replica. While a replica is silent the number does not go to
    zero, since nothing is known of its requests.
    """
    if target == 0:
        return Decision(0, "idle", "no request; the next one starts a replica", ScalingState()), PolicyState()
    idle = _idle(observations, spec, state.idle, num_queued, now)
    if spec.min_replicas == 0 and idle.since is not None and now - idle.since >= spec.downscale_to_zero_delay_s:
        reason = f"no request for {now - idle.since:.0f} s; the next one starts a replica"
        after = ScalingState(changed_at=now)
        return Decision(min(1, target - 1), "idle", reason, after), PolicyState(after, idle)
    decision = decide(observations, spec, state.scaling, target=target, now=now)
    return decision, PolicyState(decision.state, idle)


def _idle(
    observations: Sequence[Observation | None],
    spec: AutoscalingSpec,
    state: IdleState,
    num_queued: float,
    now: float,
) -> IdleState:
    known = [o for o in observations if o is not None]
    if not known or len(known) < len(observations):
        return IdleState()
    if num_queued > 0 or any(o.tokens > 0 or o.occupied_s > 0 or o.backlog > 0 for o in known):
        return IdleState()
    # Nothing in the windows: none came for so long. The youngest replica says nothing of the time before it.
    seen_s = min(spec.window_s, *(o.age_s for o in known))
    return IdleState(now - seen_s if state.since is None else min(state.since, now - seen_s))
