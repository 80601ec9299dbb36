"""`Grammars`: the masks of structured requests, and the thread that computes them.

A constraint is compiled in a thread (`compilations`), for which its request waits in the queue. When a step's tokens
are drawn, the matchers read them, and llguidance fills one bit per token of the vocabulary for the next step, in a
thread: until the model runs the engine uses one processor, so another one is free. A step waits for the thread as long
as its budget of mask time at most, and the thread computes no more masks than fit into it (`turns`). A request whose
mask is not there yet is not in the step, and is not begun before its first mask is there.

A thought comes before what must match (`text.reasoning`). Its tokens have no mask, but for the one that a budget, or
the end of the answer drawn too early, makes the token that closes it. The matcher reads what follows.
Nothing here costs anything before the first such request.

Shapes: M rows with a mask, W words of 32 bits, which are at least the vocabulary.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from itertools import accumulate, pairwise, takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from loray.bases.registry import BaseModel
from loray.engine.request import Chunk, Request
from loray.engine.sampling.compilations import Compilations
from loray.engine.sampling.turns import MaskTurns
from loray.errors import GrammarTooExpensive, RequestError
from loray.priority import run_soon
from loray.spec import Constraint, Thinking
from loray.text.grammar import MASK_BUDGET_GPU_S, MASK_BUDGET_S, MAX_MEAN_MASK_S, GrammarCompiler
from loray.text.reasoning import ThoughtReader

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher


_GROUP_SIZE = 16  # masks for each of llguidance's threads
_MOST_AHEAD = 2  # tokens that may be drawn before the first of them has been read


class Masks(NamedTuple):
    """The masks of one step.

    requests  those of the rows; one that stands several times has its next tokens there, one after the other
    words_MW  bit t % 32 of word t // 32 is set where token t is allowed
    ended     whose answer is complete: only the end of the text is allowed
    """

    requests: Sequence[Request]
    words_MW: npt.NDArray[np.int32]
    ended: frozenset[Request]


class _Thought(ThoughtReader):
    """The thought of one answer. `is_cut`: its next token closes it, whatever it would be."""

    __slots__ = ("is_cut",)

    def __init__(self, thinking: Thinking) -> None:
        super().__init__(thinking)
        self.is_cut = False

    @property
    def num_left(self) -> int | None:
        """The tokens that it may still have; None: any number."""
        if self.is_cut:
            return 0
        budget = self.thinking.budget
        return None if budget is None else max(0, budget - self.num_tokens)


class _Answer:
    """A matcher of the content, if that must match something; how many of its tokens it has read, and the mask after
    `num_masked` of them; the thought before it.
    """

    __slots__ = ("has_ended", "matcher", "num_masked", "num_read", "thought", "words_W")

    def __init__(self, matcher: LLMatcher | None, num_words: int, thinking: Thinking | None) -> None:
        self.matcher, self.num_read = matcher, 0
        self.words_W, self.num_masked, self.has_ended = np.empty(num_words, dtype=np.int32), -1, False
        self.thought = None if thinking is None else _Thought(thinking)

    def content_from(self, output_ids: Sequence[int]) -> int | None:
        """The number of the token with which the content begins; None: it has not begun."""
        if self.thought is None:
            return 0
        self.thought.read(output_ids[self.thought.num_read :])
        return self.thought.content_from

    def read(self, output_ids: Sequence[int]) -> None:
        """Let the matcher read the tokens of the content that came since the last call."""
        first = self.content_from(output_ids)
        if self.matcher is None or first is None:
            return
        for token in output_ids[first + self.num_read :]:
            self.matcher.consume_token(token)
        self.num_read = len(output_ids) - first

    def words(self, output_ids: Sequence[int]) -> npt.NDArray[np.int32] | None:
        """The mask of the next token; None: any may come."""
        thought = self.thought
        if thought is None or self.content_from(output_ids) is not None:
            return None if self.matcher is None else self.words_W
        if not thought.is_open:
            return None if self.matcher is None else _with_token(self.words_W, thought.thinking.start_id)
        return _with_token(np.zeros_like(self.words_W), thought.thinking.end_id) if thought.num_left == 0 else None


def _with_token(words_W: npt.NDArray[np.int32], token: int) -> npt.NDArray[np.int32]:
    out_W = words_W.copy()
    out_W.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
    return out_W


class MaskThread:
    """The thread that computes masks while the engine's prepares the next step. It is used by one thread, which leaves
    matchers alone while their masks are computed. Nothing is made before the first.

    group_size  the most masks that are computed together
    """

    def __init__(self) -> None:
        self._num_threads = max(1, (os.cpu_count() or 1) // 2)
        self.group_size = _GROUP_SIZE * self._num_threads
        self._entered = threading.Semaphore(0)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="masks", initializer=run_soon)

    @cached_property
    def _executor(self) -> LLExecutor:
        """Made in the masks' thread, so that its threads run as soon."""
        from llguidance import LLExecutor

        return LLExecutor(self._num_threads)

    def begin(
        self, groups: Sequence[tuple[Sequence[LLMatcher], float]], words_MW: npt.NDArray[np.int32]
    ) -> Future[list[float]]:
        """Compute masks into the rows of `words_MW` (masks, words of 32 bits), group by group, until a group's limit in
        seconds has passed. The result has the seconds that each of them took: of processor time, if it has one mask.

        A group is a single call that does not need Python's lock: whatever the thread runs in Python stops the engine,
        with which the lock changes hands. It is waited for until it has come to the first call.
        """
        computing = self._thread.submit(self._compute, groups, words_MW.ctypes.data, words_MW.strides[0])
        self._entered.acquire()
        return computing

    def begin_guesses(
        self, rows: Sequence[tuple[LLMatcher, int, Sequence[int]]], words_MW: npt.NDArray[np.int32]
    ) -> Future[None]:
        """Compute the masks of matchers: of each, from its row on, the next one and those after its guesses, all of
        which it allows. It stays as it was.
        """
        arguments = ([*rows], words_MW.ctypes.data, words_MW.strides[0], len(words_MW))
        computing = self._thread.submit(self._fill_guesses, *arguments)
        self._entered.acquire()
        return computing

    def close(self) -> None:
        if "_thread" in self.__dict__:
            self._thread.shutdown(cancel_futures=True)

    def _compute(self, groups: Sequence[tuple[Sequence[LLMatcher], float]], address: int, size: int) -> list[float]:
        seconds, spent_s = list[float](), 0.0
        self._entered.release()
        for matchers, limit_s in groups:
            if spent_s >= limit_s:
                break
            seconds.append(self._fill(matchers, address, size))
            spent_s += seconds[-1]
            address += size * len(matchers)
        return seconds

    def _fill(self, matchers: Sequence[LLMatcher], address: int, size: int) -> float:
        """Compute the masks of one group; returns its seconds."""
        if len(matchers) == 1:  # in this thread, whose processor time no other work of the machine prolongs
            began = time.thread_time()
            matchers[0].unsafe_compute_mask_ptr(address, size)
            return time.thread_time() - began
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        began = time.perf_counter()
        self._executor.unsafe_compute_mask_ptr(rows, address, size, len(rows))
        return time.perf_counter() - began

    def _fill_guesses(
        self, rows: list[tuple[LLMatcher, int, Sequence[int]]], address: int, size: int, num_rows: int
    ) -> None:
        executor = self._executor
        self._entered.release()
        executor.unsafe_compute_mask_ptr_with_draft_token(
            [(matcher, row, [*guesses]) for matcher, row, guesses in rows], address, size, num_rows
        )


