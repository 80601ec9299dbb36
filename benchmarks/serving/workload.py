"""Requests with adapters and lengths: closed loops, with S-LoRA's popularity of adapters, and a long prompt among short
ones.

Plain Python: equal workloads and passes give equal requests on every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

_FIRST_TOKEN = 100  # ids below are special tokens in the tokenizers at hand


class TimedRequest(NamedTuple):
    """`at`: seconds after the start of the pass. `adapter`: index in the set, None for the base. `streamed`: if False,
    a server answers it whole.
    """

    at: float
    adapter: int | None
    prompt_ids: tuple[int, ...]
    max_tokens: int
    tenant: str = ""
    streamed: bool = True


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` requests over `num_adapters` adapters from index `first_adapter` on; 0: the base only.

    alpha     popularity: adapter ⌊n · u^(1/α)⌋ for u uniform in [0, 1), which is NumPy's `power(α)` as in S-LoRA's
              generator (Sheng et al., MLSys 2024, section 7.1). α = 1 is uniform, smaller is more skewed.
              None: round robin.
    at_once   so many requests are under way at any time
    inputs, outputs   tokens, uniform in [low, high]; end-of-text tokens do not end an output.
    streamed  False: over HTTP each answer comes whole
    """

    num_requests: int
    num_adapters: int = 0
    first_adapter: int = 0
    alpha: float | None = None
    at_once: int = 32
    inputs: tuple[int, int] = (64, 64)
    outputs: tuple[int, int] = (32, 32)
    streamed: bool = True

    @property
    def max_tokens(self) -> int:
        """Most tokens of one request, prompt and output."""
        return self.inputs[1] + self.outputs[1]


@dataclass(frozen=True, slots=True)
class MixedLoad:
    """A prompt of `long` tokens of tenant "a", alone or among others, all for the base.

    Among others: a stream of tenant "c" of `stream_tokens` tokens is under way when it comes; every `every_s` seconds
    after it a prompt of `short` tokens follows, in turn of the same tenant and of "b".
    """

    long: int
    short: int = 3
    num_short: int = 0
    every_s: float = 0.5
    stream_tokens: int = 0
    alone: bool = False

    at_once: None = None
    num_adapters: int = 0
    first_adapter: int = 0

    @property
    def max_tokens(self) -> int:
        return self.long + _LONG_OUTPUT


_LONG_OUTPUT, _SHORT_OUTPUT, _LONG_AT_S = 4, 8, 1.0
SAME, OTHER, STREAM = "a", "b", "c"  # tenants


def generate(workload: Workload | MixedLoad, vocab_size: int, pass_: int = 0, label: str = "") -> list[TimedRequest]:
    """The requests in order of arrival. Each pass and each label gives other draws from the same distributions."""
    if isinstance(workload, MixedLoad):
        return _mixed(workload, vocab_size, random.Random(f"{label}/{pass_}"))
    w = workload

    def stream(name: str) -> random.Random:  # one for each distribution: changing one leaves the draws of the others
        return random.Random(f"{label}/0/{pass_}/{name}")

    popularity, lengths, tokens = map(stream, ("adapter", "length", "token"))
    requests = []
    for i in range(w.num_requests):
        num_inputs, num_outputs = lengths.randint(*w.inputs), lengths.randint(*w.outputs)
        prompt_ids = tuple(tokens.randrange(_FIRST_TOKEN, vocab_size) for _ in range(num_inputs))
        requests.append(TimedRequest(0.0, _draw(w, i, popularity), prompt_ids, num_outputs, streamed=w.streamed))
    return requests


def _mixed(w: MixedLoad, vocab_size: int, rng: random.Random) -> list[TimedRequest]:
    def request(at: float, num_inputs: int, num_outputs: int, tenant: str) -> TimedRequest:
        prompt_ids = tuple(rng.randrange(_FIRST_TOKEN, vocab_size) for _ in range(num_inputs))
        return TimedRequest(at, None, prompt_ids, num_outputs, tenant)

    long = request(0.0 if w.alone else _LONG_AT_S, w.long, _LONG_OUTPUT, SAME)
    if w.alone:
        return [long]
    shorts = [
        request(_LONG_AT_S + (i + 1) * w.every_s, w.short, _SHORT_OUTPUT, (SAME, OTHER)[i % 2])
        for i in range(w.num_short)
    ]
    return [request(0.0, 64, w.stream_tokens, STREAM), long, *shorts]


def _draw(w: Workload, i: int, popularity: random.Random) -> int | None:
    if not w.num_adapters:
        return None
    if w.alpha is None:
        return w.first_adapter + i % w.num_adapters
    drawn = int(w.num_adapters * popularity.random() ** (1 / w.alpha))
    return w.first_adapter + min(drawn, w.num_adapters - 1)
