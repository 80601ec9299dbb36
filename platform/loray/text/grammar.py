"""Checks what an answer must match before an engine sees it: beside the event loop, and each constraint once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from loray.bases.grammar import GrammarCompiler
from loray.bases.registry import BaseModel
from loray.errors import RequestError
from loray.spec import Constraint

_MAX_KNOWN = 512  # constraints that were checked, the last used of which are remembered
_NUM_THREADS = 2


class GrammarChecker:
    """Compiles constraints as engines do. For one event loop."""

    def __init__(self, base: BaseModel) -> None:
        self._compiler = GrammarCompiler(base)
        self._compiler.warm()
        self._refusals: OrderedDict[Constraint, Future[str | None]] = OrderedDict()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")

    async def check(self, constraint: Constraint, param: str | None = None) -> None:
        """RequestError, which names the field `param`, where an engine cannot enforce the constraint, or it exceeds a
        limit.
        """
        future = self._refusals.get(constraint)
        if future is None:
            future = self._refusals[constraint] = self._threads.submit(self._refusal, constraint)
            if len(self._refusals) > _MAX_KNOWN:
                self._refusals.popitem(last=False)
        self._refusals.move_to_end(constraint)
        refusal = future.result() if future.done() else await asyncio.shield(asyncio.wrap_future(future))
        if refusal is not None:
            raise RequestError(refusal, param)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _refusal(self, constraint: Constraint) -> str | None:
        try:
            self._compiler.compile(constraint)
        except RequestError as e:
            return str(e)
        return None
