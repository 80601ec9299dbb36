"""The tokens of one stream that have arrived and that nobody has taken yet; and who reads them, a few at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from loray.spec import FinishReason, GenerateRequest, TokenDelta, TokenLogprobs

MOST = 8  # in one pass of the event loop; each writes an event, which takes up to 60 µs


class Wakes:
    """Wakes readers in turn.

    An engine's step has tokens for all of its streams. If all their readers ran in one pass of the event loop, whatever
    else is there would wait for them in each pass, and a request takes a dozen passes to its engine.

    Who waits for a first token is woken at once; of others at most MOST in a pass, in turn. What arrives for a reader
    until its turn is in the same delta. Used from one event loop.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = MOST
        self._is_due = False  # the next pass is looked at

    def wake(self, reader: asyncio.Future[None], *, is_first: bool) -> None:
        if is_first:
            reader.set_result(None)
        elif self._left:
            self._left -= 1
            reader.set_result(None)
            self._look_again()
        else:
            self._waiting.append(reader)

    def _look_again(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._pass)

    def _pass(self) -> None:
        self._is_due, self._left = False, MOST
        while self._waiting and self._left:
            reader = self._waiting.popleft()
            if not reader.done():  # it may have left
                self._left -= 1
                reader.set_result(None)
        if self._left < MOST:
            self._look_again()


class Inbox:
    """Collects the tokens of a stream. What arrives between two calls of `take` is one delta, so a slow reader costs no
    more than the tokens' ids. Iterating takes the deltas up to the one with the finish reason.

    Used from one event loop.
    """

    def __init__(self, stream: int = 0, wakes: Wakes | None = None) -> None:
        """`wakes`: of all inboxes of one gateway; None: its own."""
        self.stream = stream
        self._wakes = wakes or Wakes()
        self._has_begun = False  # something has been taken
        self.has_ended = False  # the last token has arrived
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self._embedding: tuple[float, ...] | None = None
        self._finish_reason: FinishReason | None = None
        self._num_cached_tokens = 0
        self._error: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    def push(
        self,
        token: int | None,
        finish_reason: FinishReason | None,
        num_cached_tokens: int,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """Take one step's result. `token` is None if there is only a finish reason."""
        if self.has_ended:
            return
        if token is not None:
            self._token_ids.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._num_cached_tokens = num_cached_tokens
        self._finish_reason = finish_reason
        self.has_ended = finish_reason is not None
        self._wake()

    def push_prompt(self, logprobs: Iterable[TokenLogprobs]) -> None:
        """Take a part of the prompt's log-probabilities, which are in the first delta."""
        if self._prompt_logprobs is None:
            self._prompt_logprobs = []
        self._prompt_logprobs.extend(logprobs)

    def push_embedding(self, embedding: tuple[float, ...]) -> None:
        """Take the prompt's embedding, which is in the delta with the finish reason."""
        self._embedding = embedding

    def fail(self, error: Exception) -> None:
        """Have `take` raise this after what has arrived, unless the last token has arrived."""
        if self._error is None and not self.has_ended:
            self._error = error
            self._wake()

    def __aiter__(self) -> Inbox:
        return self

    async def __anext__(self) -> TokenDelta:
        if self._is_empty and self.has_ended:
            raise StopAsyncIteration
        return await self.take()

    async def take(self) -> TokenDelta:
        """Return everything that has arrived, as soon as there is something."""
        while self._is_empty:
            if self._error is not None:
                raise self._error
            waiting = self._waiting = asyncio.get_running_loop().create_future()
            try:
                await waiting
            finally:
                self._waiting = None
        delta = TokenDelta(
            tuple(self._token_ids),
            self._finish_reason,
            self._num_cached_tokens,
            tuple(self._logprobs) if self._logprobs else None,
            None if self._prompt_logprobs is None else tuple(self._prompt_logprobs),
            self._embedding,
        )
        self._token_ids, self._logprobs, self._prompt_logprobs, self._embedding = [], [], None, None
        self._finish_reason = None
        self._has_begun = True
        return delta

    @property
    def _is_empty(self) -> bool:
        return not self._token_ids and self._finish_reason is None

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            self._wakes.wake(waiting, is_first=not self._has_begun)


@contextmanager
def reading(request: GenerateRequest, left: Callable[[str], None]) -> Iterator[None]:
    """Surround the reading of a request's stream in a generator. At its end, `left` is called with why: "stop" if the
    generator was closed because a stop string was found, otherwise "abort", which means nothing after the last token.
    """
    reason = "abort"
    try:
        yield
    except GeneratorExit:
        reason = _why_closed(request)
        raise
    finally:
        left(reason)


def _why_closed(request: GenerateRequest) -> str:
    """Say why a reader has closed the stream: "stop" if it found a stop string, "abort" if it is gone itself."""
    task = asyncio.current_task()
    is_gone = task is not None and task.cancelling() > 0
    return "stop" if request.params.stop and not is_gone else "abort"
