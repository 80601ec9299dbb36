"""What runs in the next step: chunked prefill and decode in one token budget.

Requests are admitted by priority and fairness (`fairness`). A request that waits for its adapter does not block others.
A request that waits for blocks blocks those behind it, so that it cannot starve. A running request never fails because
memory is short: idle adapters are evicted first; then the running request of the lowest priority, the youngest of
several, is preempted and computed again later. A waiting request that cannot have its first token in time is refused
(`overload`).
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple

from loray.engine.memory.blocks import BlockAllocator
from loray.engine.memory.prefix_cache import PrefixCache
from loray.engine.request import Request, State
from loray.engine.residency.residency import Residency
from loray.engine.residency.table import P, R, Tier
from loray.engine.scheduling.blocks import RequestBlocks
from loray.engine.scheduling.fairness import rank_in_queue
from loray.engine.scheduling.overload import FirstTokenEstimate, FirstTokenTargets
from loray.engine.scheduling.waiting import WaitingRequests
from loray.errors import ContextLengthExceeded, Overloaded


class Chunk(NamedTuple):
    """Compute tokens [start, start + num_tokens) of `request` in this step."""

    request: Request
    start: int
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """True where the chunk reaches the request's newest token, so that its logits are sampled."""
        return self.start + self.num_tokens == self.request.num_tokens


class Plan(NamedTuple):
    """`failed` will not run. `residency_changed`: an adapter was loaded, failed or was evicted: plan again at once."""

    chunks: list[Chunk]
    failed: list[tuple[Request, Exception]]
    residency_changed: bool


