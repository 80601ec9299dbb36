"""Requests that are made up: popular and rare adapters, bursts, adapters that appear and go out of use."""

from __future__ import annotations

import numpy as np

from loray.simulation.workload.requests import Requests

_SEGMENT_S = 20.0  # in which the rate is constant
_BURSTS, _BURST_RATE, _BURST_ADAPTERS = 0.1, 3.0, 3  # share of the segments, times the rate, adapters that cause it
_LIVES = 0.5  # share of the adapters that are not there all the time
_PROMPT, _OUTPUT = (5.3, 0.9), (4.0, 0.8)  # mean and deviation of the logarithm of their tokens


def mean_tokens() -> tuple[float, float]:
    """Of prompts and of outputs."""
    return tuple(float(np.exp(mu + 0.5 * sigma**2)) for mu, sigma in (_PROMPT, _OUTPUT))  # type: ignore[return-value]


def generate(*, rate: float, seconds: float, num_adapters: int, alpha: float, seed: int) -> Requests:
    """`rate`: requests a second in the mean. Popularity ∝ (k + 1)^-alpha.

    One segment of 20 s in ten has three times the rate, and what is added is for three adapters drawn at random. Half
    of the adapters are born and go out of use at times of their own; a request for one that is not there is for the
    adapter that follows it in popularity and is.
    """
    rng = np.random.default_rng(seed)
    num_segments = max(1, int(np.ceil(seconds / _SEGMENT_S)))
    is_burst = rng.random(num_segments) < _BURSTS
    base_rate = rate / (1 + _BURSTS * (_BURST_RATE - 1))
    weights = np.cumsum(np.arange(1, num_adapters + 1, dtype=float) ** -alpha)
    lives = rng.random(num_adapters) < _LIVES
    born = np.where(lives, rng.uniform(-0.5, 1.0, num_adapters) * seconds, -np.inf)
    gone = np.where(lives, born + rng.uniform(0.1, 1.0, num_adapters) * seconds, np.inf)
    at_S, adapter_S = [], []
    for segment in range(num_segments):
        start = segment * _SEGMENT_S
        length = min(_SEGMENT_S, seconds - start)
        at = start + length * rng.random(rng.poisson(base_rate * length))
        adapter = np.searchsorted(weights, rng.random(len(at)) * weights[-1])
        for _ in range(num_adapters.bit_length()):
            absent = (born[adapter] > at) | (gone[adapter] <= at)
            if not absent.any():
                break
            adapter = np.where(absent, (adapter + 1) % num_adapters, adapter)
        if is_burst[segment]:
            hot = rng.integers(0, num_adapters, _BURST_ADAPTERS)
            more = start + length * rng.random(rng.poisson((_BURST_RATE - 1) * base_rate * length))
            at, adapter = np.concatenate([at, more]), np.concatenate([adapter, rng.choice(hot, len(more))])
        at_S.append(at)
        adapter_S.append(adapter)
    at, adapter = np.concatenate(at_S), np.concatenate(adapter_S)
    order = np.argsort(at, kind="stable")
    prompt, output = (np.maximum(1, rng.lognormal(*p, len(at))).astype(np.int64) for p in (_PROMPT, _OUTPUT))
    return Requests(at[order], prompt, output, adapter[order].astype(np.int64))
