"""One run: a deployment, its requests, and the policies that are compared on them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import numpy as np

from loray.errors import SpecError
from loray.simulation import workload
from loray.simulation.profile import Profile
from loray.simulation.routers import LeastWork, ProportionalPlacement, RandomRouter, SimulatedRouter, TwoChoices
from loray.simulation.scalers import AdapterDemandScaler, OngoingRequests, OracleScaler, Scaler
from loray.simulation.simulator import Outcome, Policy, Simulator, adapter_sizes
from loray.simulation.workload import RequestTrace, as_conversations, at_rate, with_adapters
from loray.spec import AutoscalingSpec

_TARGET = float(AutoscalingSpec.model_fields["target_utilization"].default)
_WAIT_SLO_S: float | None = AutoscalingSpec.model_fields["wait_slo_s"].default
_RAY_ONGOING = 2.0  # Ray Serve's default target of requests under way on a replica


@dataclass(frozen=True)
class Scenario:
    """A deployment of at most `replicas` under a trace.

    trace        None: synthetic
    utilization  mean work that the requests bring, as a share of what all replicas can do
    alpha        popularity of the k-th adapter ∝ k^-alpha
    turns        of each conversation; 1: requests have nothing in common. think_s: the mean time before the next one
    fixed        all replicas run all the time, so that routing alone is compared
    target_utilization, wait_slo_s  of loray's scaling, and so of random and dynamo, the first also of the oracle; the
                 first number of replicas is without them
    replay       the trace's own times and adapters: `minutes`, `utilization` and `alpha` are not used
    warm_up      seconds at the start that are not counted
    """

    profile: Profile
    replicas: int
    adapters: int
    minutes: float
    trace: RequestTrace | None = None
    utilization: float = 0.5
    alpha: float = 1.0
    seed: int = 0
    fixed: bool = False
    target_utilization: float = _TARGET
    replay: bool = False
    warm_up: float = 0.0
    wait_slo_s: float | None = _WAIT_SLO_S
    turns: int = 1
    think_s: float = 20.0

    def __post_init__(self) -> None:
        if self.replay and self.trace is None:
            raise SpecError("only a trace can be replayed; name its file")
        if self.replicas < 1 or self.adapters < 1 or self.minutes <= 0 or self.utilization <= 0:
            raise SpecError("replicas, adapters, minutes and utilisation must be positive")
        if self.replay and self.turns > 1:
            raise SpecError("a trace that is replayed has its own requests; leave --turns out, or --replay")
        if self.replay and self.trace is not None and self.trace.num_adapters > self.adapters:
            raise SpecError(f"the trace has {self.trace.num_adapters} adapters, not {self.adapters}")

    @property
    def seconds(self) -> float:
        return 60.0 * self.minutes

    @property
    def initial(self) -> int:
        """Replicas at the start: what the mean needs, for every policy but the one that knows the future."""
        if self.fixed:
            return self.replicas
        busy = self.utilization * self.replicas
        if self.replay and self.trace is not None:
            busy = self.trace.cut(self.profile.context_length).work(self.profile) / max(self.trace.seconds, 1.0)
        return min(max(1, ceil(busy / _TARGET)), self.replicas)

    @property
    def autoscaling(self) -> AutoscalingSpec:
        return AutoscalingSpec(
            max_replicas=self.replicas,
            target_utilization=self.target_utilization,
            startup_s=self.profile.start_s,
            wait_slo_s=self.wait_slo_s,
        )

    def requests(self) -> RequestTrace:
        """Return the requests, which are equal for equal scenarios."""
        found = self._requests(1.0)
        if self.turns > 1:
            most = self.profile.context_length

            def talks(first: RequestTrace) -> RequestTrace:
                return as_conversations(first, self.turns, self.think_s, np.random.default_rng((self.seed, 2))).cut(
                    most
                )

            found = talks(self._requests(found.work(self.profile) / talks(found).work(self.profile)))
        if found.seconds < self.warm_up:
            raise SpecError(f"the last request comes after {found.seconds:.0f} s, in the warm-up")
        return found

    def _requests(self, share: float) -> RequestTrace:
        """Return the requests, each a conversation of its own, that take this share of the utilisation."""
        rng = np.random.default_rng(self.seed)
        capacity = share * self.utilization * self.replicas
        if self.trace is None:
            rate = capacity / self.profile.work_seconds(*workload.mean_tokens())
            found = workload.generate(
                rate=rate, seconds=self.seconds, num_adapters=self.adapters, alpha=self.alpha, seed=self.seed
            ).cut(self.profile.context_length)
        else:
            found = self.trace.cut(self.profile.context_length)
            if not self.replay:
                rate = capacity * len(found) / found.work(self.profile)
                found = at_rate(found, rate=rate, seconds=self.seconds, rng=rng)
                found = with_adapters(found, self.adapters, self.alpha, rng)
        if not len(found):
            raise SpecError("the run has no requests: ask for more minutes, more replicas or a higher utilisation")
        return found


POLICIES = ("loray", "adapters", "ray", "random", "dynamo", "oracle")


def policy_of(name: str, s: Scenario, requests: RequestTrace) -> Policy:
    """Return one of POLICIES, for these requests."""
    size, sizes = 2 * s.replicas, adapter_sizes(s.profile, s.adapters)
    scaler = Scaler(s.replicas) if s.fixed else AdapterDemandScaler(s.autoscaling, s.initial, s.profile, sizes)
    match name:
        case "loray":
            return Policy(name, SimulatedRouter(size, s.adapters, s.profile), scaler)
        case "adapters":
            router = SimulatedRouter(size, s.adapters, s.profile, sees_prefixes=False)
            return Policy(name, router, scaler)
        case "ray":
            scaler = scaler if s.fixed else OngoingRequests(s.initial, s.replicas, _RAY_ONGOING)
            return Policy(name, TwoChoices(size, s.seed), scaler)
        case "random":
            return Policy(name, RandomRouter(size, s.seed), scaler)
        case "dynamo":
            each = s.profile.adapter_bytes
            slots = max(1, int(0.5 * s.profile.pool_bytes / (sum(each) / len(each))))
            return Policy(name, ProportionalPlacement(size, s.adapters, slots, s.seed), scaler)
        case "oracle":
            scaler = scaler if s.fixed else OracleScaler(requests, s.profile, s.target_utilization, s.replicas)
            return Policy(name, LeastWork(size, s.profile), scaler, foresees=True)
    raise ValueError(name)


def simulate(
    scenario: Scenario, requests: RequestTrace, policy: str, progress: Callable[[float], None] | None = None
) -> Outcome:
    """Run one of POLICIES over the requests. `progress` is told the share of them that have come."""
    simulator = Simulator(
        requests,
        scenario.profile,
        policy_of(policy, scenario, requests),
        initial=scenario.initial,
        size=scenario.replicas,
        warm_up=scenario.warm_up,
        seed=scenario.seed,
    )
    # Nothing in a run refers to itself, and Python's collector would look through its objects again and again.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return simulator.run(progress)
    finally:
        if was_enabled:
            gc.enable()
