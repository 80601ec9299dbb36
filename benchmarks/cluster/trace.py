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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

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


def make_trace(load: Load) -> Trace:
    """Equal for equal loads."""

    def stream(name: str) -> random.Random:  # changing one distribution leaves the draws of the others
        return random.Random(f"{load.seed}/{name}")

    by_rank = list(range(load.num_adapters))
    stream("ranks").shuffle(by_rank)
    order = list(range(load.num_adapters))
    stream("warm").shuffle(order)
    warm = [Asked(i / load.warm_rate, adapter, _WARM_PROMPT, 1) for i, adapter in enumerate(order)]
    weights = list(accumulate((rank + 1) ** -load.alpha for rank in range(load.num_adapters)))
    counted = sorted(
        (
            *_part(load, load.rate, load.seconds, stream("counted"), by_rank, weights),
            *_probes(load, stream("probes"), stream("lengths of probes"), by_rank, weights),
        )
    )
    asked = {one.adapter for one in counted}
    hot_adapter = next((adapter for adapter in reversed(by_rank) if adapter not in asked), by_rank[-1])
    chance = stream("which is hot")
    hot = [
        one._replace(adapter=hot_adapter, num_output=_HOT_OUTPUT) if chance.random() < HOT_SHARE else one
        for one in _part(load, load.hot_rate, load.hot_seconds, stream("hot"), by_rank, weights)
    ]
    return Trace(warm, counted, hot, hot_adapter)


def _part(
    load: Load, rate: float, seconds: float, chance: random.Random, by_rank: Sequence[int], weights: Sequence[float]
) -> list[Asked]:
    found, at = [], chance.expovariate(rate)
    while at < seconds:
        (adapter,) = chance.choices(by_rank, cum_weights=weights)
        num_prompt, num_output = (
            min(max(1, round(chance.lognormvariate(*shape))), most)
            for shape, most in zip((load.prompt, load.output), load.longest, strict=True)
        )
        found.append(Asked(at, adapter, num_prompt, num_output))
        at += chance.expovariate(rate)
    return found


def _probes(
    load: Load, chance: random.Random, lengths: random.Random, by_rank: Sequence[int], weights: Sequence[float]
) -> Iterator[Asked]:
    if load.probe_rate:
        widest = math.log(load.longest[0] / _SHORTEST)
        for one in _part(load, load.probe_rate, load.seconds, chance, by_rank, weights):
            num_prompt = round(_SHORTEST * math.exp(lengths.uniform(0.0, widest)))
            yield one._replace(num_prompt=num_prompt, probe=True)


def write_trace(trace: Trace, path: Path) -> None:
    """Warm-up and what counts, in Mooncake's format, with the number of each adapter."""
    later = [one._replace(at=one.at + trace.warm_up_s) for one in trace.counted]
    lines = [
        {
            "timestamp": round(1000 * one.at, 3),
            "input_length": one.num_prompt,
            "output_length": one.num_output,
            "adapter": one.adapter,
            "probe": one.probe,
        }
        for one in (*trace.warm, *later)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def random_prompts(asked: Sequence[Asked], seed: str) -> list[list[int]]:
    """Token ids; equal for equal seeds."""
    chance = random.Random(seed)
    return [[chance.randrange(_NUM_IDS) for _ in range(request.num_prompt)] for request in asked]
