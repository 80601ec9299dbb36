"""`Background`: how far requests in the background (rollouts, batches) may lengthen the steps of the others.

Beside foreground requests a step has rows and prompts of background ones only as far as it is expected to take at most
1 + slack times what it takes without them. Rows take turns, by their rank. So that nobody stands still, one row joins
at least one of `_ROW_STEPS` steps, and `MIN_CHUNK` tokens of a prompt one of `_PROMPT_STEPS`, whatever they take: so
rarely that of a stream's gaps less than one in twenty is a longer one. Where a step has nothing of the foreground's,
whose requests wait for a mask or for blocks, one row joins at least, so that the step is not empty.

A row that is left out keeps its place, its slot and its mask, as one does that awaits its mask.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import chain
from operator import sub

from loray.engine.request import Chunk, Request, StepWork
from loray.engine.scheduling.fairness import rank_in_batch
from loray.engine.scheduling.step_budget import MIN_CHUNK, StepBudget, StepTimeModel

_ROW_STEPS, _PROMPT_STEPS = 16, 32


class Background:
    """Says which background requests have tokens in a step. `begin_step` is called before the others.

    is_paced  foreground requests are here, so the step is not the background's alone
    """

    def __init__(self, steps: StepTimeModel, slack: float) -> None:
        """`slack`: part by which a step may be longer."""
        self._steps, self._slack = steps, slack
        self.is_paced = False
        self._own = StepWork()  # of this step, where it is paced
        self._num_steps = self._row_at = self._prompt_at = 0  # steps so far, and the last ones with a row, and a prompt
        self._last = (0, 0)  # the rank of the row that joined last

    def begin_step(self, *, is_paced: bool) -> None:
        self.is_paced, self._own = is_paced, StepWork()
        self._num_steps += 1

    def left_out(self, rows: Sequence[Request]) -> Collection[Request]:
        """Return which of the requests that could decode in this step, by their ranks, have no row in it."""
        if not self.is_paced:
            return ()
        first = next((i for i, request in enumerate(rows) if request.is_background), len(rows))
        work = StepWork(num_steps=1)
        for request in rows[:first]:
            work = work.plus(_row(request))
        room_s = self._slack * self._steps.predict(work)
        is_due = not first or self._num_steps - self._row_at >= _ROW_STEPS
        others, joining = rows[first:], set[Request]()
        start = bisect_right(others, self._last, key=rank_in_batch)
        for request in chain(others[start:], others[:start]):
            own = self._own.plus(_row(request))
            if self._steps.predict(own) > room_s and (joining or not is_due):
                break
            joining.add(request)
            self._own, self._last, self._row_at = own, rank_in_batch(request), self._num_steps
        return set(others) - joining

    def fit(self, budget: StepBudget, start: int, num_pending: int, *, scored: bool = False) -> int:
        """Return what `StepBudget.fit` does, for a prompt of a background request."""
        others = StepWork(*map(sub, budget.work, self._own))
        if not self.is_paced or not others.num_decoded + others.num_prompt:
            return budget.fit(start, num_pending, scored=scored)
        room_s = self._slack * self._steps.predict(others) - self._steps.predict(self._own)
        n = budget.fit(start, num_pending, scored=scored, most_s=max(0.0, room_s))
        if not n and self._num_steps - self._prompt_at >= _PROMPT_STEPS:
            n = budget.fit(start, min(num_pending, MIN_CHUNK), scored=scored)
        return n

    def add(self, chunk: Chunk) -> None:
        """Add a chunk of a prompt, which `fit` has allowed."""
        self._own, self._prompt_at = self._own.plus(chunk.work), self._num_steps


def _row(request: Request) -> StepWork:
    return StepWork.of(request.num_computed, min(request.num_pending, MIN_CHUNK))
