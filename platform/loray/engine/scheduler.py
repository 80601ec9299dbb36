"""What runs in the next step: chunked prefill and decode in one token budget.

Requests are admitted in order of arrival. One that waits for its adapter is passed over and blocks nobody; one that
waits for blocks holds back those behind it, so that it cannot starve. A running request never fails for want of
memory: idle adapters go first, then the youngest running request is preempted and computed again later.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from loray.engine.blocks import BlockAllocator
from loray.engine.request import Request, State
from loray.engine.residency import Residency, Tier
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
    """`landed`: an adapter came in, failed or was thrown out, so that planning again may give more."""

    chunks: list[Chunk]
    failed: list[tuple[Request, Exception]]
    landed: bool


class Scheduler:
    """The one owner of the queues and of which request holds which KV blocks and pins which adapter."""

    def __init__(
        self,
        *,
        allocator: BlockAllocator,
        residency: Residency[Any, Any],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_queued: int,
        adapter_blocks: Callable[[Request], int],
    ) -> None:
        self._allocator = allocator
        self._residency = residency
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._max_queued = max_queued
        self._adapter_blocks = adapter_blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._emptied = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        if len(self.waiting) >= self._max_queued:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already", 1.0)
        self.waiting.append(request)
        if request.adapter is not None:
            self._residency.want(request.adapter)

    def remove(self, request: Request) -> None:
        """Finished, cancelled or failed: everything that the request holds is given back."""
        if request.state is State.RUNNING:
            self.running.remove(request)
            self._give_back(request)
        elif request.state is State.WAITING:
            self.waiting.remove(request)
            if request.adapter is not None:
                self._residency.unwant(request.adapter)
        request.state = State.FINISHED

    def next(self) -> Plan:
        """The chunks of the next step, oldest requests first, and the requests that can never run."""
        landed = self._residency.poll()
        chunks: list[Chunk] = []
        budget = self._budget
        for request in list(self.running):
            if request.state is not State.RUNNING:  # preempted by an older one above
                continue
            n = min(request.num_pending, budget)
            if n and self._grow(request, request.num_computed + n):
                chunks.append(Chunk(request, request.num_computed, n))
                budget -= n
        self._emptied = False
        failed = self._admit(chunks, budget)
        landed |= self._emptied
        landed |= self._residency.poll()  # what was evicted and is wanted must fly again before the engine sleeps
        return Plan(chunks, failed, landed)

    def _admit(self, chunks: list[Chunk], budget: int) -> list[tuple[Request, Exception]]:
        failed: list[tuple[Request, Exception]] = []
        for request in list(self.waiting):
            ref = request.adapter
            tier = Tier.POOL if ref is None else self._residency.tier(ref)
            if tier is Tier.FAILED:
                assert ref is not None
                failed.append((request, self._residency.error(ref)))
                continue
            if not budget or len(self.running) >= self._max_num_seqs:
                continue
            if tier is Tier.LOADING:
                continue
            if not self._fits_at_all(request):
                failed.append((request, ContextLengthExceeded(self._too_large(request), "max_tokens")))
                continue
            if not self._start(request):
                if ref is not None and self._residency.tier(ref) is Tier.FAILED:
                    failed.append((request, self._residency.error(ref)))
                elif not self.running and not self._empty_pool():
                    failed.append((request, ContextLengthExceeded(self._too_large(request), "max_tokens")))
                else:
                    budget = 0  # it waits for blocks: nobody behind it may take them
                continue
            n = min(request.num_pending, budget)
            chunks.append(Chunk(request, 0, n))
            budget -= n
        return failed

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
        """The adapter, pinned, then blocks for every token known so far; all or nothing."""
        ref = request.adapter
        if ref is not None:
            while self._residency.acquire(ref) is None:
                if self._residency.tier(ref) is not Tier.HOST or not self._residency.evict_one():
                    return False
        blocks = self._allocate(self._allocator.geometry.blocks_for_tokens(request.num_tokens))
        if blocks is None:
            if ref is not None:
                self._residency.release(ref)
            return False
        if ref is not None:
            self._residency.unwant(ref)
        request.blocks = blocks
        request.state = State.RUNNING
        self.waiting.remove(request)
        insort(self.running, request, key=lambda r: r.arrival)  # one that was preempted is no younger for it
        return True

    def _empty_pool(self) -> bool:
        """With nothing running, throw every adapter out: an own one that fills the gaps of others takes more blocks
        than it needs, and comes back in one piece. False if there was none: then blocks will never suffice.
        """
        self._emptied = self._residency.evict_one()
        while self._residency.evict_one():
            pass
        return self._emptied

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Blocks up to `num_tokens`; False if `request` itself had to be preempted for them."""
        missing = self._allocator.geometry.blocks_for_tokens(num_tokens) - len(request.blocks)
        if missing <= 0:
            return True
        while (blocks := self._allocate(missing)) is None:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        request.blocks.extend(blocks)
        return True

    def _allocate(self, num_blocks: int) -> list[int] | None:
        while (blocks := self._allocator.allocate_kv(num_blocks)) is None:
            if not self._residency.evict_one():
                return None
        return blocks

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_back(request)
        request.state = State.WAITING
        request.num_computed = 0
        self.waiting.appendleft(request)
        if request.adapter is not None:
            self._residency.want(request.adapter, again=True)
        self.num_preemptions += 1

    def _give_back(self, request: Request) -> None:
        self._allocator.release_kv(request.blocks)
        request.blocks = []
        if request.adapter is not None:
            self._residency.release(request.adapter)
