"""The requests of a run: those of a trace, or synthetic ones.

Traces have one of these formats, by their files' names:

    .csv    TIMESTAMP,ContextTokens,GeneratedTokens: Azure LLM inference, 2023. P. Patel et al.: Splitwise, ISCA 2024
    .jsonl  lines of {"timestamp": ms, "input_length": …, "output_length": …}: Mooncake. R. Qin et al., FAST 2025
    .jsonl  lines of the same with "adapter", its number, and "probe", true where its times are not reported: a run of
            `python -m benchmarks.cluster`
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loray.errors import DataError
from loray.simulation.profile import Profile

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_JITTER_S = 2.0  # copies of a request come within so many seconds of it
_SEGMENT_S = 20.0  # in which the rate is constant
_BURSTS, _BURST_RATE, _BURST_ADAPTERS = 0.1, 3.0, 3  # share of the segments, times the rate, adapters that cause it
_LIVES = 0.5  # share of the adapters that are not there all the time
_PROMPT, _OUTPUT = (5.3, 0.9), (4.0, 0.8)  # mean and deviation of the logarithm of their tokens
WHERE = {
    "azure": "AzureLLMInferenceTrace_code.csv or …_conv.csv of https://github.com/Azure/AzurePublicDataset",
    "mooncake": "conversation_trace.jsonl or …_trace.jsonl of https://github.com/kvcache-ai/Mooncake",
}
_PATTERNS = {"azure": "*[Aa]zure*.csv", "mooncake": "*mooncake*.jsonl"}


@dataclass(frozen=True)
class RequestTrace:
    """R requests in the order of arrival.

    at_R       seconds after the start of the run
    prompt_R   tokens of the prompt
    output_R   tokens that are generated
    adapter_R  number of the adapter
    talk_R     number of the conversation: a request repeats in its prompt what was said before in it. None: each is one
    probe_R    whose times are not reported; None: all are
    """

    at_R: Floats
    prompt_R: Ints
    output_R: Ints
    adapter_R: Ints
    probe_R: Bools | None = None
    talk_R: Ints | None = None

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

    def cut(self, context_length: int) -> RequestTrace:
        """Return the requests cut to fit the context: outputs keep what they have, up to half of it."""
        output = np.clip(self.output_R, 1, context_length // 2)
        return replace(self, prompt_R=np.clip(self.prompt_R, 1, context_length - output), output_R=output)

    def work(self, profile: Profile) -> float:
        """Return the seconds of busy replicas that the requests need."""
        return float(profile.work_seconds(self.prompt_R, self.output_R).sum())


def at_rate(trace: RequestTrace, *, rate: float, seconds: float, rng: np.random.Generator) -> RequestTrace:
    """Return `seconds` of the trace at so many requests a second in the mean, repeated where it is shorter.

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
    return RequestTrace(at[order], trace.prompt_R[index], trace.output_R[index], trace.adapter_R[index])


def with_adapters(requests: RequestTrace, num_adapters: int, alpha: float, rng: np.random.Generator) -> RequestTrace:
    """Draw adapter k of n with probability ∝ (k + 1)^-alpha for each request."""
    weights = np.arange(1, num_adapters + 1, dtype=float) ** -alpha
    cumulative = np.cumsum(weights)
    drawn = np.searchsorted(cumulative, rng.random(len(requests)) * cumulative[-1])
    return RequestTrace(requests.at_R, requests.prompt_R, requests.output_R, drawn.astype(np.int64))


def as_conversations(first: RequestTrace, turns: int, think_s: float, rng: np.random.Generator) -> RequestTrace:
    """Let each request be the first of `turns` of a conversation with its adapter. The next turn comes after a time to
    think, exponential with this mean, whether or not the last one has been answered by then; it repeats what was said,
    and adds a message and an answer as long as those of requests drawn at random.
    """
    num, drawn_TR = len(first), rng.integers(0, len(first), (turns, len(first)))
    drawn_TR[0] = np.arange(num)
    prompt_TR, output_TR = first.prompt_R[drawn_TR], first.output_R[drawn_TR]
    said_TR = (prompt_TR + output_TR).cumsum(0) - output_TR  # the prompt of each turn
    at_TR = first.at_R + np.vstack([np.zeros(num), rng.exponential(think_s, (turns - 1, num)).cumsum(0)])
    order = np.argsort(at_TR, axis=None, kind="stable")
    prompt_R, output_R = said_TR.reshape(-1)[order], output_TR.reshape(-1)[order]
    talk_R = order % num
    return RequestTrace(at_TR.reshape(-1)[order], prompt_R, output_R, first.adapter_R[talk_R], talk_R=talk_R)


def digest(adapter: int) -> str:
    """Return a made-up digest: uniform, as real ones are."""
    return sha256(f"adapter {adapter}".encode()).hexdigest()


def mean_tokens() -> tuple[float, float]:
    """Return the mean tokens of prompts and of outputs."""
    return tuple(float(np.exp(mu + 0.5 * sigma**2)) for mu, sigma in (_PROMPT, _OUTPUT))  # type: ignore[return-value]


def generate(*, rate: float, seconds: float, num_adapters: int, alpha: float, seed: int) -> RequestTrace:
    """Make requests, `rate` a second in the mean. Popularity ∝ (k + 1)^-alpha.

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
    return RequestTrace(at[order], prompt, output, adapter[order].astype(np.int64))


def find(name: str, folder: Path | None) -> Path:
    """Return the file of a known trace in `folder`, the first by name. Raises DataError, which says where to get it."""
    found = sorted(folder.glob(_PATTERNS[name])) if folder is not None else []
    if not found:
        looked = f"{folder} has no {_PATTERNS[name]}" if folder is not None else "LORAY_TRACES names no folder"
        raise DataError(
            f"no trace of {name}: {looked}. Download {WHERE[name]}, and name it with --trace {name}:FILE, or its "
            f"folder with LORAY_TRACES"
        )
    return found[0]


def read(path: Path) -> RequestTrace:
    """Read a trace, in the format that its file's name says. Raises DataError."""
    try:
        with path.open(newline="") as lines:
            rows = list(_azure(lines) if path.suffix == ".csv" else _mooncake(lines))
    except (KeyError, ValueError, TypeError) as e:
        raise DataError(
            f"{path} is not a trace: {type(e).__name__}: {e}. Expected are Azure's columns TIMESTAMP,ContextTokens,"
            f"GeneratedTokens (.csv) or Mooncake's timestamp, input_length, output_length in JSON lines (.jsonl)"
        ) from e
    if not rows:
        raise DataError(f"{path} has no requests")
    rows.sort()
    at, *numbers, probe = (np.array(column) for column in zip(*rows, strict=True))
    prompt, output, adapter = (column.astype(np.int64) for column in numbers)
    return RequestTrace(at - at[0], prompt, output, adapter, probe)


def _azure(lines: Iterable[str]) -> Iterator[tuple[float, int, int, int, bool]]:
    for row in csv.DictReader(lines):
        # There are seven digits of a second; Python reads six.
        at = datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=UTC).timestamp()
        yield at, int(row["ContextTokens"]), int(row["GeneratedTokens"]), 0, False


def _mooncake(lines: Iterable[str]) -> Iterator[tuple[float, int, int, int, bool]]:
    for line in filter(str.strip, lines):
        row = json.loads(line)
        adapter = int(row.get("adapter", 0))
        if adapter < 0:
            raise ValueError(f"adapter {adapter} is negative")
        probe = bool(row.get("probe", False))
        yield row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), adapter, probe
