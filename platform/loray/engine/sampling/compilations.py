"""Constraints that are compiled in threads, for requests that wait for them.

The tenants with constraints that wait are served by turns, so that one with many holds up itself. What nobody waits for
any more is not compiled, what takes too long fails its requests, and only what was compiled is kept.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from loray.engine.request import Request
from loray.errors import LorayError, Overloaded, RequestError
from loray.spec import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher

_NUM_THREADS = 2
_MAX_KEPT = 64  # constraints, the last used of which are kept
_TIMEOUT_S = 10.0  # for which a request waits


@dataclass(slots=True, eq=False)
class _Compilation:
    """`requests` wait for it. `outcome`: None until it has ended."""

    constraint: Constraint
    requests: dict[Request, None] = field(default_factory=dict)
    has_begun: bool = False
    outcome: LLMatcher | Exception | None = None


class Compilations:
    """Used by one thread, but for `compile`, which its own threads call, as `wake` when something has been compiled.

    compile  raises what a request with that constraint gets
    clock    seconds
    """

    def __init__(
        self,
        compile: Callable[[Constraint], LLMatcher],
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._compile, self._wake, self._clock = compile, wake, clock
        self._known: OrderedDict[Constraint, _Compilation] = OrderedDict()
        self._waiting: dict[Request, tuple[_Compilation, float]] = {}  # with the deadline; the first is the earliest
        self._ended: deque[_Compilation] = deque()  # with requests that may have to be told
        self._queues: dict[str, dict[_Compilation, None]] = {}  # of tenants, in the order of their turns
        self._lock = threading.Lock()  # of the queues, and of what they hold

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")

    @property
    def next_deadline(self) -> float:
        """The time at which the first request has waited for too long, in seconds of the clock; may be infinite."""
        return next((deadline for _, deadline in self._waiting.values()), float("inf"))

    def add(self, request: Request, constraint: Constraint) -> None:
        """Compile the constraint; `take` gives the request when that is done."""
        compilation = self._known.get(constraint)
        if compilation is None:
            compilation = self._known[constraint] = _Compilation(constraint)
            if len(self._known) > _MAX_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(constraint)
        self._waiting[request] = compilation, self._clock() + _TIMEOUT_S
        with self._lock:
            compilation.requests[request] = None
            is_queued = not compilation.has_begun
            if is_queued:
                self._queues.setdefault(request.tenant, {})[compilation] = None
        if is_queued:
            self._threads.submit(self._compile_next)
        elif compilation.outcome is not None:
            self._ended.append(compilation)

    def cancel(self, request: Request) -> None:
        """Let the request wait no more, if it did."""
        found = self._waiting.pop(request, None)
        if found is None:
            return
        compilation = found[0]
        with self._lock:
            del compilation.requests[request]
            if compilation.requests or compilation.has_begun:
                return
            for tenant in [t for t, queue in self._queues.items() if compilation in queue]:
                del self._queues[tenant][compilation]
                if not self._queues[tenant]:
                    del self._queues[tenant]
        self._forget(compilation)

    def take(self) -> Iterator[tuple[Request, LLMatcher | Exception]]:
        """Give the requests whose constraint has been compiled, with its matcher, and those that get an error."""
        while self._ended:
            compilation = self._ended.popleft()
            outcome = compilation.outcome
            assert outcome is not None
            if isinstance(outcome, Exception):
                self._forget(compilation)
            for request in [*compilation.requests]:
                self.cancel(request)
                yield request, outcome
        while self._waiting and self.next_deadline <= self._clock():
            request = next(iter(self._waiting))
            self.cancel(request)
            yield request, Overloaded(f"the constraint was not compiled within {_TIMEOUT_S:g} s", _TIMEOUT_S)

    def close(self) -> None:
        if "_threads" in self.__dict__:
            self._threads.shutdown(cancel_futures=True)

    def _forget(self, compilation: _Compilation) -> None:
        if self._known.get(compilation.constraint) is compilation:
            del self._known[compilation.constraint]

    # -- in the threads -----------------------------------------------------------------------------------------------

    def _compile_next(self) -> None:
        compilation = self._next()
        if compilation is None:
            return
        try:
            compilation.outcome = self._compile(compilation.constraint)
        except LorayError as e:
            compilation.outcome = e
        except BaseException as e:  # noqa: BLE001 - Rust's panics are no Exception
            compilation.outcome = RequestError(f"the constraint fails: {e!r}")
        self._ended.append(compilation)
        self._wake()

    def _next(self) -> _Compilation | None:
        """The first one of the tenant whose turn it is, which is the last one afterwards. None: others have begun all
        that wait.
        """
        with self._lock:
            while self._queues:
                tenant = next(iter(self._queues))
                queue = self._queues.pop(tenant)
                compilation = next(iter(queue))
                del queue[compilation]
                if queue:
                    self._queues[tenant] = queue
                if not compilation.has_begun:  # by the turn of another tenant that has the same
                    compilation.has_begun = True
                    return compilation
        return None
