"""The demand that one replica measures.

Values are sums over the window, not rates. A request counts at one replica, so the sum over all replicas does not
change when requests move to a new replica.

A request counts when it arrives, with the tokens that it asks for: its prompt and its expected output, which is the
running mean of outputs, at most max_tokens; once it has ended, the true number replaces the expected one. So demand is
what clients ask for, not what the replica computes: waiting and refused requests count too. A request that is refused
and sent again counts once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, field, fields
from heapq import nsmallest
from math import ceil
from typing import Any, NamedTuple

from loray.policy.routing import routing_key
from loray.spec import AdapterBytes, AdapterRef

_ADAPTER, _PAIR = "adapter:", "pair:"
_DIGITS = 13  # of a rank, in base 16: as many as a float has
_NUM_RANKS = 1 << 4 * _DIGITS
MAX_KEYS = 256  # of adapters in one report: each is a time series in Ray
_MIN_SATURATED_S = 1.0
_MEAN_OVER = 50  # requests, for the running mean of outputs


@dataclass(frozen=True, slots=True)
class Observation:
    """One replica's report. Sums are over the last min(age_s, window) seconds.

    tokens      asked for
    capacity    tokens per second while saturated; None until the replica was saturated for a second
    occupied_s  integral of requests under way over time, in batches of max_num_seqs
    kv_byte_s   integral of the KV cache's bytes over time
    backlog     tokens of the requests that wait for their turn, prompts and expected outputs. Without those that wait
                for their adapters to be loaded, which a replica that is added would have to load as well
    old_backlog of the backlog, what came before the window: `tokens` has it as well
    burst       of `tokens`, what came within the time that a replica takes to start
    prompt_tokens, prompt_squares  sums of the prompts' tokens, and of their squares
    adapters    routing key → bytes in the pool, of the adapters in demand whose `adapter_rank` is below `sample`; with
                a `sample` of 1, of all adapters in demand
    pairs       key → bytes, of all VeRA pairs that adapters in demand share
    """

    age_s: float
    tokens: float
    capacity: float | None
    occupied_s: float
    kv_byte_s: float
    pool_bytes: float
    backlog: float
    adapters: Mapping[str, float]
    old_backlog: float = 0.0
    burst: float = 0.0
    prompt_tokens: float = 0.0
    prompt_squares: float = 0.0
    sample: float = 1.0
    pairs: Mapping[str, float] = field(default_factory=dict)

    def to_stats(self) -> dict[str, float]:
        """The report as Ray Serve transports it: numbers by name."""
        return {
            **{name: getattr(self, name) or 0.0 for name in _NUMBERS},
            **{_ADAPTER + key: nbytes for key, nbytes in self.adapters.items()},
            **{_PAIR + key: nbytes for key, nbytes in self.pairs.items()},
        }

    @classmethod
    def from_stats(cls, stats: Mapping[str, float]) -> Observation:
        """Inverse of `to_stats`. KeyError if a number is missing."""
        numbers: dict[str, Any] = {name: stats[name] for name in _NUMBERS}
        return cls(
            **numbers | {"capacity": stats["capacity"] or None},
            adapters={k.removeprefix(_ADAPTER): v for k, v in stats.items() if k.startswith(_ADAPTER)},
            pairs={k.removeprefix(_PAIR): v for k, v in stats.items() if k.startswith(_PAIR)},
        )


_NUMBERS = tuple(field.name for field in fields(Observation) if field.name not in ("adapters", "pairs"))


def adapter_rank(key: str) -> float:
    """Map a digest, or its routing key, to a number in [0, 1): uniformly, and equally on every replica."""
    return int(key[:_DIGITS], 16) / _NUM_RANKS


def key_of_rank(rank: float) -> str:
    """Return the text before which exactly the keys come whose `adapter_rank` is below `rank`."""
    return f"{ceil(rank * _NUM_RANKS):0{_DIGITS}x}" if rank < 1 else "g"


class EngineLoad(NamedTuple):
    """The engine's load at one moment. `num_tokens`: prompt and output tokens computed since its start."""

    num_running: int
    num_waiting: int
    num_loading: int
    num_tokens: int
    kv_bytes: float


@dataclass(slots=True, eq=False)
class TrackedRequest:
    """A request in the meter. `counted`: its final number of tokens; None until the request has ended."""

    at: float
    num_prompt_tokens: int
    max_tokens: int
    adapter: AdapterRef | None
    num_output_tokens: int = 0
    counted: float | None = None