class Grammars:
    """Used by the engine's thread alone. `wake` is called from other threads when a constraint has been compiled.

    It writes `awaits_mask` of requests.
    """

    def __init__(self, base: BaseModel, wake: Callable[[], None], *, on_gpu: bool = False) -> None:
        self._compilations, self._on_gpu = Compilations(GrammarCompiler(base).compile, wake), on_gpu
        self._eos_token_ids = frozenset(base.config.eos_token_ids)
        self._num_words = -(-base.config.vocab_size // 32)
        self._thread = MaskThread()
        self._turns = MaskTurns(MASK_BUDGET_GPU_S if on_gpu else MASK_BUDGET_S, self._thread.group_size)
        self._words_MW = np.empty((0, self._num_words), dtype=np.int32)  # the rows of the thread's turn
        self._computing: Future[list[float]] | None = None
        self._guessing: Future[None] | None = None  # masks after guesses: until it has ended matchers are left alone
        self._guessed_MW = self._words_MW
        self._guessed: dict[Request, range] = {}  # rows of the step's requests with guesses there
        self._answers: dict[Request, _Answer] = {}
        self._refused: list[tuple[Request, Exception]] = []

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float:
        """The time at which a request has waited for its constraint for too long, in seconds of `time.monotonic`; may
        be inf.
        """
        return self._compilations.next_deadline

    @property
    def has_due(self) -> bool:
        """Say whether `take` has something without being told: masks that later steps compute, or requests that end."""
        return bool(self._turns or self._refused)

    def prepare(self, request: Request, constraint: Constraint | None) -> None:
        """Compile the constraint, unless it is known. Then `take` tells that the request can run. None: the request has
        a thought with a budget, and can run at once.
        """
        if constraint is not None:
            request.awaits_mask = True
            self._compilations.add(request, constraint)
        else:
            self._add(request, None)

    def take(self, prepared: Callable[[Request], None]) -> list[tuple[Request, Exception]]:
        """Take the masks that were begun, before a step is scheduled. Waits for them no longer than the budget.

        Calls `prepared` for the requests that have a mask now; returns those that are refused or end, and why: the
        caller forgets them.
        """
        self._take_compiled()
        if self._guessing is not None and wait((self._guessing,), self._turns.budget_s).done:
            self._guessing = None
        if self._computing is None and self._turns:
            self._begin()
        if self._computing is not None and wait((self._computing,), self._turns.budget_s).done:
            self._end(prepared)
        refused, self._refused = self._refused, []
        return refused

    def forget(self, request: Request) -> None:
        """Forget a request that has ended."""
        self._compilations.cancel(request)
        self._answers.pop(request, None)
        self._turns.leave(request)
        self._refused = [(r, error) for r, error in self._refused if r is not request]

    def close(self) -> None:
        self._compilations.close()
        self._thread.close()

    # -- a step -------------------------------------------------------------------------------------------------------

    def advance(self, requests: Sequence[Request]) -> None:
        """Ask for another mask for those of `requests` that have a constraint and got tokens. Their outputs are
        complete.
        """
        for request in requests if self._answers else ():
            answer = self._answers.get(request)
            if answer is None:
                continue
            first = answer.content_from(request.output_ids)
            if answer.thought is not None:
                self._note_thought(request, answer.thought)
            if answer.matcher is None or first is None:
                continue
            if answer.num_masked != len(request.output_ids) - first:
                request.awaits_mask = True
                self._turns.add(request)

    def close_thought(self, request: Request, token: int) -> bool:
        """Say whether `token`, which would end the request, was drawn in a thought before what must match. Then it does
        not count, and the next one closes the thought.
        """
        answer = self._answers.get(request)
        if answer is None or answer.matcher is None or answer.content_from(request.output_ids) is not None:
            return False
        thought = answer.thought
        if thought is None or not thought.is_open or token == thought.thinking.end_id:
            return False
        thought.is_cut = True
        return True

    def end_step(self) -> None:
        """Begin the next step's masks, unless others are being computed."""
        self._take_compiled()
        if self._answers:
            self._turns.next_step()
            if self._computing is None:
                self._begin()

    def allowed(self, request: Request, guesses: Sequence[int]) -> Sequence[int]:
        """Give the first ones of the guesses that the request's constraint allows, and for which there is time to
        compute masks while the step runs; all without a constraint. In a thought those after which no token is masked.
        """
        answer = self._answers.get(request)
        if answer is None:
            return guesses
        if answer.thought is not None and answer.content_from(request.output_ids) is None:
            return self._in_thought(request, answer.thought, guesses)
        assert answer.matcher is not None
        if self._computing is not None or self._guessing is not None or request.awaits_mask:
            return ()
        guesses = guesses[: self._turns.num_quick(request)]
        return guesses[: answer.matcher.validate_tokens([*guesses])]

    def begin_guesses(self, sampled: Sequence[Chunk]) -> None:
        """Begin the masks after the guesses of a step, which is computed meanwhile; `masks` takes them."""
        guessing = [c for c in sampled if c.guesses] if self._answers else []
        own = [(c, m) for c in guessing if (m := self._matcher(c.request)) is not None]
        starts = [*accumulate((1 + len(chunk.guesses) for chunk, _ in own), initial=0)]
        self._guessed = {chunk.request: range(*rows) for (chunk, _), rows in zip(own, pairwise(starts), strict=True)}
        if own:
            self._guessed_MW = np.zeros((starts[-1], self._num_words), dtype=np.int32)
            rows = [(matcher, self._guessed[c.request].start, c.guesses) for c, matcher in own]
            self._guessing = self._thread.begin_guesses(rows, self._guessed_MW)

    def masks(self, requests: Sequence[Request]) -> Masks | None:
        """Give the masks of those of `requests` that have a constraint, none of which awaits its mask; None if none
        has. One that stands several times has the masks after its guesses there, which allow nothing if they are late.
        """
        answers = [(r, a) for r in requests if (a := self._answers.get(r)) is not None] if self._answers else []
        found = [(r, a, w) for r, a in answers if (w := a.words(r.output_ids)) is not None]
        if not found:
            return None
        assert not any(r.awaits_mask for r, *_ in found), "it must not be in the step"
        ended = frozenset(r for r, a, _ in found if a.has_ended)
        guessed = self._after_guesses() if self._guessed else {}
        words = [next(guessed[r]) if r in guessed else w for r, _, w in found]
        return Masks([r for r, *_ in found], np.stack(words), ended)

    def _after_guesses(self) -> dict[Request, Iterator[npt.NDArray[np.int32]]]:
        """Take the masks of the step's guesses, of each request with its next one before them. They are waited for no
        longer than others: those that are late allow nothing, so that their guesses count for nothing.
        """
        assert self._guessing is not None
        words_MW, guessed, self._guessed = self._guessed_MW, self._guessed, {}
        if wait((self._guessing,), self._turns.budget_s).done:
            self._guessing.result()
            self._guessing = None
        else:
            words_MW = np.zeros_like(words_MW)
            for request in guessed:
                self._turns.was_slow(request)
        for request, rows in guessed.items():
            words_MW[rows.start] = self._answers[request].words_W
        return {request: iter(words_MW[rows.start : rows.stop]) for request, rows in guessed.items()}

    def forced(self, requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
        """Give the tokens about which the requests' constraints leave no choice, after their last ones. The next step
        computes them together. A request may end while they are taken.
        """
        for request in requests if self._answers else ():
            for token in self._forced(request):
                if request in self._answers:
                    yield request, token

    def _forced(self, request: Request) -> Sequence[int]:
        """Find no token where something else may exclude it, where its log-probability is wanted, or on a GPU, where a
        step of single tokens is a captured graph.
        """
        answer, p = self._answers.get(request), request.spec.params
        is_left_alone = self._on_gpu or self._guessing is not None
        if answer is None or is_left_alone or p.logprobs is not None or p.allowed_token_ids is not None or p.bad_words:
            return ()
        matcher = self._matcher(request)
        if matcher is None:
            return ()
        answer.read(request.output_ids)
        return matcher.compute_ff_tokens()

    def _take_compiled(self) -> None:
        for request, compiled in self._compilations.take():
            if isinstance(compiled, Exception):
                self._refused.append((request, compiled))
            else:
                self._add(request, compiled.deep_copy())
                self._turns.enter(request)

    def _add(self, request: Request, matcher: LLMatcher | None) -> None:
        answer = self._answers[request] = _Answer(matcher, self._num_words, request.spec.params.thinking)
        if answer.thought is not None:
            answer.content_from(request.output_ids)
            self._note_thought(request, answer.thought)

    def _note_thought(self, request: Request, thought: _Thought) -> None:
        """Note whether the request's thought may be closed soon; forget a thought that is over."""
        left = thought.num_left if thought.content_from is None else None
        request.ends_thought = left is not None and left <= _MOST_AHEAD
        if thought.content_from is not None and self._answers[request].matcher is None:
            del self._answers[request]

    def _matcher(self, request: Request) -> LLMatcher | None:
        """Give the matcher by which the request's next token is chosen; None without one, and before the content."""
        answer = self._answers.get(request)
        if answer is None or answer.matcher is None or answer.content_from(request.output_ids) is None:
            return None
        return answer.matcher

    def _in_thought(self, request: Request, thought: _Thought, guesses: Sequence[int]) -> Sequence[int]:
        if not thought.is_open:
            return ()
        if thought.num_left is not None:
            guesses = guesses[: max(0, thought.num_left - 1)]
        if request.spec.params.structured is None:
            return guesses
        masked_after = {thought.thinking.end_id, *self._eos_token_ids, *request.spec.params.stop_token_ids}
        return [*takewhile(lambda token: token not in masked_after, guesses)]

    def _begin(self) -> None:
        """Begin a turn of the thread, if masks are due and there is time for them."""
        if self._guessing is not None:
            return
        groups = self._turns.begin()
        if not groups:
            return
        num_rows = sum(len(group.requests) for group in groups)
        if num_rows > len(self._words_MW):
            self._words_MW = np.empty((num_rows, self._num_words), dtype=np.int32)
        matchers: list[tuple[list[LLMatcher], float]] = []
        for group in groups:
            answers = [self._answers[request] for request in group.requests]
            for request, answer in zip(group.requests, answers, strict=True):
                answer.read(request.output_ids)
            matchers.append(([a.matcher for a in answers if a.matcher is not None], group.limit_s))
        self._computing = self._thread.begin(matchers, self._words_MW)

    def _end(self, prepared: Callable[[Request], None]) -> None:
        """Take the masks of the thread's turn, which has ended."""
        assert self._computing is not None
        computed, self._computing = self._turns.end(self._computing.result()), None
        for row, request in enumerate(computed):
            answer = self._answers.get(request)
            if answer is None or answer.matcher is None:  # it was cancelled meanwhile
                continue
            answer.has_ended = answer.matcher.is_stopped()  # those with errors are as well
            if answer.has_ended and answer.matcher.is_error():
                self._refused.append((request, _too_complex(answer.matcher.get_error())))
            elif self._turns.is_too_expensive(request):
                self._refused.append((request, _too_expensive(self._turns.mean_s(request))))
            else:
                answer.words_W[:], answer.num_masked = self._words_MW[row], answer.num_read
                request.awaits_mask = False
                prepared(request)


def _too_complex(reason: str) -> RequestError:
    first = reason.strip().splitlines()[0] if reason.strip() else "no reason is known"
    return RequestError(f"the answer cannot be held to its constraint any further: {first}; simplify the constraint")


def _too_expensive(seconds: float) -> GrammarTooExpensive:
    return GrammarTooExpensive(
        f"what tokens the constraint allows takes {1e3 * seconds:.1f} ms a token to compute, more than "
        f"{1e3 * MAX_MEAN_MASK_S:g}; simplify the constraint"
    )
