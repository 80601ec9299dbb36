"""Requests whose answers must match a constraint: their matchers, and the masks of a step's allowed tokens.

A constraint is compiled in a thread (`compilations`), for which its request waits in the queue. When a step's tokens
are drawn, the matchers read them, and llguidance fills one bit per token of the vocabulary for the next step, in a
thread: until the model runs the engine uses one processor, so another one is free. What is not done by then goes on
beside the model.
Nothing here costs anything before the first such request.

Shapes: M rows with a mask, W words of 32 bits, which are at least the vocabulary.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from loray.bases.grammar import GrammarCompiler
from loray.bases.registry import BaseModel
from loray.engine.request import Request
from loray.engine.sampling.compilations import Compilations
from loray.errors import RequestError
from loray.priority import run_soon
from loray.spec import Constraint

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher


class Masks(NamedTuple):
    """Of one step. Valid until the next step's are begun.

    requests   those of the rows; of two rows of one request the later counts
    words_MW   bit t % 32 of word t // 32 is set where token t is allowed
    ended      whose answer is complete: only the end of the text is allowed
    errors     of those whose constraint cannot be followed any further, which have no row
    """

    requests: Sequence[Request]
    words_MW: npt.NDArray[np.int32]
    ended: frozenset[Request]
    errors: dict[Request, RequestError]


class _Answer:
    """A matcher, and how many tokens of the output it has read."""

    __slots__ = ("matcher", "num_read")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher, self.num_read = matcher, 0

    def read(self, output_ids: Sequence[int]) -> None:
        """The tokens that came since the last call."""
        for token in output_ids[self.num_read :]:
            self.matcher.consume_token(token)
        self.num_read = len(output_ids)


_Answers = list[tuple[Request, _Answer]]


class PendingMasks:
    """Masks that a thread computes, with the last of its calls for them."""

    def __init__(self, answers: _Answers, words_MW: npt.NDArray[np.int32], computing: Future[None]) -> None:
        self._answers, self._words_MW, self._computing = answers, words_MW, computing

    def result(self) -> Masks:
        """Waits for the thread."""
        self._computing.result()
        stopped = [(r, a.matcher) for r, a in self._answers if a.matcher.is_stopped()]  # those with errors are as well
        errors = {r: _too_complex(matcher.get_error()) for r, matcher in stopped if matcher.is_error()}
        ended = frozenset(r for r, _ in stopped if r not in errors)
        return Masks([r for r, _ in self._answers], self._words_MW, ended, errors)


class Grammars:
    """Used by the engine's thread alone. `wake` is called from other threads when a constraint has been compiled."""

    def __init__(self, base: BaseModel, wake: Callable[[], None], *, on_gpu: bool = False) -> None:
        self._compilations, self._on_gpu = Compilations(GrammarCompiler(base).compile, wake), on_gpu
        self._num_words = -(-base.config.vocab_size // 32)
        self._words_MW = np.empty((0, self._num_words), dtype=np.int32)
        self._answers: dict[Request, _Answer] = {}
        self._begun: _Answers = []  # whose masks for the next step are the first rows
        self._computing: Future[None] | None = None  # the last masks
        self._entered = threading.Semaphore(0)

    @cached_property
    def _masking(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="masks", initializer=run_soon)

    @cached_property
    def _executor(self) -> LLExecutor:
        """Made in the masks' thread, so that its threads run as soon."""
        from llguidance import LLExecutor

        return LLExecutor(max(1, (os.cpu_count() or 1) // 2))

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float:
        """When a request has waited for its constraint for too long, in seconds of `time.monotonic`; may be inf."""
        return self._compilations.next_deadline

    def prepare(self, request: Request, constraint: Constraint) -> None:
        """Compile the constraint, unless it is known. Then `take_prepared` tells that the request can run."""
        self._compilations.add(request, constraint)

    def take_prepared(self, prepared: Callable[[Request], None]) -> list[tuple[Request, Exception]]:
        """Call `prepared` for the requests whose constraint has been compiled; returns those that are refused, and why:
        the caller forgets them.
        """
        refused: list[tuple[Request, Exception]] = []
        for request, compiled in self._compilations.take():
            if isinstance(compiled, Exception):
                refused.append((request, compiled))
            else:
                self._answers[request] = _Answer(compiled.deep_copy())
                prepared(request)
        return refused

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._compilations.cancel(request)
        self._answers.pop(request, None)
        if not self._answers:
            self._begun = []  # no step comes that would replace it

    def close(self) -> None:
        self._compilations.close()
        if "_masking" in self.__dict__:
            self._masking.shutdown(cancel_futures=True)

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin(self, requests: Sequence[Request]) -> None:
        """Begin the next step's masks for those of `requests` that have a constraint. Their outputs are complete."""
        if not self._answers:
            return
        self._wait()
        self._begun = [(r, a) for r in requests if (a := self._answers.get(r)) is not None]
        if self._begun:
            self._fill(self._begun, 0)

    def start(self, requests: Sequence[Request]) -> PendingMasks | None:
        """The masks of those of `requests` that have a constraint, those included that were begun; None if none has."""
        if not self._answers:
            return None
        answers = [(r, a) for r in requests if (a := self._answers.get(r)) is not None]
        if not answers:
            return None
        begun, self._begun = self._begun, []
        current = {r for r, a in begun if a.num_read == len(r.output_ids)}
        others = [(r, a) for r, a in answers if r not in current]
        if others:
            self._wait()
            self._fill(others, len(begun))
        assert self._computing is not None
        rows = begun + others
        return PendingMasks(rows, self._words_MW[: len(rows)], self._computing)

    def _wait(self) -> None:
        """Until no matcher is used by the thread."""
        if self._computing is not None:
            self._computing.result()

    def _fill(self, answers: _Answers, first: int) -> None:
        """The matchers read what is new of the outputs. The thread makes a single call that does not need Python's
        lock: whatever it ran in Python would stop the engine, with which the lock changes hands. It is waited for until
        it has come to that call; else it would get the lock when the model runs.
        """
        for request, answer in answers:
            answer.read(request.output_ids)
        self._reserve(first + len(answers))
        address, size = self._words_MW.ctypes.data, self._words_MW.strides[0]
        rows = [(answer.matcher, first + i) for i, (_, answer) in enumerate(answers)]
        self._computing = self._masking.submit(self._compute, rows, address, size)
        self._entered.acquire()

    def _compute(self, rows: list[tuple[LLMatcher, int]], address: int, size: int) -> None:
        self._entered.release()
        self._executor.unsafe_compute_mask_ptr(rows, address, size, rows[-1][1] + 1)

    def forced(self, requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
        """What the requests' constraints leave no choice about, after their last tokens. The next step computes
        them together. A request may end while they are taken.
        """
        for request in requests if self._answers else ():
            for token in self._forced(request):
                if request in self._answers:
                    yield request, token

    def _forced(self, request: Request) -> Sequence[int]:
        """None where something else may exclude them, where their log-probabilities are wanted, or on a GPU, where a
        step of single tokens is a recorded graph.
        """
        answer, p = self._answers.get(request), request.spec.params
        if answer is None or self._on_gpu or p.logprobs is not None or p.allowed_token_ids is not None or p.bad_words:
            return ()
        answer.read(request.output_ids)
        return answer.matcher.compute_ff_tokens()

    def _reserve(self, num_rows: int) -> None:
        """While the thread has nothing to do."""
        if num_rows > len(self._words_MW):
            more_MW = np.empty((num_rows - len(self._words_MW), self._num_words), dtype=np.int32)
            self._words_MW = np.concatenate((self._words_MW, more_MW))


def _too_complex(reason: str) -> RequestError:
    first = reason.strip().splitlines()[0] if reason.strip() else "no reason is known"
    return RequestError(f"the answer cannot be held to its constraint any further: {first}; simplify the constraint")
