"""One run: a deployment, its requests, and the policies that are compared on them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import numpy as np

from loray.errors import SpecError
from loray.simulation import workload
from loray.simulation.profile import Profile
from loray.simulation.routers import LeastWork, ProportionalPlacement, RandomRouter, SimulatedRouter, TwoChoices
from loray.simulation.scalers import AdapterDemandScaler, Fixed, OngoingRequests, OracleScaler, Scaler
from loray.simulation.simulator import Outcome, Policy, Simulator, adapter_sizes
from loray.simulation.workload import RequestTrace, at_rate, with_adapters
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

    def __post_init__(self) -> None:
        if self.replay and self.trace is None:
            raise SpecError("only a trace can be replayed; name its file")
        if self.replicas < 1 or self.adapters < 1 or self.minutes <= 0 or self.utilization <= 0:
            raise SpecError("replicas, adapters, minutes and utilisation must be positive")
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
        rng = np.random.default_rng(self.seed)
        context = self.profile.context_length
        capacity = self.utilization * self.replicas
        if self.trace is None:
            rate = capacity / self.profile.work_seconds(*workload.mean_tokens())
            made = workload.generate(
                rate=rate, seconds=self.seconds, num_adapters=self.adapters, alpha=self.alpha, seed=self.seed
            )
            return self._checked(made.cut(context))
        trace = self.trace.cut(context)
        if self.replay:
            return self._checked(trace)
        rate = capacity * len(trace) / trace.work(self.profile)
        return self._checked(
            with_adapters(at_rate(trace, rate=rate, seconds=self.seconds, rng=rng), self.adapters, self.alpha, rng)
        )

    def _checked(self, requests: RequestTrace) -> RequestTrace:
        if not len(requests):
            raise SpecError("the run has no requests: ask for more minutes, more replicas or a higher utilisation")
        if requests.seconds < self.warm_up:
            raise SpecError(f"the last request comes after {requests.seconds:.0f} s, in the warm-up")
        return requests


def _loray(s: Scenario, requests: RequestTrace, size: int) -> Policy:
    return Policy("loray", SimulatedRouter(size, s.adapters, s.profile), _demand(s))


def _ray(s: Scenario, requests: RequestTrace, size: int) -> Policy:
    scaler = Fixed(s.replicas) if s.fixed else OngoingRequests(s.initial, s.replicas, _RAY_ONGOING)
    return Policy("ray", TwoChoices(size, s.seed), scaler)


def _random(s: Scenario, requests: RequestTrace, size: int) -> Policy:
    return Policy("random", RandomRouter(size, s.seed), _demand(s))


def _dynamo(s: Scenario, requests: RequestTrace, size: int) -> Policy:
    sizes = s.profile.adapter_bytes
    slots = max(1, int(0.5 * s.profile.pool_bytes / (sum(sizes) / len(sizes))))
    return Policy("dynamo", ProportionalPlacement(size, s.adapters, slots, s.seed), _demand(s))


def _oracle(s: Scenario, requests: RequestTrace, size: int) -> Policy:
    oracle = OracleScaler(requests, s.profile, s.autoscaling.target_utilization, s.replicas)
    scaler = Fixed(s.replicas) if s.fixed else oracle
    return Policy("oracle", LeastWork(size, s.profile), scaler, foresees=True)


def _demand(s: Scenario) -> Scaler:
    if s.fixed:
        return Fixed(s.replicas)
    return AdapterDemandScaler(s.autoscaling, s.initial, s.profile, adapter_sizes(s.profile, s.adapters))


POLICIES: dict[str, Callable[[Scenario, RequestTrace, int], Policy]] = {
    "loray": _loray,
    "ray": _ray,
    "random": _random,
    "dynamo": _dynamo,
    "oracle": _oracle,
}


def simulate(
    scenario: Scenario,
    requests: RequestTrace,
    names: tuple[str, ...] = tuple(POLICIES),
    progress: Callable[[float], None] | None = None,
) -> Iterator[Outcome]:
    """Each policy over the same requests. `progress` is told the share of a policy's requests that have come."""
    for name in names:
        policy = POLICIES[name](scenario, requests, 2 * scenario.replicas)
        simulator = Simulator(
            requests,
            scenario.profile,
            policy,
            initial=scenario.initial,
            size=scenario.replicas,
            warm_up=scenario.warm_up,
            seed=scenario.seed,
        )
        with _without_collections():
            outcome = simulator.run(progress)
        yield outcome


@contextmanager
def _without_collections() -> Iterator[None]:
    """Turn garbage collection off: nothing in a run refers to itself, and Python's collector would look through its
    objects again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