class _Window:
    """The requests of the last `seconds`, and the tokens of those that have ended."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.begin = float("-inf")
        self.requests: deque[TrackedRequest] = deque()
        self.counted = 0.0

    def __contains__(self, request: TrackedRequest) -> bool:
        return request.at > self.begin

    def ended(self, request: TrackedRequest, num_tokens: float) -> None:
        self.counted += num_tokens if request in self else 0.0

    def advance(self, now: float) -> list[TrackedRequest]:
        """Return the requests that leave the window."""
        self.begin = now - self.seconds
        left = []
        while self.requests and self.requests[0] not in self:
            left.append(self.requests.popleft())
            self.counted -= left[-1].counted or 0.0
        return left


class _Sample(NamedTuple):
    at: float
    duration_s: float
    load: EngineLoad


class DemandMeter:
    """Measures demand. All calls come from one event loop, with times in seconds of one monotonic clock.

    burst_s  over which bursts are measured, refused requests as nothing: as long as a replica takes to start, at most
             the window
    """

    def __init__(
        self,
        *,
        window_s: float,
        max_num_seqs: int,
        pool_bytes: float,
        adapter_bytes: Callable[[AdapterRef], AdapterBytes],
        now: float,
        burst_s: float = 20.0,
    ) -> None:
        self._max_num_seqs, self._pool_bytes = max_num_seqs, pool_bytes
        self._adapter_bytes = adapter_bytes
        self._started = now
        self._window, self._burst = _Window(window_s), _Window(burst_s)
        self._prompt_tokens = self._prompt_squares = 0  # of the requests in the window
        self._refused: OrderedDict[float, float] = OrderedDict()  # second → tokens of the requests refused in it
        self._open: dict[TrackedRequest, None] = {}  # in the order in which they came
        self._mean_output: float | None = None
        self._adapters: OrderedDict[str, tuple[float, AdapterRef]] = OrderedDict()  # with the last use, oldest first
        self._last: tuple[float, EngineLoad] | None = None
        self._samples: deque[_Sample] = deque()
        self._saturated_s = self._saturated_tokens = 0.0

    # -- requests -----------------------------------------------------------------------------------------------------

    def arrived(
        self, num_prompt_tokens: int, max_tokens: int, adapter: AdapterRef | None, now: float
    ) -> TrackedRequest:
        request = TrackedRequest(now, num_prompt_tokens, max_tokens, adapter)
        self._window.requests.append(request)
        self._burst.requests.append(request)
        self._prompt_tokens += num_prompt_tokens
        self._prompt_squares += num_prompt_tokens**2
        self._open[request] = None
        self._mark_in_demand(adapter, now)
        self._expire(now)
        return request

    def finished(self, request: TrackedRequest, now: float) -> None:
        """The request ran to its end, or its client disconnected. It counts with the tokens that it has received."""
        if request.num_output_tokens:
            mean, n = self._mean_output, request.num_output_tokens
            self._mean_output = n if mean is None else mean + (n - mean) / _MEAN_OVER
        self._mark_in_demand(request.adapter, now)
        self._close(request, request.num_prompt_tokens + request.num_output_tokens)

    def refused(self, request: TrackedRequest, now: float) -> None:
        """The replica was overloaded. The request is demand nevertheless.

        A refused client retries after at least a second, and its retry cannot be recognised. So of all seconds in the
        window only the one with the most refused tokens counts.
        """
        self._close(request, 0)
        tokens, second = request.num_prompt_tokens + self._expected_output(request), float(int(now))
        self._refused[second] = self._refused.get(second, 0.0) + tokens

    def rejected(self, request: TrackedRequest) -> None:
        """No replica could have run the request. It is no demand for tokens."""
        self._close(request, request.num_output_tokens)

    def _close(self, request: TrackedRequest, num_tokens: float) -> None:
        self._open.pop(request, None)
        request.counted = num_tokens
        self._window.ended(request, num_tokens)
        self._burst.ended(request, num_tokens)

    def _mark_in_demand(self, adapter: AdapterRef | None, now: float) -> None:
        if adapter is not None:
            self._adapters[adapter.digest] = (now, adapter)
            self._adapters.move_to_end(adapter.digest)

    def _expected_output(self, request: TrackedRequest) -> float:
        """Expected output tokens in total, at least those received so far."""
        return max(request.num_output_tokens, min(self._mean_output or 0.0, request.max_tokens))

    # -- the engine ---------------------------------------------------------------------------------------------------

    def sample(self, load: EngineLoad, now: float) -> None:
        """Take a sample. It is called at roughly regular intervals."""
        last, self._last = self._last, (now, load)
        if last is None or now <= last[0]:
            return
        duration_s = now - last[0]
        self._samples.append(_Sample(now, duration_s, load))
        if self._is_saturated(last[1]) and self._is_saturated(load):
            # The mix of requests changes: after another window of saturation, an earlier measurement counts half.
            kept = 0.5 ** (duration_s / self._window.seconds)
            self._saturated_s = kept * self._saturated_s + duration_s
            self._saturated_tokens = kept * self._saturated_tokens + load.num_tokens - last[1].num_tokens

    def _is_saturated(self, load: EngineLoad) -> bool:
        """The batch is full, or requests wait for something other than the loading of their adapters."""
        return load.num_running >= self._max_num_seqs or (load.num_waiting > 0 and load.num_loading == 0)

    @property
    def capacity(self) -> float | None:
        """Prompt and output tokens per second while saturated; None until that was measured for a second. A replica
        that computed nothing meanwhile says nothing about the rate either.
        """
        if self._saturated_s < _MIN_SATURATED_S or self._saturated_tokens <= 0:
            return None
        return self._saturated_tokens / self._saturated_s

    # -- report -------------------------------------------------------------------------------------------------------

    def observe(self, now: float, loaded: Container[str] | None = None) -> Observation:
        """Report the demand. `loaded`: digests of the adapters that need no load from the store; None: all."""
        self._expire(now)
        for request in self._open:
            self._mark_in_demand(request.adapter, now)
        sizes = {digest: self._adapter_bytes(ref) for digest, (_, ref) in self._adapters.items()}
        waiting = self._waiting(loaded)
        digests: Collection[str] = sizes
        sample = 1.0
        if len(sizes) > MAX_KEYS:
            *digests, first_left_out = nsmallest(MAX_KEYS + 1, sizes)
            sample = adapter_rank(first_left_out)
        return Observation(
            age_s=now - self._started,
            tokens=self._window.counted
            + sum(map(self._open_tokens, self._open))
            + max(self._refused.values(), default=0.0),
            capacity=self.capacity,
            occupied_s=sum(s.duration_s * (s.load.num_running + s.load.num_waiting) for s in self._samples)
            / self._max_num_seqs,
            kv_byte_s=sum(s.duration_s * s.load.kv_bytes for s in self._samples),
            pool_bytes=self._pool_bytes,
            backlog=sum(map(self._open_tokens, waiting)),
            old_backlog=sum(self._open_tokens(r) for r in waiting if r not in self._window),
            burst=self._burst.counted + sum(self._open_tokens(r) for r in self._open if r in self._burst),
            prompt_tokens=float(self._prompt_tokens),
            prompt_squares=float(self._prompt_squares),
            adapters={routing_key(digest): sizes[digest].own for digest in digests},
            sample=sample,
            pairs={routing_key(size.pair[0]): size.pair[1] for size in sizes.values() if size.pair},
        )

    def _waiting(self, loaded: Container[str] | None) -> list[TrackedRequest]:
        """Return as many as the engine's last sample had waiting, less those that wait for a load: of the others
        without a first token, the last to come. The rest is being computed.
        """
        unanswered = [r for r in reversed(self._open) if not r.num_output_tokens]
        ready = [r for r in unanswered if loaded is None or r.adapter is None or r.adapter.digest in loaded]
        num_waiting = self._last[1].num_waiting if self._last else 0
        return ready[: max(0, num_waiting - (len(unanswered) - len(ready)))]

    def _open_tokens(self, request: TrackedRequest) -> float:
        """Tokens of a request under way; if it arrived before the window, only those not yet computed."""
        output = self._expected_output(request)
        if request in self._window:
            return request.num_prompt_tokens + output
        return output - request.num_output_tokens + (0 if request.num_output_tokens else request.num_prompt_tokens)

    def _expire(self, now: float) -> None:
        self._burst.advance(now)
        for request in self._window.advance(now):
            self._prompt_tokens -= request.num_prompt_tokens
            self._prompt_squares -= request.num_prompt_tokens**2
        begin = self._window.begin
        while self._refused and next(iter(self._refused)) <= begin:
            self._refused.popitem(last=False)
        while self._samples and self._samples[0].at <= begin:
            self._samples.popleft()
        while self._adapters and next(iter(self._adapters.values()))[0] <= begin:
            self._adapters.popitem(last=False)
