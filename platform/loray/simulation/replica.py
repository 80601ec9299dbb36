"""A replica as a fluid: between two events of it, its prompts are computed and its requests decode at constant rates.

A step has the length that the engine's budget gives it (`engine.scheduling.budget`): with requests that decode, the
target between two tokens, but at least a quarter of that for prompts; without, four times the target. What steps begin
and end between events is not followed; so an event costs O(log requests), however many steps pass.

Of the prompts the one with the smallest virtual finish is computed, as the engine's fair queue does for one tenant: the
service that the replica had given when the request came, plus the prompt's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from loray.serving.scaling.demand import TrackedRequest
from loray.simulation.clock import Clock
from loray.simulation.profile import Profile
from loray.simulation.residency import ReplicaAdapters

_ALONE, _MIN_SHARE, _OUTPUT_WEIGHT = 4.0, 0.25, 2.0  # as engine.scheduling.budget and fairness have them


class Job:
    """One request on a replica.

    factor      of what its prompt takes to compute
    stall       seconds in which the replica computes nothing before it
    rest        seconds of computing what is left of its prompt
    token_rate  tokens of its prompt in such a second
    came_at     its arrival, in seconds
    way         seconds to its replica
    tracked     of the meter of demand, if there is one
    """

    __slots__ = (
        "adapter", "came_at", "factor", "first_token_at", "index", "kv_bytes", "num_output", "num_prompt", "rest",
        "stall", "token_rate", "tracked", "way",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        num_prompt: int,
        num_output: int,
        adapter: int,
        factor: float = 1.0,
        stall: float = 0.0,
        *,
        came_at: float = 0.0,
        way: float = 0.0,
    ) -> None:
        self.index, self.num_prompt, self.num_output, self.adapter = index, num_prompt, num_output, adapter
        self.factor, self.stall = factor, stall
        self.came_at, self.way = came_at, way
        self.rest = self.kv_bytes = self.token_rate = 0.0
        self.first_token_at = math.inf
        self.tracked: TrackedRequest | None = None


class Ended(NamedTuple):
    """What has happened by the time of an `advance`."""

    first_tokens: Sequence[Job]
    finished: Sequence[Job]


_NOTHING = Ended((), ())


class Replica:
    """`ready` and `advance` change it; then `next_event` is the time at which `advance` is to be called next. Its times
    are those of the clock's work.
    """

    def __init__(self, profile: Profile, adapters: ReplicaAdapters, clock: Clock, now: float) -> None:
        self._profile, self.adapters, self._clock = profile, adapters, clock
        self._step_s, self._each_s = profile.step_s, profile.decode_s + profile.adapter_s
        self._target_s = profile.itl_slo_s
        self.now = now
        self._decoded = 0.0  # tokens of a request that has decoded since the start
        self._decoding: list[tuple[float, int, Job]] = []  # by the value of `_decoded` at which they end
        self._waiting: list[tuple[float, int, Job]] = []  # by virtual finish; their adapters are on the host at least
        self._begun: list[tuple[float, int, Job]] = []  # prompts that are partly computed
        self._stuck = False  # the first of `_waiting` found no place or no room, and nothing has ended since
        self._prompt_rate = self._decode_rate = 0.0
        self._step = 0.0  # seconds, while a prompt is computed
        self._prompt_tokens = self._output_tokens = 0.0
        self.num_jobs = 0  # all that have come and not ended
        self.next_event = math.inf

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._begun)

    def num_tokens(self, seconds: float) -> float:
        """Computed since the start, by that time in seconds, which is not after `next_event`."""
        rate = self._decode_rate * len(self._decoding)
        if self._begun:
            rate += self._prompt_rate * self._begun[0][2].token_rate
        return self._prompt_tokens + self._output_tokens + rate * (self._clock.work(seconds) - self.now)

    @property
    def kv_bytes(self) -> float:
        return sum(job.kv_bytes for queue in (self._decoding, self._begun) for _, _, job in queue)

    def ready(self, job: Job) -> None:
        """Its adapter is on the host or in the pool; the replica has been advanced to now."""
        finish = self._prompt_tokens + _OUTPUT_WEIGHT * self._output_tokens + job.num_prompt
        job.rest = job.stall + job.factor * self._profile.prompt_seconds(job.num_prompt)
        job.token_rate = job.num_prompt / job.rest
        heappush(self._waiting, (finish, job.index, job))
        self._plan(started=not self._begun)

    def advance(self, now: float) -> Ended:
        """Let the time pass until `now`, which is at most `next_event`."""
        seconds = now - self.now
        self.now = now
        begun, decoding = self._begun, self._decoding
        if seconds > 0:
            tokens = seconds * self._decode_rate
            self._decoded += tokens
            self._output_tokens += tokens * len(decoding)
            if begun and self._prompt_rate:
                job = begun[0][2]
                done = seconds * self._prompt_rate
                if done > job.rest:
                    done = job.rest
                self._prompt_tokens += done * job.token_rate
                job.rest -= done
        answers = begun and begun[0][2].rest <= 1e-9
        if not answers and not (decoding and decoding[0][0] <= self._decoded + 1e-6):
            self._set_next_event()
            return _NOTHING
        first_tokens: list[Job] = []
        finished: list[Job] = []
        if answers:
            job = heappop(begun)[2]
            # A step that other prompts share goes on after the last token of this one.
            job.first_token_at = now + (0.5 * self._step if begun or self._waiting else 0.0)
            self._output_tokens += 1
            first_tokens.append(job)
            heappush(decoding, (self._decoded + job.num_output - 1, job.index, job))
        while decoding and decoding[0][0] <= self._decoded + 1e-6:
            job = heappop(decoding)[2]
            self.adapters.give_back(job.adapter, job.kv_bytes)
            finished.append(job)
            self._stuck = False
        self.num_jobs -= len(finished)
        self._plan(started=False)
        return Ended(first_tokens, finished)

    # -- private ------------------------------------------------------------------------------------------------------

    def _plan(self, *, started: bool) -> None:
        """Choose the prompt that is computed, and set the rates. `started`: no prompt was computed until now."""
        begun, waiting = self._begun, self._waiting
        while waiting and not self._stuck and (not begun or waiting[0] < begun[0]) and self._admit(waiting[0][2]):
            heappush(begun, heappop(waiting))
        num_decoding = len(self._decoding)
        fixed = self._step_s + num_decoding * self._each_s
        if not begun:
            self._prompt_rate, self._decode_rate = 0.0, 1 / fixed if num_decoding else 0.0
        else:
            job = begun[0][2]
            target = self._target_s if num_decoding else _ALONE * self._target_s
            room = max(target - fixed, _MIN_SHARE * target)
            room = min(room, self._profile.max_num_batched_tokens / job.token_rate)
            self._step = fixed + room
            self._prompt_rate = room / self._step
            self._decode_rate = 1 / self._step if num_decoding else 0.0
            if started:
                # The step under way ends first, and one step has the fixed cost, however short the prompt.
                delay = fixed * (1 - min(1.0, job.rest / room)) + (0.5 * fixed if num_decoding else 0.0)
                job.rest += delay * self._prompt_rate
        self._set_next_event()

    def _set_next_event(self) -> None:
        at = math.inf
        if self._begun and self._prompt_rate:
            at = self.now + self._begun[0][2].rest / self._prompt_rate
        if self._decoding and self._decode_rate:
            left = self._decoding[0][0] - self._decoded
            ends = self.now + (left if left > 0.0 else 0.0) / self._decode_rate
            if ends < at:
                at = ends
        self.next_event = at

    def _admit(self, job: Job) -> bool:
        """Whether there is a place in the batch and room in the pool; if so, both are taken."""
        profile = self._profile
        # Blocks come as tokens are generated: in the mean half of the output's.
        kv_bytes = profile.kv_token_bytes * (job.num_prompt + 0.5 * job.num_output)
        seconds = None
        if self.num_running < profile.max_num_seqs:
            seconds = self.adapters.take(job.adapter, kv_bytes)
        if seconds is None:
            self._stuck = True
            return False
        job.kv_bytes = kv_bytes
        job.rest += seconds
        return True
