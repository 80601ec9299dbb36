"""The requests of a run, as columns; and a trace scaled to a rate and given adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from loray.errors import DataError
from loray.simulation.profile import Profile

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_JITTER_S = 2.0  # copies of a request come within so many seconds of it


@dataclass(frozen=True)
class Requests:
    """R requests in the order of arrival.

    at_R       seconds after the start of the run
    prompt_R   tokens of the prompt
    output_R   tokens that are generated
    adapter_R  number of the adapter
    probe_R    whose times are not reported; None: all are
    """

    at_R: Floats
    prompt_R: Ints
    output_R: Ints
    adapter_R: Ints
    probe_R: Bools | None = None

    def __len__(self) -> int:
        return len(self.at_R)

    @property
    def seconds(self) -> float:
        return float(self.at_R[-1]) if len(self) else 0.0

    @property
    def num_adapters(self) -> int:
        """One more than the largest number."""
        return int(self.adapter_R.max()) + 1 if len(self) else 0

    @property
    def rate(self) -> float:
        """Requests a second over the trace's own length."""
        return len(self) / max(self.seconds, 1e-9)

    def cut(self, context_length: int) -> Requests:
        """With prompts and outputs that fit the context: outputs keep what they have, up to half of it."""
        output = np.clip(self.output_R, 1, context_length // 2)
        return replace(self, prompt_R=np.clip(self.prompt_R, 1, context_length - output), output_R=output)

    def work(self, profile: Profile) -> float:
        """Seconds of busy replicas that the requests need."""
        prompt, output = self.prompt_R.astype(float), self.output_R.astype(float)
        each = profile.step_s / (0.5 * profile.max_num_seqs) + profile.decode_s + profile.adapter_s
        return float((prompt * (profile.prompt_s + 0.5 * prompt * profile.pair_s) + output * each).sum())


def at_rate(trace: Requests, *, rate: float, seconds: float, rng: np.random.Generator) -> Requests:
    """`seconds` of the trace at so many requests a second in the mean, repeated where it is shorter.

    Below the trace's own rate requests are left out at random. Above it each comes several times, with different
    adapters later, within seconds of each other, so that bursts stay bursts.
    """
    if not len(trace):
        raise DataError("the trace has no requests")
    num_copies = rate / trace.rate
    num_repeats = int(np.ceil(seconds / max(trace.seconds, 1e-9)))
    at = np.concatenate([trace.at_R + i * trace.seconds for i in range(num_repeats)])
    index = np.tile(np.arange(len(trace)), num_repeats)
    counts = rng.poisson(num_copies, len(index)) if num_copies > 1 else (rng.random(len(index)) < num_copies) * 1
    at = np.repeat(at, counts)
    if num_copies > 1:
        at = at + rng.uniform(0.0, _JITTER_S, len(at))
    index = np.repeat(index, counts)
    order = np.argsort(at, kind="stable")
    order = order[at[order] < seconds]
    index = index[order]
    return Requests(at[order], trace.prompt_R[index], trace.output_R[index], trace.adapter_R[index])


def with_adapters(requests: Requests, num_adapters: int, alpha: float, rng: np.random.Generator) -> Requests:
    """Adapter k of n with probability ∝ (k + 1)^-alpha."""
    weights = np.arange(1, num_adapters + 1, dtype=float) ** -alpha
    cumulative = np.cumsum(weights)
    drawn = np.searchsorted(cumulative, rng.random(len(requests)) * cumulative[-1])
    return Requests(requests.at_R, requests.prompt_R, requests.output_R, drawn.astype(np.int64))


def digest(adapter: int) -> str:
    """A made-up digest: uniform, as real ones are."""
    return sha256(f"adapter {adapter}".encode()).hexdigest()
