"""The requests that wait: for their constraint or their adapter, which does not block others, or for their turn. And
the running ones whose prompt is partly computed, since they are served by turns with those that wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from enum import Enum
from typing import Generic

from loray.engine.request import Request
from loray.engine.residency.residency import Residency
from loray.engine.residency.table import P, R, Tier
from loray.engine.scheduling.fairness import FairQueue, rank_in_batch, rank_in_queue


class _State(Enum):
    PREPARING = "preparing"  # its constraint is compiled, or its mask computed
    LOADING = "loading"
    READY = "ready"
    REFUSED = "refused"  # its error has been returned; the caller removes it


class WaitingRequests(Generic[P, R]):
    """A request enters a FairQueue when it has a mask for its constraint and its adapter has been loaded. Before that
    its tenant waits for other things than service, so its counter must not fall behind. It stays there, running, until
    its prompt has been computed.

    `len` and iteration are of the requests that do not run. The only caller of Residency.want and Residency.unwant.
    """

    def __init__(self, residency: Residency[P, R], *, lead: float) -> None:
        self.fair = FairQueue(lead)
        self.begun: dict[Request, None] = {}  # running, and in the queue
        self._residency = residency
        self._states: dict[Request, _State] = {}
        self._by_adapter: dict[str, dict[Request, None]] = {}  # without the refused ones
        self._loading: dict[str, dict[Request, None]] = {}
        self._crowded_out: Request | None = None  # by the last step
        self._entered: dict[str, None] = {}  # adapters in `_loading` that were added since the last `admit_loaded`

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._states)

    def add(self, request: Request, *, again: bool = False, prepares: bool = False) -> None:
        """`again`: it was running before and has been preempted. `prepares`: it cannot run before `prepared`."""
        if again:
            self.leave(request)
        if request.adapter is not None:
            self._residency.want(request.adapter, again=again)
            self._by_adapter.setdefault(request.adapter.digest, {})[request] = None
        if prepares:
            self._states[request] = _State.PREPARING
        else:
            self._enter(request)

    def prepared(self, request: Request) -> None:
        """What a request needs beside its adapter is there. Nothing happens if it runs or has been refused."""
        if self._states.get(request) is _State.PREPARING:
            self._enter(request)

    def remove(self, request: Request) -> None:
        """It was cancelled or refused."""
        self._withdraw(request)
        self._forget(request)

    def begin(self, request: Request) -> None:
        """It runs: `pick` gave `request`, and its adapter is pinned. It stays in the queue until `end_prompt`."""
        self.fair.begin(request)
        self.begun[request] = None
        self._forget(request)

    def end_prompt(self, request: Request) -> None:
        """A running request is computed up to its newest token with the next step, or runs no more."""
        if request in self.begun:
            del self.begun[request]
            self.fair.remove(request)

    def leave(self, request: Request) -> None:
        """A running request runs no more."""
        self.end_prompt(request)
        self.fair.leave(request)

    def refuse(self, request: Request) -> None:
        """It will not run; the engine removes it after it has returned the error. A request that ran but has no token
        yet is refunded.
        """
        self._withdraw(request)
        if request.num_input_charged and not request.num_generated:
            self.fair.refund(request, num_input=request.num_input_charged)
        self._discard(self._by_adapter, request)
        self._states[request] = _State.REFUSED

    def admit_loaded(self) -> list[tuple[Request, Exception]]:
        """Queue the requests whose adapter has been loaded; refuse and return those whose adapter failed."""
        failed: list[tuple[Request, Exception]] = []
        entered, self._entered = self._entered, {}
        for digest in {**entered, **dict.fromkeys(self._residency.take_changed())}:
            loading = self._loading.get(digest)
            if not loading:
                continue
            first = next(iter(loading))
            tier = self._tier(first)
            if tier is Tier.FAILED:
                failed += self.fail(first)
            elif tier is not Tier.LOADING:
                for request in self._loading.pop(digest):
                    self._ready(request)
        return failed

    def has_failed(self, request: Request) -> bool:
        """True if its adapter could not be loaded or placed."""
        return self._tier(request) is Tier.FAILED

    def fail(self, request: Request) -> list[tuple[Request, Exception]]:
        """Refuse all requests that wait for the adapter of `request`, which could not be loaded or placed."""
        ref = request.adapter
        assert ref is not None
        same = list(self._by_adapter[ref.digest])
        for r in same:
            self.refuse(r)
        return [(r, self._residency.table.error(ref)) for r in same]

    def pick(self) -> Request | None:
        """The next request, see FairQueue.pick; it may have begun. Its adapter may have failed since it was loaded."""
        while (request := self.fair.pick(self._is_resident)) is not None:
            if request in self.begun or self._tier(request) is not Tier.LOADING:
                break
            self._withdraw(request)  # its adapter was dropped and is loaded again
            self._enter(request)
        return request

    def pick_begun(self) -> Request | None:
        """The next one of those that have begun."""
        return min(self.begun, key=self.fair.key, default=None)

    def crowd_out(self, request: Request) -> None:
        """`request` is next, and finds no place in the batch."""
        self._crowded_out = request

    def gives_place(self, running: Collection[Request]) -> Request | None:
        """Which of a full batch is preempted for the request that the last step crowded out, so that no tenant keeps
        all places for as long as its answers are. The last one of the tenant that has most places, if that has at least
        two more than the request's tenant; never a more urgent one.
        """
        request, self._crowded_out = self._crowded_out, None
        if request is None or not self.is_ready(request):
            return None
        num_running = self.fair.num_running
        most = num_running(request.tenant) + 1
        others = (r for r in running if r.priority >= request.priority and num_running(r.tenant) > most)
        return max(others, key=lambda r: (num_running(r.tenant), *rank_in_batch(r)), default=None)

    def gives_way(self, request: Request, others: Collection[Request]) -> Request | None:
        """Which of a full queue is refused for a new request: the last one of the tenant that has most there, if that
        has at least two more than the request's tenant; neither a more urgent nor a begun one. `others` have given way
        already. O(queue).
        """
        queued = [r for r in self._states if self.is_queued(r) and r not in others]
        number = Counter(r.tenant for r in queued)
        most = number[request.tenant] + 1
        able = (r for r in queued if number[r.tenant] > most and r.priority >= request.priority)
        able = (r for r in able if not r.is_continued and not r.num_generated)
        return max(able, key=lambda r: (number[r.tenant], *rank_in_queue(r)), default=None)

    def is_ready(self, request: Request) -> bool:
        """Whether it waits for its turn alone."""
        return self._states.get(request) is _State.READY

    def is_preparing(self, request: Request) -> bool:
        return self._states.get(request) is _State.PREPARING

    def is_queued(self, request: Request) -> bool:
        """Whether it has a place in the queue: it waits for its turn, or will when it is prepared."""
        return self.is_ready(request) or self.is_preparing(request)

    @property
    def num_loading(self) -> int:
        """Requests that wait for an adapter to be loaded."""
        return sum(map(len, self._loading.values()))

    def is_loading(self, request: Request) -> bool:
        return self._states.get(request) is _State.LOADING

    def loading(self, digest: str) -> Collection[Request]:
        """The requests that wait for this adapter to be loaded."""
        return self._loading.get(digest, ())

    def check_integrity(self) -> None:
        """AssertionError unless every index holds exactly its requests, and those that wait for an adapter will be
        looked at when it has moved.
        """
        in_state = {state: {r for r, s in self._states.items() if s is state} for state in _State}
        assert self.fair.requests() == in_state[_State.READY] | self.begun.keys()
        others = self._states.keys() - in_state[_State.REFUSED]
        for index, expected in (
            (self._loading, in_state[_State.LOADING]),
            (self._by_adapter, {r for r in others if r.adapter is not None}),
        ):
            assert {r for same in index.values() for r in same} == expected
            assert all(same for same in index.values())
            assert all(r.adapter is not None and r.adapter.digest == d for d, same in index.items() for r in same)
        for digest, requests in self._loading.items():
            is_on_its_way = self._tier(next(iter(requests))) is Tier.LOADING
            assert is_on_its_way or digest in self._entered or self._residency.table.has_changed, (
                "who waits is not told"
            )

    # -- private ------------------------------------------------------------------------------------------------------

    def _tier(self, request: Request) -> Tier:
        return Tier.POOL if request.adapter is None else self._residency.table.tier(request.adapter)

    def _is_resident(self, request: Request) -> bool:
        return self._tier(request) is Tier.POOL

    def _enter(self, request: Request) -> None:
        if request.adapter is not None and self._tier(request) in (Tier.LOADING, Tier.FAILED):
            self._states[request] = _State.LOADING
            self._loading.setdefault(request.adapter.digest, {})[request] = None
            self._entered[request.adapter.digest] = None
        else:
            self._ready(request)

    def _ready(self, request: Request) -> None:
        self._states[request] = _State.READY
        self.fair.push(request)

    def _withdraw(self, request: Request) -> None:
        state = self._states[request]
        if state is _State.READY:
            self.fair.remove(request)
        elif state is _State.LOADING:
            self._discard(self._loading, request)

    def _discard(self, by_adapter: dict[str, dict[Request, None]], request: Request) -> None:
        if request.adapter is not None:
            same = by_adapter.get(request.adapter.digest, {})
            same.pop(request, None)
            if not same:
                by_adapter.pop(request.adapter.digest, None)

    def _forget(self, request: Request) -> None:
        del self._states[request]
        self._discard(self._by_adapter, request)
        if request.adapter is not None:
            self._residency.unwant(request.adapter)
