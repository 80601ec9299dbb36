"""What is asked of the two bases over time, and their specs.

Base A has one rate from the beginning to the end. Its adapters in demand are a few, grow to more than one pool holds,
stay, shrink, and are a few again. Base B is asked once while A's are a few, and has a load of its own at the end, when
A's are a few again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cluster.trace import Asked
from loray.spec import AutoscalingSpec, FleetSpec, ServeSpec

_GROWS, _STAYS, _SHRINKS, _IS_BACK = 0.16, 0.32, 0.46, 0.54  # shares of the run, as all times of the plan
_WAKES, _B_BEGINS, _B_ENDS = 0.08, 0.72, 0.88
MOST_B = 3  # replicas of B
_FULL_S = 600.0  # of which the autoscalers' times are parts
_MIN_WINDOW_S = 9.0
_POOL_BYTES, _HOST_BYTES, _CONTEXT = 1 << 20, 32 << 20, 512


@dataclass(frozen=True, slots=True)
class Plan:
    """rate, rate_b     requests a second of A, and of B while it has its load
    few, many, many_b   adapters in demand: A's at least and at most, and B's
    prompt, output      tokens of each request
    most                replicas that A may have
    """

    minutes: float = 10.0
    rate: float = 6.0
    rate_b: float = 4.0
    few: int = 12
    many: int = 80
    many_b: int = 48
    prompt: int = 64
    output: int = 8
    most: int = 4
    seed: int = 0

    @property
    def seconds(self) -> float:
        return 60 * self.minutes

    @property
    def wakes_s(self) -> float:
        """When B is asked once."""
        return _WAKES * self.seconds

    @property
    def b_load_s(self) -> tuple[float, float]:
        return _B_BEGINS * self.seconds, _B_ENDS * self.seconds

    def in_demand(self, at: float) -> int:
        """A's adapters in demand, at this second."""
        shares = (_GROWS, _STAYS, _SHRINKS, _IS_BACK)
        return round(float(np.interp(at / self.seconds, shares, (self.few, self.many, self.many, self.few))))

    def warm(self) -> list[Asked]:
        """Each of A's few adapters once, before the run."""
        return [Asked(i / self.rate, i, self.prompt, self.output) for i in range(self.few)]

    def requests(self) -> list[Asked]:
        """In the order of time. Adapters from `many` on are B's. Equal for equal plans."""
        chance = random.Random(f"{self.seed}/a")
        asked = [
            Asked(at, chance.randrange(self.in_demand(at)), self.prompt, self.output)
            for at in _arrivals(random.Random(f"{self.seed}/times"), self.rate, 0.0, self.seconds)
        ]
        begins, ends = self.b_load_s
        own = [Asked(self.wakes_s, self.many, self.prompt, self.output)]
        chance = random.Random(f"{self.seed}/b")
        own += [
            Asked(at, self.many + chance.randrange(self.many_b), self.prompt, self.output)
            for at in _arrivals(random.Random(f"{self.seed}/times of b"), self.rate_b, begins, ends)
        ]
        return sorted(asked + own)

    def fleet(self, names: Names, port: int) -> FleetSpec:
        """The autoscalers' windows and delays are those of a run of ten minutes, or shorter in proportion."""
        pace = self.seconds / _FULL_S
        times = {
            "window_s": max(_MIN_WINDOW_S, 30 * pace),
            "upscale_delay_s": 3.0,
            "downscale_delay_s": 20 * pace,
            "downscale_to_zero_delay_s": 20 * pace,
            "startup_s": 10.0,
        }
        fields: dict[str, Any] = {
            "dtype": "float32",
            "num_threads": 1,
            "pool_bytes": _POOL_BYTES,
            "host_bytes": _HOST_BYTES,
            "max_model_len": _CONTEXT,
            "enable_prefix_caching": False,  # all prompts differ
            "port": port,
        }
        return FleetSpec.of(
            ServeSpec(
                base=names.a, autoscaling=AutoscalingSpec(min_replicas=1, max_replicas=self.most, **times), **fields
            ),
            ServeSpec(
                base=names.b, autoscaling=AutoscalingSpec(min_replicas=0, max_replicas=MOST_B, **times), **fields
            ),
        )


class Names(NamedTuple):
    """Of the bases."""

    a: str
    b: str


def _arrivals(chance: random.Random, rate: float, begins: float, ends: float) -> Iterator[float]:
    at = begins + chance.expovariate(rate)
    while at < ends:
        yield at
        at += chance.expovariate(rate)