class Scheduler(Generic[P, R]):
    """The only owner of the queues, and of which request holds which KV blocks and pins which adapter.

    adapter_blocks  the most blocks that a request's adapter takes; 0: not known
    token_weight    of an admitted request's adapter; see fairness.token_weight
    ttft_slo_s      for requests without one of their own; None: they may wait forever
    clock           seconds
    """

    def __init__(
        self,
        *,
        allocator: BlockAllocator,
        residency: Residency[P, R],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_queued: int,
        adapter_blocks: Callable[[Request], int],
        token_weight: Callable[[Request], float] = lambda request: 1.0,
        ttft_slo_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        compact: Callable[[int], bool] = lambda num_blocks: False,
        enable_prefix_caching: bool = True,
    ) -> None:
        self._allocator = allocator
        self._residency = residency
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._max_queued = max_queued
        self._adapter_blocks = adapter_blocks
        self._estimate = FirstTokenEstimate(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        token_seconds = self._estimate.token_seconds
        self._blocks = RequestBlocks(
            allocator, residency, compact, token_seconds, enable_prefix_caching=enable_prefix_caching
        )
        self._token_weight = token_weight
        self._targets = FirstTokenTargets(
            ttft_slo_s=ttft_slo_s,
            estimate=self._seconds_to_first_token,
            alone=lambda request: self._estimate.seconds(request.num_tokens),
            clock=clock,
        )
        self.waiting = WaitingRequests(residency, lead=max_num_batched_tokens)
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._emptied = False

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
        """Queue a request. Overloaded if too many requests wait, or if its first token is expected too late."""
        if len(self.waiting) >= self._max_queued:
            retry_after = self._targets.retry_after_s(request, self._seconds_to_first_token(request))
            raise Overloaded(f"{len(self.waiting)} requests are waiting already", retry_after)
        self._targets.accept(request)
        self.waiting.add(request)

    def remove(self, request: Request) -> None:
        """The request is finished, cancelled or failed: release everything that it holds."""
        if request.state is State.RUNNING:
            self.running.remove(request)
            self._charge_output(request)
            self.waiting.fair.leave(request)
            self._estimate.observe_end(len(request.output_ids))
            self._release(request)
        elif request.state is State.WAITING:
            self.waiting.remove(request)
        request.state = State.FINISHED

    def first_step_seconds(self, digest: str) -> float:
        """Estimate for the step that computes the longest waiting prompt of this adapter. 0: not known."""
        num_tokens = max((r.num_pending for r in self.waiting.loading(digest)), default=0)
        return self._estimate.seconds(min(num_tokens, self._budget)) if num_tokens else 0.0

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """The duration of the last step."""
        self._estimate.observe_step(num_tokens, seconds)

    def next(self) -> Plan:
        """The chunks of the next step, best priority and oldest first, and the requests that will not run."""
        changed = self._residency.poll()
        chunks: list[Chunk] = []
        budget = self._budget
        failed = self._fail_running()
        for request in self.running:
            self._charge_output(request)
        decoding = sum(request.num_pending == 1 for request in self.running)  # still to come in this loop
        for request in list(self.running):
            decodes = request.num_pending == 1
            if request.state is not State.RUNNING:  # preempted for an earlier one
                continue
            decoding -= decodes
            if request.adapter is not None and self._residency.table.tier(request.adapter) is not Tier.POOL:
                self._preempt(request)  # its adapter is late: a step has waited for the rest in vain
                continue
            n = min(request.num_pending, budget if decodes else max(0, budget - decoding))
            if n and self._grow(request, request.num_computed + n):
                chunks.append(Chunk(request, request.num_computed, n))
                budget -= n
        self._emptied = False
        late = self._targets.refuse_late(self.waiting)
        for request, _ in late:
            self.waiting.refuse(request)
        failed += late + self.waiting.admit_loaded() + self._admit(chunks, budget)
        changed |= self._emptied
        changed |= self._residency.poll()  # loads evicted adapters that are wanted again, before the engine sleeps
        return Plan(chunks, failed, changed)

    def _fail_running(self) -> list[tuple[Request, Exception]]:
        """Stop the running requests whose partial adapter could not be loaded completely."""
        failed: list[tuple[Request, Exception]] = []
        for request in list(self.running):
            if request.adapter is not None and self._residency.table.tier(request.adapter) is Tier.FAILED:
                failed.append((request, self._residency.table.error(request.adapter)))
                self.waiting.add(request, again=True)
                self.waiting.refuse(request)
                self.running.remove(request)
                self._release(request)
                request.state = State.WAITING
        return failed

    def _admit(self, chunks: list[Chunk], budget: int) -> list[tuple[Request, Exception]]:
        failed: list[tuple[Request, Exception]] = []
        while budget and len(self.running) < self._max_num_seqs:
            request = self.waiting.pick()
            if request is None:
                break
            if not self.waiting.has_failed(request) and self._fits_at_all(request) and self._start(request):
                self._charge_admission(request)
                n = min(request.num_pending, budget)
                chunks.append(Chunk(request, request.num_computed, n))
                budget -= n
            elif self.waiting.has_failed(request):
                failed += self.waiting.fail(request)
            elif not self._fits_at_all(request) or (not self.running and not self._empty_pool()):
                self.waiting.refuse(request)
                failed.append((request, ContextLengthExceeded(self._too_large(request), "max_tokens")))
            else:
                break  # it waits for blocks: the requests behind it may not take them
        return failed

    def _charge_admission(self, request: Request) -> None:
        """Charge the part of its prompt that is not in the prefix cache, once: a preemption is not charged."""
        request.start_by = math.inf
        if not request.token_weight:
            request.token_weight = self._token_weight(request)
            request.num_input_charged = request.num_prompt_tokens - request.num_computed
            self.waiting.fair.charge(request, num_input=request.num_input_charged)

    def _charge_output(self, request: Request) -> None:
        num_output = len(request.output_ids) - request.num_output_charged
        if num_output:
            self.waiting.fair.charge(request, num_output=num_output)
            request.num_output_charged += num_output

    def _seconds_to_first_token(self, request: Request) -> float:
        ahead = self.waiting.ahead_of(request, self._estimate.mean_output)
        num_tokens = ahead.num_tokens + request.num_tokens + sum(r.num_pending for r in self.running)
        return self._estimate.seconds(num_tokens, num_running=len(self.running), num_ahead=ahead.num_requests)

    def _fits_at_all(self, request: Request) -> bool:
        needed = self._adapter_blocks(request) + self._allocator.geometry.blocks_for_tokens(request.max_tokens)
        return needed <= self._allocator.geometry.num_blocks

    def _too_large(self, request: Request) -> str:
        geometry = self._allocator.geometry
        return (
            f"{request.max_tokens} tokens and their adapter need "
            f"{geometry.blocks_for_tokens(request.max_tokens)} + {self._adapter_blocks(request)} blocks, the pool has "
            f"{geometry.num_blocks}; ask for fewer tokens or serve with a larger pool_bytes"
        )

    def _start(self, request: Request) -> bool:
        """Pin its adapter and allocate blocks for all tokens known so far; all or nothing."""
        ref = request.adapter
        self._blocks.take_cached(request)  # first: making room for the rest could evict these blocks
        if ref is not None:
            while self._residency.acquire(ref) is None:
                missing = self._adapter_blocks(request) - self._allocator.num_free
                if self._residency.table.tier(ref) is not Tier.HOST or not self._blocks.make_room(max(1, missing)):
                    self._blocks.release(request)
                    return False
        if not self._blocks.extend(request, request.num_tokens):
            self._blocks.release(request)
            if ref is not None:
                self._residency.release(ref)
            return False
        self._blocks.count_cached(request)
        request.state = State.RUNNING
        self.waiting.take(request)
        insort(self.running, request, key=rank_in_queue)  # a preempted request keeps its rank
        return True

    def moved(self, moves: Mapping[int, int]) -> None:
        """KV blocks have been copied from the keys of `moves` to its values, also in the allocator's books."""
        self._blocks.moved((*self.running, *self.waiting), moves)

    def _empty_pool(self) -> bool:
        """With nothing running, evict every adapter: the request's own may be spread over the gaps of others, and takes
        fewer blocks when it is placed again. False if there was none: then blocks will never suffice.
        """
        self._emptied = self._residency.evict_one()
        while self._residency.evict_one():
            pass
        return self._emptied

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Allocate blocks up to `num_tokens`; False if `request` itself had to be preempted for them."""
        self._blocks.share(request)
        while not self._blocks.extend(request, num_tokens):
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.state = State.WAITING
        self.waiting.add(request, again=True)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self._blocks.share(request)
        self._blocks.release(request)
        if request.adapter is not None:
            self._residency.release(request.adapter)
