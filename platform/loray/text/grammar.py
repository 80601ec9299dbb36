"""Checks what an answer must match before an engine sees it: beside the event loop, and each constraint once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from loray.bases.grammar import GrammarCompiler, ignored_keywords
from loray.bases.registry import BaseModel
from loray.errors import RequestError
from loray.spec import Constraint

_MAX_KNOWN = 512  # constraints that were checked, the last used of which are remembered
_NUM_THREADS = 2


class _Found(NamedTuple):
    """Why a constraint is refused, or what of it is ignored."""

    refusal: str | None
    ignored: tuple[str, ...] = ()


class GrammarChecker:
    """Compiles constraints as engines do. For one event loop."""

    def __init__(self, base: BaseModel) -> None:
        self._compiler = GrammarCompiler(base)
        self._compiler.warm()
        self._found: OrderedDict[Constraint, Future[_Found]] = OrderedDict()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")

    async def check(self, constraint: Constraint, param: str | None = None) -> tuple[str, ...]:
        """The keywords of a lenient schema that are ignored. Raises RequestError, which names the field `param`, where
        an engine cannot enforce the constraint, or it exceeds a limit.
        """
        future = self._found.get(constraint)
        if future is None:
            future = self._found[constraint] = self._threads.submit(self._compiled, constraint)
            if len(self._found) > _MAX_KNOWN:
                self._found.popitem(last=False)
        self._found.move_to_end(constraint)
        found = future.result() if future.done() else await asyncio.shield(asyncio.wrap_future(future))
        if found.refusal is not None:
            raise RequestError(found.refusal, param)
        return found.ignored

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compiled(self, constraint: Constraint) -> _Found:
        try:
            return _Found(None, ignored_keywords(self._compiler.compile(constraint)))
        except RequestError as e:
            return _Found(str(e))
