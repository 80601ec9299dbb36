"""What one replica measures for the autoscaler, over a sliding window of its own requests.

Only what happens here is measured, and as sums over the window, not as rates: a request counts at one replica, so when
requests move to a replica that joins, the sum over all replicas stays what it was.

A request counts when it comes, with the tokens that it asks for: its prompt, and the output that is to be expected
(the running mean, at most its max_tokens) until it has ended and the true number is known. So demand is what is asked
for, not what is managed: waiting and refused requests count as well, those refused once however often they come back.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import NamedTuple

from loray.spec import AdapterBytes, AdapterRef

MAX_KEYS = 256  # each is a time series of its own in Ray's reports
_KEY_DIGITS = 16  # of an adapter's digest: unique among millions
_ADAPTER, _PAIR = "adapter:", "pair:"
_MIN_SATURATED_S = 1.0
_MEAN_OVER = 50  # requests, of the running mean of outputs


@dataclass(frozen=True, slots=True)
class Observation:
    """One replica's report. Sums are over the last min(age_s, window) seconds.

    `tokens`: asked for. `capacity`: tokens/s that it manages, None until it was saturated for a second. `occupied_s`:
    seconds times requests under way, in batches of max_num_seqs. `kv_byte_s`: seconds times bytes of KV cache.
    `adapters`: bytes of the pool by key, of the adapters in demand whose `adapter_rank` is below `sample`: all of
    them where `sample` is 1. `pairs`: of all VeRA pairs that adapters in demand share; there are few.
    """

    age_s: float
    tokens: float
    capacity: float | None
    occupied_s: float
    kv_byte_s: float
    pool_bytes: float
    adapters: Mapping[str, float]
    sample: float = 1.0
    pairs: Mapping[str, float] = field(default_factory=dict)

    def to_stats(self) -> dict[str, float]:
        """As Ray Serve carries it: numbers by name."""
        return {
            "age_s": self.age_s,
            "tokens": self.tokens,
            "capacity": self.capacity or 0.0,
            "occupied_s": self.occupied_s,
            "kv_byte_s": self.kv_byte_s,
            "pool_bytes": self.pool_bytes,
            "sample": self.sample,
            **{_ADAPTER + key: nbytes for key, nbytes in self.adapters.items()},
            **{_PAIR + key: nbytes for key, nbytes in self.pairs.items()},
        }

    @classmethod
    def from_stats(cls, stats: Mapping[str, float]) -> Observation:
        """KeyError where a number is missing."""
        return cls(
            age_s=stats["age_s"],
            tokens=stats["tokens"],
            capacity=stats["capacity"] or None,
            occupied_s=stats["occupied_s"],
            kv_byte_s=stats["kv_byte_s"],
            pool_bytes=stats["pool_bytes"],
            adapters={k.removeprefix(_ADAPTER): v for k, v in stats.items() if k.startswith(_ADAPTER)},
            sample=stats["sample"],
            pairs={k.removeprefix(_PAIR): v for k, v in stats.items() if k.startswith(_PAIR)},
        )


def adapter_rank(key: str) -> float:
    """Of a digest or the beginning of one: uniform in [0, 1), the same at every replica."""
    return int(key[:13], 16) / 16**13


class EngineLoad(NamedTuple):
    """A moment of the engine. `num_tokens`: prompt and output tokens computed since its start."""

    num_running: int
    num_waiting: int
    num_loading: int
    num_tokens: int
    kv_bytes: float


@dataclass(slots=True, eq=False)
class Asked:
    """A request as the meter sees it. `counted`: its tokens, once they are settled."""

    at: float
    num_prompt_tokens: int
    max_tokens: int
    adapter: AdapterRef | None
    num_output_tokens: int = 0
    counted: float | None = None
    in_window: bool = True


class _Sample(NamedTuple):
    at: float
    duration_s: float
    load: EngineLoad


class _Refused(NamedTuple):
    """In the second that begins at `at`."""

    at: float
    tokens: float


class DemandMeter:
    """Called from one event loop, with times in seconds of one clock that only goes forward."""

    def __init__(
        self,
        *,
        window_s: float,
        max_num_seqs: int,
        pool_bytes: float,
        adapter_bytes: Callable[[AdapterRef], AdapterBytes],
        now: float,
    ) -> None:
        self._window_s, self._max_num_seqs, self._pool_bytes = window_s, max_num_seqs, pool_bytes
        self._adapter_bytes = adapter_bytes
        self._started = now
        self._window: deque[Asked] = deque()
        self._counted = 0.0  # tokens of the settled requests in the window
        self._refused: deque[_Refused] = deque()
        self._open: set[Asked] = set()
        self._mean_output: float | None = None
        self._adapters: OrderedDict[str, tuple[float, AdapterRef]] = OrderedDict()  # last demanded, oldest first
        self._last: tuple[float, EngineLoad] | None = None
        self._samples: deque[_Sample] = deque()
        self._saturated_s = self._saturated_tokens = 0.0

    # -- requests -----------------------------------------------------------------------------------------------------

    def arrived(self, num_prompt_tokens: int, max_tokens: int, adapter: AdapterRef | None, now: float) -> Asked:
        asked = Asked(now, num_prompt_tokens, max_tokens, adapter)
        self._window.append(asked)
        self._open.add(asked)
        self._want(adapter, now)
        self._expire(now)
        return asked

    def finished(self, asked: Asked, now: float) -> None:
        """It ran to its end, or its caller left: what has come is what it took."""
        if asked.num_output_tokens:
            mean, n = self._mean_output, asked.num_output_tokens
            self._mean_output = n if mean is None else mean + (n - mean) / _MEAN_OVER
        self._want(asked.adapter, now)
        self._settle(asked, asked.num_prompt_tokens + asked.num_output_tokens)

    def refused(self, asked: Asked, now: float) -> None:
        """There was no room for it: demand all the same.

        Who is refused comes back, after a second at the earliest, and nobody says that it is the same request. So only
        that second of the window counts in which the most was refused.
        """
        self._settle(asked, 0)
        tokens, second = asked.num_prompt_tokens + self._expected_output(asked), float(int(now))
        if self._refused and self._refused[-1].at == second:
            tokens += self._refused.pop().tokens
        self._refused.append(_Refused(second, tokens))

    def void(self, asked: Asked) -> None:
        """It could not have run anywhere: no demand for tokens."""
        self._settle(asked, asked.num_output_tokens)

    def _settle(self, asked: Asked, num_tokens: float) -> None:
        self._open.discard(asked)
        asked.counted = num_tokens
        if asked.in_window:
            self._counted += num_tokens

    def _want(self, adapter: AdapterRef | None, now: float) -> None:
        if adapter is not None:
            self._adapters[adapter.digest] = (now, adapter)
            self._adapters.move_to_end(adapter.digest)

    def _expected_output(self, asked: Asked) -> float:
        """In all; what has come at least."""
        return max(asked.num_output_tokens, min(self._mean_output or 0.0, asked.max_tokens))

    # -- the engine ---------------------------------------------------------------------------------------------------

    def sample(self, load: EngineLoad, now: float) -> None:
        """Called at intervals, as regular as may be."""
        last, self._last = self._last, (now, load)
        if last is None or now <= last[0]:
            return
        duration_s = now - last[0]
        self._samples.append(_Sample(now, duration_s, load))
        if self._is_saturated(last[1]) and self._is_saturated(load):
            # What was measured counts half after another window of saturation: the mix of requests changes.
            kept = 0.5 ** (duration_s / self._window_s)
            self._saturated_s = kept * self._saturated_s + duration_s
            self._saturated_tokens = kept * self._saturated_tokens + load.num_tokens - last[1].num_tokens

    def _is_saturated(self, load: EngineLoad) -> bool:
        """The batch is full, or requests wait for more than their adapters."""
        return load.num_running >= self._max_num_seqs or (load.num_waiting > 0 and load.num_loading == 0)

    @property
    def capacity(self) -> float | None:
        """Tokens/s of prompt and output while saturated; None until that has been seen."""
        return self._saturated_tokens / self._saturated_s if self._saturated_s >= _MIN_SATURATED_S else None

    # -- report -------------------------------------------------------------------------------------------------------

    def observe(self, now: float) -> Observation:
        self._expire(now)
        for asked in self._open:
            self._want(asked.adapter, now)
        sizes = {digest: self._adapter_bytes(ref) for digest, (_, ref) in self._adapters.items()}
        keys = nsmallest(MAX_KEYS + 1, sizes)
        sample = 1.0 if len(keys) <= MAX_KEYS else adapter_rank(keys.pop())
        return Observation(
            age_s=now - self._started,
            tokens=self._counted
            + sum(map(self._open_tokens, self._open))
            + max((refused.tokens for refused in self._refused), default=0.0),
            capacity=self.capacity,
            occupied_s=sum(s.duration_s * (s.load.num_running + s.load.num_waiting) for s in self._samples)
            / self._max_num_seqs,
            kv_byte_s=sum(s.duration_s * s.load.kv_bytes for s in self._samples),
            pool_bytes=self._pool_bytes,
            adapters={key[:_KEY_DIGITS]: sizes[key].own for key in keys},
            sample=sample,
            pairs={size.pair[0][:_KEY_DIGITS]: size.pair[1] for size in sizes.values() if size.pair},
        )

    def _open_tokens(self, asked: Asked) -> float:
        """Of an older request, what is still to be done."""
        output = self._expected_output(asked)
        if asked.in_window:
            return asked.num_prompt_tokens + output
        return output - asked.num_output_tokens + (0 if asked.num_output_tokens else asked.num_prompt_tokens)

    def _expire(self, now: float) -> None:
        begin = now - self._window_s
        while self._window and self._window[0].at <= begin:
            asked = self._window.popleft()
            asked.in_window = False
            self._counted -= asked.counted or 0.0
        while self._refused and self._refused[0].at <= begin:
            self._refused.popleft()
        while self._samples and self._samples[0].at <= begin:
            self._samples.popleft()
        while self._adapters and next(iter(self._adapters.values()))[0] <= begin:
            self._adapters.popitem(last=False)
