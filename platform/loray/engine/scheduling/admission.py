"""Whether a request may start: its adapter is pinned, and the pool has blocks for its tokens and for what follows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import islice
from typing import Generic

from loray.engine.memory.blocks import BlockAllocator
from loray.engine.request import Request
from loray.engine.residency.residency import Residency
from loray.engine.residency.table import P, R, Tier
from loray.engine.scheduling.blocks import RequestBlocks
from loray.engine.scheduling.growth import Growth, OutputLengths, blocks_wanted

# Room for all that is expected would end preemption but leave places empty. Three quarters of it are fastest or nearly
# so in every load that was simulated, see docs/decisions/0003-steps-by-time.md.
_SHARE = 0.75
_LOOKED_AHEAD = 32  # waiting requests
_WATERMARK = 0.01  # of the pool, for outputs that are longer than expected


class Admission(Generic[P, R]):
    """`adapter_blocks`: the most blocks that a request's adapter takes; 0: not known. `ahead`: adapters may be placed
    before their requests' turn.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        residency: Residency[P, R],
        blocks: RequestBlocks,
        lengths: OutputLengths,
        adapter_blocks: Callable[[Request], int],
        *,
        ahead: bool = False,
    ) -> None:
        self._places_ahead = ahead
        self._allocator, self._residency, self._blocks = allocator, residency, blocks
        self._lengths, self._adapter_blocks = lengths, adapter_blocks
        self._short: Request | None = None  # for which blocks were short; nothing has been released since
        self._growing: list[Growth] | None = None  # those that run, in this step
        self.emptied = False  # the pool, in this step

    def fits_at_all(self, request: Request) -> bool:
        needed = self._adapter_blocks(request) + self._allocator.geometry.blocks_for_tokens(request.max_tokens)
        return needed <= self._allocator.geometry.num_blocks

    def why_not(self, request: Request) -> str:
        """For a request that does not fit at all."""
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
        self._blocks.take_cached(request)  # first: making room for the rest could evict these blocks
        if running and not self._lasts(request, running):
            self._blocks.release(request)
            return False
        if ref is not None:
            while self._residency.acquire(ref) is None:
                missing = self._adapter_blocks(request) - self._allocator.num_free
                tier = self._residency.table.tier(ref)
                if tier is not Tier.HOST or not self._blocks.make_room(max(1, missing)):
                    if tier is Tier.LOADING:  # its rows are on their way; blocks are not short
                        self._short = None
                    self._blocks.release(request)
                    return False
        if not self._blocks.extend(request, request.num_tokens):
            self._blocks.release(request)
            if ref is not None:
                self._residency.release(ref)
            return False
        self._blocks.count_cached(request)
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
            if ref is None or self._residency.table.tier(ref) is not Tier.HOST:
                continue
            if 0 < self._adapter_blocks(request) <= most and self._residency.place_ahead(ref):
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
        while self._residency.evict_one():
            self.emptied = True
        return self.emptied

    def _lasts(self, request: Request, running: Collection[Request]) -> bool:
        """True if the pool suffices until `request` and those that run have ended."""
        geometry = self._allocator.geometry
        if self._growing is None:
            self._growing = [self._growth(r) for r in running]
        growing = [*self._growing, self._growth(request, num_shared_blocks=len(request.blocks))]
        wanted = blocks_wanted(growing, geometry.block_tokens) + int(_WATERMARK * geometry.num_blocks)
        if request.adapter is not None and self._residency.table.tier(request.adapter) is not Tier.POOL:
            wanted += self._adapter_blocks(request)
        missing = wanted - self._allocator.num_free - self._blocks.prefix_cache.num_idle
        return missing <= 0 or self._idle_adapters_have(missing)

    def _idle_adapters_have(self, num_blocks: float) -> bool:
        table = self._residency.table
        for digest in table.idle:
            num_blocks -= self._residency.size(table.resident(table.entries[digest].ref))
            if num_blocks <= 0:
                return True
        return False

    def _growth(self, request: Request, num_shared_blocks: int | None = None) -> Growth:
        num_output = len(request.output_ids)
        if num_shared_blocks is None:
            num_shared_blocks = (request.num_cached_tokens or 0) // self._allocator.geometry.block_tokens
        remaining = min(request.spec.params.max_tokens - num_output, self._lengths.remaining(num_output))
        return Growth(request.num_tokens, len(request.blocks), num_shared_blocks, _SHARE * remaining)
