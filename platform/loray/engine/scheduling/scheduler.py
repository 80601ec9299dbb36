"""`Scheduler.next` says who runs, who is admitted and who is preempted.

Prompts are computed by priority and fairness (`FairQueue`), in chunks that `StepBudget` measures out; a request is
admitted when it is its turn. A request that waits for its adapter does not block others. A request that waits for
blocks blocks those behind it, so that it cannot starve; the prompts that have begun go on. It is admitted when the pool
suffices for what is expected to be generated (`Admission`). A running request never fails because memory is short: idle
adapters are evicted first; then the running request of the lowest priority, the youngest of several, is preempted and
computed again later. So is one of a full batch, for a tenant with fewer places, and one in the background, for any
other that lacks a place or blocks. One that would wait too long is refused (`TtftSlo`, `QueueLimits`).
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from itertools import accumulate, chain, islice
from typing import Generic, NamedTuple

from loray.engine.memory.adapter_manager import AdapterManager, R, Tier
from loray.engine.memory.blocks import BlockAllocator
from loray.engine.memory.host_memory import P
from loray.engine.memory.kv_cache import KVCacheManager
from loray.engine.memory.prefix_cache import PrefixCache
from loray.engine.request import Chunk, Request, RequestState, SchedulerOutput, StepWork
from loray.engine.scheduling.background import Background
from loray.engine.scheduling.early_abort import Backlog, TtftEstimate, TtftSlo, ahead_of
from loray.engine.scheduling.fairness import rank_in_batch
from loray.engine.scheduling.speculation import Speculation
from loray.engine.scheduling.step_budget import MIN_CHUNK, Burst, StepBudget, StepTimeModel
from loray.engine.scheduling.waiting import QueueLimits, WaitingRequests, WaitLimits
from loray.errors import ContextLengthExceeded
from loray.spec import BACKGROUND_PRIORITY

_NUM_LENGTHS = 64  # of the latest outputs
_FIRST_GUESS = 128  # tokens of an output, before any request has ended
# Room for all that is expected would end preemption but leave places empty. Three quarters of it are fastest or nearly
# so in every load that was simulated, see docs/decisions/0003-steps-by-time.md.
_SHARE = 0.75
_LOOKED_AHEAD = 32  # waiting requests
_WATERMARK = 0.01  # of the pool, for outputs that are longer than expected

Failures = list[tuple[Request, Exception]]


class OutputLengths:
    """The lengths of the latest outputs, in tokens, and what they say about outputs that have not ended."""

    def __init__(self) -> None:
        self._latest: deque[int] = deque()
        self._sorted: list[int] = []
        self._means: list[float] = []  # of the lengths from each place of `_sorted` on

    def observe(self, num_output: int) -> None:
        """A request has ended."""
        if len(self._latest) == _NUM_LENGTHS:
            self._sorted.remove(self._latest.popleft())
        self._latest.append(num_output)
        insort(self._sorted, num_output)
        sums = accumulate(reversed(self._sorted))
        self._means = [total / n for n, total in enumerate(sums, 1)][::-1]

    @property
    def mean(self) -> float:
        """0 before a request has ended."""
        return self._means[0] if self._means else 0.0

    def remaining(self, generated: int) -> float:
        """Return how many tokens a request that has generated so many is expected to generate still: by the mean of the
        longer outputs, or if there is none as many again.
        """
        if not self._means:
            return max(generated, _FIRST_GUESS)
        longer = bisect_right(self._sorted, generated)
        return self._means[longer] - generated if longer < len(self._means) else generated


class Growth(NamedTuple):
    """A running request: tokens whose keys and values it has, or will have when its prompt is computed; blocks that it
    holds, or shares with other requests; tokens that it will still generate.
    """

    num_tokens: int
    num_blocks: int
    num_shared_blocks: int
    remaining: float


def blocks_wanted(running: Iterable[Growth], block_tokens: int) -> float:
    """Return the most blocks beyond those held now that the requests need at once, if each generates `remaining` more
    tokens, one a step, and then releases the blocks that it does not share; right to half a block for each. O(n log n).
    """
    longest_first = sorted(running, key=lambda g: -g.remaining)
    released = sum([g.num_blocks - g.num_shared_blocks for g in longest_first])
    most = num_tokens = 0.0
    num_blocks = 0
    for i, g in enumerate(longest_first, 1):  # when g ends, the first i have run until then
        num_tokens += g.num_tokens + block_tokens / 2 - 1  # half of the last block is empty, the last token not stored
        num_blocks += g.num_blocks
        released -= g.num_blocks - g.num_shared_blocks
        most = max(most, (num_tokens + i * g.remaining) / block_tokens - num_blocks - released)
    return most


class Admission(Generic[P, R]):
    """Admits a request only if it and all that run can be expected to reach their ends.

    Without that the pool fills with prompts; then each further token takes the blocks of a running request, which is
    computed again and again. Source of the formula: Gong et al., "Past-Future Scheduler for LLM Serving under SLA
    Guarantees", ASPLOS 2025: the demand is largest when a request ends, so it is enough to look at these moments.

    adapter_blocks  the most blocks that a request's adapter takes; 0: not known
    places_ahead    adapters may be placed before their requests' turn
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        adapter_manager: AdapterManager[P, R],
        kv_cache: KVCacheManager,
        lengths: OutputLengths,
        adapter_blocks: Callable[[Request], int],
        *,
        places_ahead: bool = False,
    ) -> None:
        self._places_ahead = places_ahead
        self._allocator, self._adapter_manager, self._kv_cache = allocator, adapter_manager, kv_cache
        self._lengths, self._adapter_blocks = lengths, adapter_blocks
        self._short: Request | None = None  # for which blocks were short; nothing has been released since
        self._growing: list[Growth] | None = None  # those that run, in this step
        self.emptied = False  # the pool, in this step

    def fits_at_all(self, request: Request) -> bool:
        needed = self._adapter_blocks(request) + self._kv_cache.most_blocks(request.max_tokens, request.num_tokens)
        return needed <= self._allocator.geometry.num_blocks

    def why_not(self, request: Request) -> str:
        """Return the reason why a request does not fit at all."""
        geometry = self._allocator.geometry
        return (
            f"{request.max_tokens} tokens and their adapter need "
            f"{geometry.blocks_for_tokens(request.max_tokens)} + {self._adapter_blocks(request)} blocks, the pool has "
            f"{geometry.num_blocks}; ask for fewer tokens or serve with a larger pool_bytes"
        )

    def start(self, request: Request, running: Collection[Request]) -> bool:
        """Pin its adapter and allocate blocks for all tokens known so far; all or nothing. False if blocks are short,
        now or, beside those that run, before it can be expected to end.
        """
        if running and request is self._short:
            return False
        self._short = request
        ref = request.adapter
        self._kv_cache.take_cached(request)  # first: making room for the rest could evict these blocks
        if running and not self._lasts(request, running):
            self._kv_cache.release(request)
            return False
        if self._kv_cache.fetch(request):
            self._short = None  # its prefix is on its way; blocks are not short
            self._kv_cache.release(request)
            return False
        if ref is not None:
            while self._adapter_manager.acquire(ref) is None:
                missing = self._adapter_blocks(request) - self._allocator.num_free
                tier = self._adapter_manager.tier(ref)
                if tier is not Tier.HOST or not self._kv_cache.make_room(max(1, missing)):
                    if tier.is_on_its_way:  # its rows are; blocks are not short
                        self._short = None
                    self._kv_cache.release(request)
                    return False
        if not self._kv_cache.extend(request, request.num_tokens):
            self._kv_cache.release(request)
            if ref is not None:
                self._adapter_manager.release(ref)
            return False
        self._kv_cache.count_cached(request)
        self._short = None
        if self._growing is not None:
            self._growing.append(self._growth(request))
        return True

    def place_one_ahead(self, waiting: Iterable[Request], num_running: int) -> None:
        """Copy the adapter of a request that waits for its turn into free blocks, where that leaves one for each that
        runs: it is there when the turn comes. Of the first few that wait; one a step, beside which the copy goes on.
        """
        if not self._places_ahead:
            return
        most = self._allocator.num_free - num_running - int(_WATERMARK * self._allocator.geometry.num_blocks)
        for request in islice(waiting, _LOOKED_AHEAD):
            ref = request.adapter
            if ref is None or self._adapter_manager.tier(ref) is not Tier.HOST:
                continue
            if 0 < self._adapter_blocks(request) <= most and self._adapter_manager.place_ahead(ref):
                return

    def released(self) -> None:
        """A running request has released its blocks and its adapter."""
        self._short = self._growing = None

    def stepped(self) -> None:
        """The running requests have grown."""
        self._growing, self.emptied = None, False

    def empty_pool(self) -> bool:
        """With nothing running, evict every adapter: the request's own may be spread over the gaps of others, and takes
        fewer blocks when it is placed again. False if there was none: then blocks will never suffice.
        """
        while self._adapter_manager.evict_one():
            self.emptied = True
        return self.emptied

    def _lasts(self, request: Request, running: Collection[Request]) -> bool:
        """True if the pool suffices until `request` and those that run have ended."""
        geometry = self._allocator.geometry
        if self._growing is None:
            self._growing = [self._growth(r) for r in running]
        growing = [*self._growing, self._growth(request, num_shared_blocks=len(request.blocks))]
        wanted = blocks_wanted(growing, geometry.block_tokens) + int(_WATERMARK * geometry.num_blocks)
        if request.adapter is not None and self._adapter_manager.tier(request.adapter) is not Tier.POOL:
            wanted += self._adapter_blocks(request)
        missing = wanted - self._allocator.num_free - self._kv_cache.prefix_cache.num_idle
        return missing <= 0 or self._idle_adapters_have(missing)

    def _idle_adapters_have(self, num_blocks: float) -> bool:
        manager = self._adapter_manager
        for digest in manager.idle:
            num_blocks -= manager.size(manager.resident(manager.entries[digest].ref))
            if num_blocks <= 0:
                return True
        return False

    def _growth(self, request: Request, num_shared_blocks: int | None = None) -> Growth:
        num_output, block_tokens = len(request.output_ids), self._allocator.geometry.block_tokens
        num_freed = request.num_freed_blocks
        if num_shared_blocks is None:
            num_shared_blocks = max(0, (request.num_cached_tokens or 0) // block_tokens - num_freed)
        remaining = min(request.spec.params.max_tokens - num_output, self._lengths.remaining(num_output))
        held = request.num_tokens - num_freed * block_tokens
        return Growth(held, len(request.held_blocks), num_shared_blocks, _SHARE * remaining)


class Scheduler(Generic[P, R]):
    """The only owner of the queues, and of which request holds which KV blocks and pins which adapter.

    adapter_blocks  the most blocks that a request's adapter takes; 0: not known
    token_weight    of an admitted request's adapter; see fairness.token_weight
    itl_slo_s       target for the time between two tokens of a request; None: only max_num_batched_tokens limits a step
    ttft_slo_s      for requests without one of their own; None: they may wait forever
    background_slack  see background.Background
    clock           seconds
    places_ahead    adapters of waiting requests are copied into free blocks before their turn
    window          see KVCacheManager
    """

    def __init__(
        self,
        *,
        allocator: BlockAllocator,
        adapter_manager: AdapterManager[P, R],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        wait_limits: WaitLimits,
        adapter_blocks: Callable[[Request], int],
        token_weight: Callable[[Request], float] = lambda request: 1.0,
        itl_slo_s: float | None = None,
        ttft_slo_s: float | None = None,
        background_slack: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
        enable_prefix_caching: bool = True,
        places_ahead: bool = False,
        window: int | None = None,
    ) -> None:
        self._adapter_manager, self._itl_slo_s, self._token_weight = adapter_manager, itl_slo_s, token_weight
        self._max_num_seqs, self._max_tokens, self._clock = max_num_seqs, max_num_batched_tokens, clock
        self.step_time, self._burst = StepTimeModel(), Burst(itl_slo_s)
        self.kv_cache = KVCacheManager(
            allocator,
            adapter_manager,
            self.step_time.token_seconds,
            enable_prefix_caching=enable_prefix_caching,
            window=window,
            clock=clock,
        )
        lengths = self.output_lengths = OutputLengths()
        self._admission = Admission(
            allocator, adapter_manager, self.kv_cache, lengths, adapter_blocks, places_ahead=places_ahead
        )
        self._estimate = TtftEstimate(
            self.step_time, max_num_seqs=max_num_seqs, max_num_batched_tokens=self._max_tokens, itl_slo_s=itl_slo_s
        )
        self._targets = TtftSlo(
            ttft_slo_s=ttft_slo_s,
            estimate=self._seconds_to_first_token,
            alone=lambda request: self._estimate.seconds(self._backlog(request), StepWork(num_steps=1)),
            clock=clock,
        )
        self.waiting = WaitingRequests(adapter_manager, lead=max_num_batched_tokens)
        self._limits = QueueLimits(self.waiting, adapter_manager, wait_limits, self._targets.expected_retry_s, clock)
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._background, self._num_background = Background(self.step_time, background_slack), 0
        self.speculation: Speculation | None = None  # the engine sets it
        self._allocator = allocator

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def prefix_cache(self) -> PrefixCache:
        return self.kv_cache.prefix_cache

    @property
    def num_aborted(self) -> int:
        """The number of requests refused because their first token would have come too late."""
        return self._targets.num_aborted

    def add(self, request: Request) -> None:
        """Queue a request; one with a constraint waits for `waiting.prepared`. Raises Overloaded or StoreError."""
        self._limits.accept(request)
        self._targets.accept(request)
        self.waiting.add(request, prepares=request.has_constraint)
        self._num_background += request.is_background

    def remove(self, request: Request) -> None:
        """The request is finished, cancelled or failed: release everything that it holds."""
        if request.state is not RequestState.FINISHED:
            self._num_background -= request.is_background
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
            self.waiting.fair.charge_output(request)
            self.waiting.leave(request)
            if request.spec.params.max_tokens:  # else it says nothing of the length of answers
                self.output_lengths.observe(len(request.output_ids))
            if self.speculation is not None:
                self.speculation.ended(request)
            self._release(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED

    def preempt(self, request: Request) -> None:
        """A running request waits again, and is computed again from what the prefix cache keeps of it."""
        self.running.remove(request)
        self._release(request)
        request.state, request.prefix_is_coming = RequestState.WAITING, None
        self.waiting.add(request, again=True, prepares=request.awaits_mask)
        self.num_preemptions += 1

    def undo(self, requests: Iterable[Request]) -> None:
        """The last step has failed, in which these requests had chunks. A prompt that it would have ended is served by
        turns again, and who took blocks that it should have written computes them; others go on where they were.
        """
        unwritten = self.prefix_cache.drop_unwritten()
        for request in requests:
            ends_prompt = request.num_pending > 1 and request not in self.waiting.begun
            if ends_prompt or not unwritten.isdisjoint(request.blocks):
                self.preempt(request)

    def next_deadline(self) -> float:
        """Return when `next` must be called although nothing happens, in seconds of the clock, or infinity."""
        return min(self._targets.next_deadline(), self._limits.next_deadline())

    def next(self) -> SchedulerOutput:
        """Return the chunks of the next step, and the requests that will not run."""
        self.prefix_cache.step_begins()
        changed = self._poll()
        for request in self.running:
            self.waiting.fair.charge_output(request)
        one = self.waiting.gives_place(self.running, is_full=len(self.running) >= self._max_num_seqs)
        if one is not None:
            self.preempt(one)
        self._background.begin_step(is_paced=bool(self._num_background) and self._has_foreground())
        budget = StepBudget(self.step_time, max_tokens=self._max_tokens, itl_slo_s=self._itl_slo_s)
        left_out = self._background.left_out(self._can_decode()) if self._num_background else ()
        chunks, failed = self._decode(budget, left_out), Failures()
        if self.speculation is not None:
            self._guess(self.speculation, chunks, budget)
        self._admission.stepped()
        for request, error in chain.from_iterable(late() for late in (self._targets.refuse_late, self._limits.overdue)):
            self.waiting.refuse(request)
            failed.append((request, error))
        failed += self.waiting.admit_loaded()
        self._compute_prompts(budget, chunks, failed)
        self._admission.place_one_ahead(self.waiting, len(self.running))
        # The second poll loads what was evicted and is wanted again, before the engine sleeps.
        changed |= self._admission.emptied | self._poll()
        changed |= bool(left_out) and not chunks  # the row that should have joined has been preempted
        return SchedulerOutput(chunks, failed, changed or self._adapter_manager.has_changed, budget.work)

    def moved(self, moves: Mapping[int, int]) -> None:
        """KV blocks have been copied from the keys of `moves` to its values, also in the allocator's books."""
        self.kv_cache.moved((*self.running, *self.waiting), moves)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _poll(self) -> bool:
        """Take adapters and prefixes that have come; True if some have."""
        at_once = not self.running
        fetched = self.kv_cache.poll(at_once=at_once)
        for request in fetched:
            self.waiting.has_prefix(request)
        return self._adapter_manager.poll(at_once=at_once) or bool(fetched)

    def _has_foreground(self) -> bool:
        """True if the first that runs, or the next in the queue, is not in the background."""
        runs = bool(self.running) and not self.running[0].is_background
        return runs or self.waiting.fair.best_priority < BACKGROUND_PRIORITY

    def _can_decode(self) -> list[Request]:
        rows = (r for r in self.running if r not in self.waiting.begun)
        return [r for r in rows if not (r.ends_in_flight or r.awaits_mask)]

    def _decode(self, budget: StepBudget, left_out: Collection[Request]) -> list[Chunk]:
        """The next token of each request that decodes, but for those left out, best priority and oldest first."""
        chunks, num_others = list[Chunk](), len(self.running) - len(self.waiting.begun)
        now = oldest = self._clock()
        for request in list(self.running):
            if request.state is not RequestState.RUNNING:  # preempted for an earlier one
                continue
            if request.ends_in_flight or request.awaits_mask or request in left_out:
                num_others -= 1
            elif request not in self.waiting.begun and self._grow(request):
                num_others -= 1
                request.decoding_since = min(request.decoding_since, now)
                oldest = min(oldest, request.decoding_since)
                n = budget.decode(request.num_computed, request.num_pending, num_others)
                chunks.append(Chunk(request, request.num_computed, n))
        prompts: Iterable[Request] = chain(self.waiting.begun, self.waiting)
        num_prompts = len(self.waiting.begun) + len(self.waiting)
        if self._background.is_paced:
            prompts = own = [r for r in prompts if not r.is_background]
            num_prompts = len(own)
        seconds = map(self._estimate.prompt_seconds, prompts)
        budget.in_burst = self._burst.goes_on(now - oldest, len(chunks), num_prompts, seconds)
        return chunks

    def _guess(self, speculation: Speculation, chunks: list[Chunk], budget: StepBudget) -> None:
        """Add guessed tokens to the chunks of requests that decode; prompts keep the least that they are given.

        No request is preempted for them: they take blocks only where one is left for each request that runs.
        """
        own = [c for c in chunks if not c.request.is_background] if self._background.is_paced else chunks  # the first
        for i, guesses in speculation.guesses(own, budget.work, budget.num_left - MIN_CHUNK):
            request = chunks[i].request
            if self._allocator.num_free + self.prefix_cache.num_idle > len(self.running):
                self.kv_cache.extend(request, request.num_tokens + len(guesses))
            room = len(request.blocks) * self._allocator.geometry.block_tokens - request.num_tokens
            if found := tuple(guesses[:room]):
                budget.guess(len(found))
                chunks[i] = Chunk(request, chunks[i].start, chunks[i].num_tokens + len(found), found)

    def _compute_prompts(self, budget: StepBudget, chunks: list[Chunk], failed: Failures) -> None:
        """Prompts by turns, until the step is full. Adds to `chunks` and `failed`."""
        is_blocked, of_background = False, partial(self._background.fit, budget)
        while (request := self.waiting.pick_begun() if is_blocked else self.waiting.pick()) is not None:
            fit = of_background if request.is_background else budget.fit
            if request.state is RequestState.WAITING:
                if not fit(0, request.num_pending):
                    return
                is_blocked = not self._admit(request, failed)
                if request.state is RequestState.WAITING:
                    continue
            else:
                self.kv_cache.take_more(request)
            n = fit(request.num_computed, request.num_pending, scored=request.needs_prompt_logits)
            if not n:
                return
            if not is_blocked:
                self.waiting.fair.serve(request)
            self.waiting.fair.charge_prompt(request, request.num_computed + n)
            if n > 1 and not request.num_in_flight:  # a step of single tokens may be computed in parts
                self.kv_cache.share(request, n)
            self.kv_cache.free_behind_window(request)
            chunk = Chunk(request, request.num_computed, n)
            chunks.append(chunk)
            budget.add(chunk)
            if request.is_background:
                self._background.add(chunk)
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
            request.state = RequestState.RUNNING
            self.waiting.begin(request)
            insort(self.running, request, key=rank_in_batch)  # a preempted request keeps its rank
            request.start_by = math.inf
            if not request.token_weight:
                request.token_weight = self._token_weight(request)
                request.charged_until = request.num_computed
        elif self.waiting.has_failed(request):
            failed += self.waiting.fail(request)
        elif request.adapter is not None and self._adapter_manager.tier(request.adapter).is_on_its_way:
            return True  # its rows are on their way, which nobody else waits for
        elif request.prefix_is_coming:
            return True
        elif not fits or (not self.running and not self._admission.empty_pool()):
            self.waiting.refuse(request)
            failed.append((request, ContextLengthExceeded(self._admission.why_not(request), "max_tokens")))
        else:
            self.waiting.crowd_out(request, of_blocks=True)
            return False
        return True

    def _grow(self, request: Request) -> bool:
        """Allocate a block for the next token if needed; False if `request` itself had to be preempted for it."""
        self.kv_cache.share(request)
        self.kv_cache.free_behind_window(request)
        while not self.kv_cache.extend(request, request.num_tokens):
            self.preempt(last := self.running[-1])
            if last is request:
                return False
        return True

    def _release(self, request: Request) -> None:
        self.kv_cache.share(request)
        self.kv_cache.release(request)
        if request.adapter is not None:
            self._adapter_manager.release(request.adapter)
        self._admission.released()

    def _seconds_to_first_token(self, request: Request) -> float:
        others = chain(self.waiting, self.waiting.begun)
        seconds, mean_output = self._estimate.prompt_seconds, self.output_lengths.mean
        ahead = ahead_of(request, others, self.waiting.fair, seconds, mean_output)
        running = self.running
        if self._num_background and not request.is_background:  # the others give place, and wait
            running = [r for r in running if not r.is_background]
        decoding = [r.num_tokens for r in running if r not in self.waiting.begun]
        ahead, step = ahead.plus(self._backlog(request)), StepWork(1, len(decoding), sum(decoding))
        return self._estimate.seconds(ahead, step, num_running=len(running), mean_output=mean_output)

    def _backlog(self, request: Request) -> Backlog:
        return Backlog(1, request.num_pending, self._estimate.prompt_seconds(request))
