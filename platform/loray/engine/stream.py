"""The engine behind asyncio: one thread that steps it, one asynchronous stream of text for each request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from loray.engine.detokenizer import Detokenizer
from loray.engine.engine import Engine
from loray.engine.request import TokenLogprobs, TokenOutput
from loray.engine.residency.table import Placement
from loray.engine.stats.stats import EngineStats
from loray.errors import EngineError, RequestError
from loray.spec import AdapterBytes, AdapterRef, Delta, GenerateRequest, TokenLogprob
from loray.telemetry import get_logger
from loray_kernels import release_threads

_log = get_logger(__name__)

_STATS_INTERVAL_S = 0.2


class _Subscriber(NamedTuple):
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[TokenOutput]


class EngineStream:
    """Owns the engine's thread. Safe to call from any event loop."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._texts: dict[int, str] = {}  # of single tokens; no more than the vocabulary has
        self._inbox: deque[Callable[[], None]] = deque()
        self._bell = threading.Event()
        self._stopped = False
        self._subscribers: dict[str, _Subscriber] = {}
        self._asked: set[Future[list[Placement]]] = set()
        self._lock = threading.Lock()
        self._ended = False
        self._stats_due = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stats = engine.stats()
        self.failure: Exception | None = None
        engine.wake = self._bell.set

    def start(self) -> None:
        """From the thread that built the engine, whose OpenMP threads end: two teams are more than the cores are."""
        release_threads()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step; requests under way fail with EngineError."""
        self._stopped = True
        self._bell.set()
        if self._thread.is_alive():
            self._thread.join()
        self._engine.close()

    def check_health(self) -> None:
        """EngineError if the engine's thread has died, or another rank of it."""
        if self.failure is not None:
            raise EngineError(f"the engine stopped: {self.failure!r}")
        if self._ended:
            raise EngineError("the engine is shut down")
        self._engine.check_health()

    def stats(self) -> EngineStats:
        """As of a fifth of a second or one step ago at most while the engine works, exact when it is idle."""
        return self._stats

    async def adapters(self, digests: Collection[str] | None = None) -> list[Placement]:
        """See Engine. The engine's thread says it, after its present step. EngineError if the engine has stopped."""
        answer: Future[list[Placement]] = Future()
        with self._lock:
            self._check_not_ended()
            self._asked.add(answer)
        self._post(lambda: self._answer(answer, digests))
        return await asyncio.wrap_future(answer)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Text as it comes, the last delta with a finish reason. Closing the iterator cancels the request.

        Raises RequestError, ContextLengthExceeded, BaseMismatch or Overloaded before the first delta, what the
        adapter's loading raised, or EngineError.
        """
        self._engine.check(request)
        queue: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self._subscribe(request.request_id, _Subscriber(asyncio.get_running_loop(), queue))
        self._post(lambda: self._add(request))
        detokenizer = Detokenizer(self._tokenizer, request.params, request.prompt_ids)
        num_tokens = 0
        finished = False
        try:
            while not finished:
                out = await queue.get()
                if out.error is not None:
                    finished = True
                    raise out.error
                finished = out.finish_reason is not None
                token_ids = () if out.token_id is None else (out.token_id,)
                num_tokens += len(token_ids)
                text, stopped = detokenizer.step(out.token_id, out.finish_reason)
                yield Delta(
                    text=text,
                    token_ids=token_ids,
                    logprobs=self._logprobs(request, token_ids, out.logprobs),
                    finish_reason="stop" if stopped else out.finish_reason,
                    num_prompt_tokens=len(request.prompt_ids),
                    num_output_tokens=num_tokens,
                    num_cached_tokens=out.num_cached_tokens,
                    prompt_logprobs=self._prompt_logprobs(request, out.prompt_logprobs),
                )
                if stopped:
                    return
        finally:
            if not finished:
                self._post(lambda: self._cancel(request.request_id))

    def _logprobs(
        self, request: GenerateRequest, token_ids: tuple[int, ...], logprobs: TokenLogprobs | None
    ) -> tuple[TokenLogprob, ...] | None:
        if request.params.logprobs is None:
            return None
        return tuple(self._logprob(t, logprobs) for t in token_ids if logprobs is not None)

    def _prompt_logprobs(
        self, request: GenerateRequest, logprobs: Sequence[TokenLogprobs] | None
    ) -> tuple[TokenLogprob, ...] | None:
        if logprobs is None:
            return None
        first, *rest = request.prompt_ids
        known = tuple(self._logprob(t, lp) for t, lp in zip(rest, logprobs, strict=True))
        return (TokenLogprob(first, self._text_of(first), None, (), 0), *known)

    def _logprob(self, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
        top = tuple((t, self._text_of(t), lp) for t, lp in logprobs.top)
        return TokenLogprob(token_id, self._text_of(token_id), logprobs.logprob, top, logprobs.rank)

    def _text_of(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = str(self._tokenizer.decode([token_id]))
        return text

    def max_model_len(self, adapter: AdapterRef | None) -> int:
        """See Engine."""
        return self._engine.max_model_len(adapter)

    def adapter_bytes(self, adapter: AdapterRef) -> AdapterBytes:
        """See Engine."""
        return self._engine.adapter_bytes(adapter)

    def _subscribe(self, request_id: str, subscriber: _Subscriber) -> None:
        """Before the request is posted: whenever the engine dies, everyone who waits is in the list."""
        with self._lock:
            self._check_not_ended()
            if request_id in self._subscribers:
                raise RequestError(f"request id {request_id!r} is in use", "request_id")
            self._subscribers[request_id] = subscriber

    def _check_not_ended(self) -> None:
        if self._ended:
            raise EngineError(f"the engine stopped: {self.failure!r}" if self.failure else "the engine is shut down")

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._bell.set()

    def _run(self) -> None:
        if self._engine.spec.num_threads is not None:
            torch.set_num_threads(self._engine.spec.num_threads)
        torch.get_num_threads()  # settles it: a thread that has not asked takes what another, loading, sets for itself
        try:
            while True:
                self._bell.clear()  # before all that it stands for is looked at, so that none of it is slept through
                if self._stopped:
                    break
                while self._inbox:
                    self._inbox.popleft()()
                self._deliver(self._engine.step())
                now = time.monotonic()
                if self._engine.idle or now > self._stats_due:
                    self._stats, self._stats_due = self._engine.stats(), now + _STATS_INTERVAL_S
                if self._engine.idle and not self._inbox:
                    self._bell.wait()
            self._end(EngineError("the engine is shutting down"))
        except Exception as e:  # noqa: BLE001 - the thread's last act: everyone who waits must hear of it
            _log.exception("the engine stopped")
            self.failure = e
            self._end(EngineError(f"the engine stopped: {e!r}"))

    def _add(self, request: GenerateRequest) -> None:
        if request.request_id not in self._subscribers:
            return
        try:
            self._engine.add(request)
        except Exception as e:  # noqa: BLE001 - whatever it is, it is this request's
            self._deliver([TokenOutput(request.request_id, None, error=e)])

    def _answer(self, answer: Future[list[Placement]], digests: Collection[str] | None) -> None:
        self._asked.discard(answer)
        if answer.set_running_or_notify_cancel():
            answer.set_result(self._engine.adapters(digests))

    def _cancel(self, request_id: str) -> None:
        self._subscribers.pop(request_id, None)
        self._engine.cancel(request_id)

    def _deliver(self, outputs: Iterable[TokenOutput]) -> None:
        """A step's outputs wake each loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[TokenOutput], TokenOutput]]] = {}
        for output in outputs:
            last = output.finish_reason is not None or output.error is not None
            subscriber = (self._subscribers.pop if last else self._subscribers.get)(output.request_id, None)
            if subscriber is not None:
                by_loop.setdefault(subscriber.loop, []).append((subscriber.queue, output))
        for loop, items in by_loop.items():
            with suppress(RuntimeError):  # the caller's loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_put, items)

    def _end(self, error: Exception) -> None:
        with self._lock:
            self._ended = True
        for answer in self._asked:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(error)
        self._deliver([TokenOutput(request_id, None, error=error) for request_id in self._subscribers])


def _put(items: list[tuple[asyncio.Queue[TokenOutput], TokenOutput]]) -> None:
    for queue, output in items:
        queue.put_nowait(output)
