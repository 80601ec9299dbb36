"""What runs in the next step: one token of every request that decodes and does not await its mask, and as much of the
prompts as fits its time.

Prompts are computed by priority and fairness (`fairness`), in chunks that `budget` measures out; a request is admitted
when it is its turn. A request that waits for its adapter does not block others. A request that waits for blocks blocks
those behind it, so that it cannot starve; the prompts that have begun go on. It is admitted when the pool suffices for
what is expected to be generated (`growth`). A running request never fails because memory is short: idle adapters are
evicted first; then the running request of the lowest priority, the youngest of several, is preempted and computed again
later. So is one of a full batch, for a tenant with fewer places. One that would wait too long is refused (`overload`).
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Generic

from loray.engine.memory.blocks import BlockAllocator
from loray.engine.memory.prefix_cache import PrefixCache
from loray.engine.request import Request, State
from loray.engine.residency.residency import Residency
from loray.engine.residency.table import P, R, Tier
from loray.engine.scheduling.admission import Admission
from loray.engine.scheduling.blocks import RequestBlocks
from loray.engine.scheduling.budget import Burst, StepBudget
from loray.engine.scheduling.fairness import rank_in_batch
from loray.engine.scheduling.growth import OutputLengths
from loray.engine.scheduling.limits import QueueLimits, WaitLimits
from loray.engine.scheduling.overload import Backlog, FirstTokenEstimate, FirstTokenTargets, ahead_of
from loray.engine.scheduling.plan import Chunk, Plan, Work
from loray.engine.scheduling.steptime import StepTime
from loray.engine.scheduling.waiting import WaitingRequests
from loray.errors import ContextLengthExceeded

Failures = list[tuple[Request, Exception]]


class Scheduler(Generic[P, R]):
    """The only owner of the queues, and of which request holds which KV blocks and pins which adapter.

    adapter_blocks  the most blocks that a request's adapter takes; 0: not known
    token_weight    of an admitted request's adapter; see fairness.token_weight
    itl_slo_s       target for the time between two tokens of a request; None: only max_num_batched_tokens limits a step
    ttft_slo_s      for requests without one of their own; None: they may wait forever
    clock           seconds
    places_ahead    adapters of waiting requests are copied into free blocks before their turn
    """

    def __init__(
        self,
        *,
        allocator: BlockAllocator,
        residency: Residency[P, R],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        wait_limits: WaitLimits,
        adapter_blocks: Callable[[Request], int],
        token_weight: Callable[[Request], float] = lambda request: 1.0,
        itl_slo_s: float | None = None,
        ttft_slo_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        compact: Callable[[int], bool] = lambda num_blocks: False,
        enable_prefix_caching: bool = True,
        places_ahead: bool = False,
    ) -> None:
        self._residency, self._itl_slo_s, self._token_weight = residency, itl_slo_s, token_weight
        self._max_num_seqs, self._max_tokens, self._clock = max_num_seqs, max_num_batched_tokens, clock
        self.step_time, self._burst = StepTime(), Burst(itl_slo_s)
        self._blocks = RequestBlocks(
            allocator, residency, compact, self.step_time.token_seconds, enable_prefix_caching=enable_prefix_caching
        )
        lengths = self.output_lengths = OutputLengths()
        self._admission = Admission(allocator, residency, self._blocks, lengths, adapter_blocks, ahead=places_ahead)
        self._estimate = FirstTokenEstimate(
            self.step_time, max_num_seqs=max_num_seqs, max_num_batched_tokens=self._max_tokens, itl_slo_s=itl_slo_s
        )
        self._targets = FirstTokenTargets(
            ttft_slo_s=ttft_slo_s, estimate=self._seconds_to_first_token, alone=self._seconds_alone, clock=clock
        )
        self.waiting = WaitingRequests(residency, lead=max_num_batched_tokens)
        self._limits = QueueLimits(self.waiting, residency, wait_limits, self._targets.expected_retry_s, clock)
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def prefix_cache(self) -> PrefixCache:
        return self._blocks.prefix_cache

    @property
    def prefix_cache_queries(self) -> int:
        """Prompt tokens that were looked up in the prefix cache; `prefix_cache_hits`: those found there."""
        return self._blocks.num_queries

    @property
    def prefix_cache_hits(self) -> int:
        return self._blocks.num_hits

    @property
    def num_aborted(self) -> int:
        """Requests refused because their first token would have come too late."""
        return self._targets.num_aborted

    def add(self, request: Request) -> None:
        """Queue a request; one with a constraint waits for `waiting.prepared`. Raises what the two `accept` raise."""
        self._limits.accept(request)
        self._targets.accept(request)
        self.waiting.add(request, prepares=request.has_constraint)

    def remove(self, request: Request) -> None:
        """The request is finished, cancelled or failed: release everything that it holds."""
        if request.state is State.RUNNING:
            self.running.remove(request)
            self.waiting.fair.charge_output(request)
            self.waiting.leave(request)
            self.output_lengths.observe(len(request.output_ids))
            self._release(request)
        elif request.state is State.WAITING:
            self.waiting.remove(request)
        request.state = State.FINISHED

    def preempt(self, request: Request) -> None:
        """A running request waits again, and is computed again from what the prefix cache keeps of it."""
        self.running.remove(request)
        self._release(request)
        request.state = State.WAITING
        self.waiting.add(request, again=True, prepares=request.awaits_mask)
        self.num_preemptions += 1

    def next_deadline(self) -> float:
        """When `next` must be called although nothing happens, in seconds of the clock; infinite: it need not be."""
        return min(self._targets.next_deadline(), self._limits.next_deadline())

    def first_step_seconds(self, digest: str) -> float:
        """Estimate for the first step of the longest waiting prompt of this adapter. 0: not known."""
        loading = self.waiting.loading(digest)
        if not loading:
            return 0.0
        budget = self._new_budget()
        for request in self.running:
            if request not in self.waiting.begun:
                budget.decode(request.num_computed, 1, 0)
        chunk = Work.of(0, budget.fit(0, max(r.num_pending for r in loading)))
        return self.step_time.predict(budget.work.plus(chunk))

    def observe_step(self, work: Work, seconds: float) -> None:
        """The duration of the last step."""
        self.step_time.observe(work, seconds)

    def next(self) -> Plan:
        """The chunks of the next step, and the requests that will not run."""
        changed = self._residency.poll(at_once=not self.running)
        failed = self._fail_running()
        for request in self.running:
            self.waiting.fair.charge_output(request)
        one = self.waiting.gives_place(self.running)
        if one is not None and len(self.running) >= self._max_num_seqs:
            self.preempt(one)
        chunks = self._decode(budget := self._new_budget())
        self._admission.stepped()
        for request, error in chain.from_iterable(late() for late in (self._targets.refuse_late, self._limits.overdue)):
            self.waiting.refuse(request)
            failed.append((request, error))
        failed += self.waiting.admit_loaded()
        self._compute_prompts(budget, chunks, failed)
        self._admission.place_one_ahead(self.waiting, len(self.running))
        # The second poll loads what was evicted and is wanted again, before the engine sleeps.
        changed |= self._admission.emptied | self._residency.poll(at_once=not self.running)
        return Plan(chunks, failed, changed or self._residency.table.has_changed, budget.work)

    def moved(self, moves: Mapping[int, int]) -> None:
        """KV blocks have been copied from the keys of `moves` to its values, also in the allocator's books."""
        self._blocks.moved((*self.running, *self.waiting), moves)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _new_budget(self) -> StepBudget:
        return StepBudget(self.step_time, max_tokens=self._max_tokens, itl_slo_s=self._itl_slo_s)

    def _fail_running(self) -> Failures:
        """Stop the running requests whose partial adapter could not be loaded completely."""
        failed: Failures = []
        for request in list(self.running):
            if request.adapter is not None and self._residency.table.tier(request.adapter) is Tier.FAILED:
                failed.append((request, self._residency.table.error(request.adapter)))
                self.waiting.add(request, again=True)
                self.waiting.refuse(request)
                self.running.remove(request)
                self._release(request)
                request.state = State.WAITING
        return failed

    def _decode(self, budget: StepBudget) -> list[Chunk]:
        """The next token of each request that decodes, best priority and oldest first."""
        chunks, num_others = list[Chunk](), len(self.running) - len(self.waiting.begun)
        now = oldest = self._clock()
        for request in list(self.running):
            if request.state is not State.RUNNING:  # preempted for an earlier one
                continue
            if request.ends_in_flight or request.awaits_mask:
                num_others -= 1
            elif request.adapter is not None and self._residency.table.tier(request.adapter) is not Tier.POOL:
                self.preempt(request)  # its adapter is late: a step has waited for the rest in vain
            elif request not in self.waiting.begun and self._grow(request):
                num_others -= 1
                request.decoding_since = min(request.decoding_since, now)
                oldest = min(oldest, request.decoding_since)
                n = budget.decode(request.num_computed, request.num_pending, num_others)
                chunks.append(Chunk(request, request.num_computed, n))
        prompts = chain(self.waiting.begun, self.waiting)
        num_prompts = len(self.waiting.begun) + len(self.waiting)
        seconds = map(self._estimate.prompt_seconds, prompts)
        budget.in_burst = self._burst.goes_on(now - oldest, len(chunks), num_prompts, seconds)
        return chunks

    def _compute_prompts(self, budget: StepBudget, chunks: list[Chunk], failed: Failures) -> None:
        """Prompts by turns, until the step is full. Adds to `chunks` and `failed`."""
        is_blocked = False
        while (request := self.waiting.pick_begun() if is_blocked else self.waiting.pick()) is not None:
            if request.state is State.WAITING:
                if not budget.fit(0, request.num_pending):
                    return
                is_blocked = not self._admit(request, failed)
                if request.state is State.WAITING:
                    continue
            n = budget.fit(request.num_computed, request.num_pending, scored=request.needs_prompt_logits)
            if not n:
                return
            if not is_blocked:
                self.waiting.fair.serve(request)
            self.waiting.fair.charge_prompt(request, request.num_computed + n)
            self._blocks.share(request)
            chunk = Chunk(request, request.num_computed, n)
            chunks.append(chunk)
            budget.add(chunk)
            if not chunk.is_last:
                return
            self.waiting.end_prompt(request)

    def _admit(self, request: Request, failed: Failures) -> bool:
        """Start `request`; False if it waits for a place or for blocks: the requests behind it may not take them. It
        may fail instead, perhaps with others.
        """
        if len(self.running) >= self._max_num_seqs:
            self.waiting.crowd_out(request)
            return False
        fits = self._admission.fits_at_all(request)
        if not self.waiting.has_failed(request) and fits and self._admission.start(request, self.running):
            request.state = State.RUNNING
            self.waiting.begin(request)
            insort(self.running, request, key=rank_in_batch)  # a preempted request keeps its rank
            request.start_by = math.inf
            if not request.token_weight:
                request.token_weight = self._token_weight(request)
                request.charged_until = request.num_computed
        elif self.waiting.has_failed(request):
            failed += self.waiting.fail(request)
        elif request.adapter is not None and self._residency.table.tier(request.adapter) is Tier.LOADING:
            return True  # its rows are on their way, which nobody else waits for
        elif not fits or (not self.running and not self._admission.empty_pool()):
            self.waiting.refuse(request)
            failed.append((request, ContextLengthExceeded(self._admission.why_not(request), "max_tokens")))
        else:
            return False
        return True

    def _grow(self, request: Request) -> bool:
        """Allocate a block for the next token if needed; False if `request` itself had to be preempted for it."""
        self._blocks.share(request)
        while not self._blocks.extend(request, request.num_tokens):
            self.preempt(last := self.running[-1])
            if last is request:
                return False
        return True

    def _release(self, request: Request) -> None:
        self._blocks.share(request)
        self._blocks.release(request)
        if request.adapter is not None:
            self._residency.release(request.adapter)
        self._admission.released()

    def _seconds_to_first_token(self, request: Request) -> float:
        others = chain(self.waiting, self.waiting.begun)
        seconds, mean_output = self._estimate.prompt_seconds, self.output_lengths.mean
        ahead = ahead_of(request, others, self.waiting.fair, seconds, mean_output)
        decoding = [r.num_tokens for r in self.running if r not in self.waiting.begun]
        ahead, step = ahead.plus(self._backlog(request)), Work(1, len(decoding), sum(decoding))
        return self._estimate.seconds(ahead, step, num_running=len(self.running), mean_output=mean_output)

    def _seconds_alone(self, request: Request) -> float:
        return self._estimate.seconds(self._backlog(request), Work(num_steps=1))

    def _backlog(self, request: Request) -> Backlog:
        return Backlog(1, request.num_pending, self._estimate.prompt_seconds(request))
