"""The requests that every router gets, and their file for `loray simulate --trace FILE --replay`.

First every adapter once, so that all are on the node's disk and the replicas hold what their router gave them; this
part is not counted. Then requests at random times for adapters by a power law, and among them probes, which say what
work costs at that time: with prompts of all lengths, and their own times are not reported. Last, more requests for a
few seconds, nine in ten for one adapter that nobody has asked for since the warm-up.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.client import Request

HOT_SHARE = 0.9
_NUM_IDS = 256  # the byte tokenizer's letters
_WARM_PROMPT, _HOT_OUTPUT = 8, 256
_SHORTEST = 16  # prompt of a probe
_PAUSE_S = 2.0  # after the warm-up: what it asked for has ended


class Asked(NamedTuple):
    """`at`: seconds after the start of its part; lengths in tokens."""

    at: float
    adapter: int
    num_prompt: int
    num_output: int
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """rate       requests a second that count; before and after them `warm_rate` and `hot_rate`
    probe_rate  and so many probes, whose prompts' lengths are equally likely on a logarithmic scale
    alpha      popularity of the k-th adapter ∝ k^-alpha
    prompt, output   mean and deviation of the logarithm of their tokens
    longest    tokens of a prompt, and of an output, at most
    """

    num_adapters: int = 2000
    rate: float = 12.0
    seconds: float = 65.0
    hot_seconds: float = 8.0
    hot_rate: float = 20.0
    alpha: float = 1.0
    warm_rate: float = 100.0
    prompt: tuple[float, float] = (5.3, 0.9)
    output: tuple[float, float] = (2.8, 0.5)
    longest: tuple[int, int] = (3000, 64)
    probe_rate: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    warm: Sequence[Asked]
    counted: Sequence[Asked]
    hot: Sequence[Asked]
    hot_adapter: int

    @property
    def warm_up_s(self) -> float:
        """From the first request to the first that counts."""
        return (self.warm[-1].at if self.warm else 0.0) + _PAUSE_S

    def write(self, path: Path) -> None:
        """Warm-up and what counts, in Mooncake's format, with the number of each adapter."""
        with path.open("w", encoding="utf-8") as out:
            for one in (*self.warm, *(one._replace(at=one.at + self.warm_up_s) for one in self.counted)):
                fields = {"timestamp": round(1000 * one.at, 3), "input_length": one.num_prompt}
                fields |= {"output_length": one.num_output, "adapter": one.adapter, "probe": one.probe}
                out.write(json.dumps(fields) + "\n")


def make_trace(load: Load) -> Trace:
    """Equal for equal loads."""

    def stream(name: str) -> random.Random:  # changing one distribution leaves the draws of the others
        return random.Random(f"{load.seed}/{name}")

    by_rank, order = list(range(load.num_adapters)), list(range(load.num_adapters))
    stream("ranks").shuffle(by_rank)
    stream("warm").shuffle(order)
    warm = [Asked(i / load.warm_rate, adapter, _WARM_PROMPT, 1) for i, adapter in enumerate(order)]
    weights = list(accumulate((rank + 1) ** -load.alpha for rank in range(load.num_adapters)))

    def part(name: str, rate: float, seconds: float) -> Iterator[Asked]:
        chance = stream(name)
        for at in arrivals(chance, rate, 0.0, seconds):
            (adapter,) = chance.choices(by_rank, cum_weights=weights)
            num_prompt, num_output = (
                min(max(1, round(chance.lognormvariate(*shape))), most)
                for shape, most in zip((load.prompt, load.output), load.longest, strict=True)
            )
            yield Asked(at, adapter, num_prompt, num_output)

    lengths, widest = stream("lengths of probes"), math.log(load.longest[0] / _SHORTEST)
    probes = (
        one._replace(num_prompt=round(_SHORTEST * math.exp(lengths.uniform(0.0, widest))), probe=True)
        for one in (part("probes", load.probe_rate, load.seconds) if load.probe_rate else ())
    )
    counted = sorted([*part("counted", load.rate, load.seconds), *probes])
    asked = {one.adapter for one in counted}
    hot_adapter = next((adapter for adapter in reversed(by_rank) if adapter not in asked), by_rank[-1])
    chance = stream("which is hot")
    hot = [
        one._replace(adapter=hot_adapter, num_output=_HOT_OUTPUT) if chance.random() < HOT_SHARE else one
        for one in part("hot", load.hot_rate, load.hot_seconds)
    ]
    return Trace(warm, counted, hot, hot_adapter)


def arrivals(chance: random.Random, rate: float, begins: float, ends: float) -> Iterator[float]:
    at = begins + chance.expovariate(rate)
    while at < ends:
        yield at
        at += chance.expovariate(rate)


def as_requests(
    asked: Sequence[Asked], names: Sequence[str], seed: str, headers: Mapping[str, str] = MappingProxyType({})
) -> list[Request]:
    """With random prompts, equal for equal seeds. `names`: of the adapters. In `headers` {} is a request's number."""
    chance = random.Random(seed)
    return [
        Request(
            one.at,
            names[one.adapter],
            [chance.randrange(_NUM_IDS) for _ in range(one.num_prompt)],
            one.num_output,
            headers={name: value.format(number) for name, value in headers.items()},
        )
        for number, one in enumerate(asked)
    ]
