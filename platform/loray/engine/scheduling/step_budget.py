"""How long a step takes (`StepTimeModel`), and how many tokens it may compute (`StepBudget`).

Requests that decode take what they need. Prompts get the rest of the step's time, at least a quarter of it, and at
least `MIN_CHUNK` tokens, so that they end whatever decodes beside them. The step's time is the target for the time
between two tokens if the step gives anybody a token, a request that decodes or a prompt that ends. Else it is `ALONE`
times that: nobody waits for the step, and a long prompt pays the fixed cost of fewer steps. So it is in a `Burst`.

The time is fitted to the steps before, and so says little of what none of them had: a step has at most twice as many
tokens of prompts as any before it, if somebody decodes beside them, and at most twice as many whose log-probabilities
are computed. These need vocabulary × hidden products each, which may cost more than the rest, and few prompts ask for
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from operator import add, le, mul

from loray.engine.request import Chunk, StepWork

_MEMORY_STEPS = 128  # after that many further steps of its kind, a step's weight in the fit has fallen to 1/e
_SWEEPS = 4  # for each measured step
_KEEP = 1 - 1 / _MEMORY_STEPS
_OUTLIER = 4.0
_CHANGED = 3  # so many exceptions of a kind, without another step of it between them, are what steps take now
_SURE = 16  # measured steps of a kind, after which the fit is believed
_RISE = 1 + 1 / 2048  # of the shortest time, with each step that does not confirm it
_SIZE = len(StepWork._fields)
# The first steps are explained by these in order. A prompt's tokens come before the fixed cost, so that the first chunk
# does not make the next one look free.
_ORDER = [StepWork._fields.index(name) for name in ("num_prompt", "num_steps")]
_ORDER += [i for i in range(_SIZE) if i not in _ORDER]

ALONE = 4.0
MIN_CHUNK = 16
MIN_SHARE = 0.25
_BURST_PROMPTS, _BURST_TARGETS = 8, 40
_GROWTH = 2  # a step may have so many times the tokens of any measured one


class StepTimeModel:
    """Predicts a step's seconds = Σ cost · quantity over the quantities of `StepWork`. It owns the costs; reading them
    takes no time, measuring a step about 30 µs.

    The fixed cost is for reading the weights and for launching a step; a decoded request and a prompt's token cost
    differently, since one token for each of many requests reads the cache of each, while a prompt's tokens share it.
    All costs are at least 0.

    The costs are a least-squares fit over the past steps. Older steps weigh less, and steps with and without prompts
    are forgotten apart: an hour of decoding does not wash out what a prompt costs. Projected Gauss-Seidel sweeps, which
    start from the costs known before, keep them non-negative. Where the steps do not tell two costs apart (every step
    was alike) the sweeps leave their ratio as it was; so the fit cannot run away as an exact solution would. Steps that
    the budget makes equally long would be explained by a fixed cost alone: it is limited by the shortest step of late.
    """

    def __init__(self) -> None:
        self.costs = StepWork()
        self.largest = StepWork()  # of each quantity, in any measured step
        self._shortest = math.inf  # seconds of a step; the fixed cost is no more
        # Of steps without and with prompts: Σ w · x xᵀ and, as its last row, Σ w · x · seconds.
        self._sums = _no_sums()
        self._num_steps = [0, 0]
        self._exceptions = [0, 0]  # of each kind, since its last other step

    @property
    def is_known(self) -> bool:
        """True when a step has been measured. Before that every prediction is 0."""
        return self.largest.num_steps > 0

    def predict(self, work: StepWork) -> float:
        """Seconds."""
        return float(sum(map(mul, self.costs, work)))

    def token_seconds(self) -> float:
        """Return the seconds of one more token of a prompt, without its attention."""
        return self.costs.num_prompt

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step with that work took that long.

        A step may be slow for reasons of its own (a kernel is compiled, another process takes the cores), never fast.
        So a step of a known size that took more than 4 times as long as predicted does not count; from the third in a
        row on it counts as 4 times. One that took less than a quarter shows that the past was the exception, and that
        is forgotten: else all steps would stay short and alike, and not show what more tokens cost.
        """
        kind, predicted = int(work.num_prompt > 0), self.predict(work)
        is_known = self._num_steps[kind] >= _SURE and all(map(le, work, self.largest))
        if is_known and seconds > _OUTLIER * predicted:
            self._exceptions[kind] += 1
            if self._exceptions[kind] < _CHANGED:
                return
            self._shortest = seconds = _OUTLIER * predicted
        else:
            self._exceptions[kind] = 0
        self._shortest = min(seconds, _RISE * self._shortest)
        if seconds * _OUTLIER < predicted:
            self._sums[kind] = _no_sums()[kind]
        self._num_steps[kind] += 1
        self.largest = StepWork(*map(max, self.largest, work))
        self._sums[kind] = [
            [_KEEP * s + quantity * x for s, x in zip(row, work, strict=True)]
            for row, quantity in zip(self._sums[kind], (*work, seconds), strict=True)
        ]
        self._fit()

    def _fit(self) -> None:
        *gram, target = [list(map(add, *rows)) for rows in zip(*self._sums, strict=True)]
        costs = list(self.costs)
        for _ in range(_SWEEPS):
            for i in _ORDER:
                row = gram[i]
                if row[i]:
                    costs[i] = max(0.0, costs[i] + (target[i] - sum(map(mul, row, costs))) / row[i])
            costs[0] = min(costs[0], self._shortest)
        self.costs = StepWork(*costs)


def _no_sums() -> list[list[list[float]]]:
    return [[[0.0] * _SIZE for _ in range(_SIZE + 1)] for _ in range(2)]


def target_s(itl_slo_s: float | None, *, alone: bool) -> float:
    """Return the target for a step's seconds; infinite if only tokens count. `alone`: the step gives nobody a token."""
    if itl_slo_s is None:
        return math.inf
    return ALONE * itl_slo_s if alone else itl_slo_s


def room_for_prompts(steps: StepTimeModel, decoding: StepWork, itl_slo_s: float | None, *, alone: bool) -> float:
    """Return the seconds of a step beside `decoding`, which has its fixed cost; infinite if only tokens count. `alone`:
    the step gives nobody a token.
    """
    if not steps.is_known:
        return math.inf
    target = target_s(itl_slo_s, alone=alone)
    return max(target - steps.predict(decoding), MIN_SHARE * target)


class Burst:
    """Many requests come at once to an idle engine: at least 8, and more than twice those that decode. It goes on
    while all that decode began within 40 times the target, and what is left of all prompts takes no longer. Short steps
    would only put off the last of them.
    """

    def __init__(self, itl_slo_s: float | None) -> None:
        self._seconds = 0.0 if itl_slo_s is None else _BURST_TARGETS * itl_slo_s
        self._goes_on = False

    def goes_on(self, decoding_s: float, num_decoding: int, num_prompts: int, prompts: Iterable[float]) -> bool:
        """Return whether it goes on. `decoding_s`: since the first of those that decode began; `prompts`: seconds for
        what is left of each.
        """
        begins = num_prompts >= max(_BURST_PROMPTS, 2 * num_decoding + 1)
        self._goes_on = (self._goes_on or begins) and decoding_s < self._seconds
        self._goes_on = self._goes_on and all(total < self._seconds for total in accumulate(prompts))
        return self._goes_on


class StepBudget:
    """Tokens and time that are left in the step that is planned. `decode` is called before the others."""

    def __init__(self, steps: StepTimeModel, *, max_tokens: int, itl_slo_s: float | None) -> None:
        """`itl_slo_s`: seconds between two tokens of a request; None: only tokens count."""
        self._steps, self._itl_slo_s = steps, itl_slo_s
        self._num_left = max_tokens
        self._num_decoded = self._num_keys = 0
        self._alone = True
        self.in_burst = False
        self._forced = StepWork()
        self._prompts = StepWork()

    @property
    def num_left(self) -> int:
        """Count the tokens that may still be added."""
        return self._num_left

    @property
    def work(self) -> StepWork:
        """All that was added."""
        return self._decoding.plus(self._prompts)

    def decode(self, start: int, num_pending: int, num_others: int) -> int:
        """Add a request that decodes, and return how many tokens from `start` it is given: one, or up to MIN_CHUNK of
        those that a constraint has forced, leaving one for each of `num_others` that come after it.
        """
        n = min(num_pending, MIN_CHUNK, self._num_left - num_others)
        self._alone = False
        self._num_left -= n
        if n == 1:
            self._num_decoded += 1
            self._num_keys += start + 1
        else:
            self._forced = self._forced.plus(StepWork.of(start, n))
        return n

    def guess(self, num_guesses: int) -> None:
        """Add guessed tokens of a request that decodes: rows like its own, which read what it reads."""
        self._num_left -= num_guesses
        self._num_decoded += num_guesses
        self._num_keys += num_guesses

    def add(self, chunk: Chunk) -> None:
        """Add a chunk of a prompt."""
        self._alone &= not chunk.is_last
        self._prompts = self._prompts.plus(chunk.work)
        self._num_left -= chunk.num_tokens

    def fit(self, start: int, num_pending: int, *, scored: bool = False, most_s: float = math.inf) -> int:
        """Return how many tokens from `start` of a prompt with `num_pending` left may be computed in this step; 0: the
        step is full, or they would take more than `most_s` seconds. What time cuts off a prompt is a multiple of
        MIN_CHUNK.
        """
        most = min(num_pending, self._num_left)
        n = int(min(most, self._tokens_in_time(start, most_s, scored=scored)))
        if n == most:
            return n
        if n >= MIN_CHUNK:
            return n - n % MIN_CHUNK
        return 0 if self._prompts.num_keys or most_s < math.inf else min(most, MIN_CHUNK)

    @property
    def _decoding(self) -> StepWork:
        return self._forced.plus(StepWork(num_steps=1, num_decoded=self._num_decoded, num_keys=self._num_keys))

    def _tokens_in_time(self, start: int, most_s: float, *, scored: bool) -> float:
        """The largest n whose cost, fixed + slope · n + curve · n², is in the time that is left, and in `most_s`."""
        without_tokens = self._alone or self.in_burst  # the step may take as long as if it gave nobody a token
        room = room_for_prompts(self._steps, self._decoding, self._itl_slo_s, alone=without_tokens)
        seconds = min(room - self._steps.predict(self._prompts), most_s)
        most = self._most_unmeasured(start, scored=scored)
        if seconds == math.inf:
            return most
        costs = self._steps.costs
        fixed = costs.num_keys * start
        curve = costs.num_pairs / 2
        slope = costs.num_prompt + costs.num_keys + costs.num_pairs * (start + 0.5) + scored * costs.num_scored
        left = seconds - fixed
        if left <= 0:
            return 0
        if curve * left > 1e-9 * slope * slope:
            n = (math.sqrt(slope * slope + 4 * curve * left) - slope) / (2 * curve)
        else:
            n = left / slope if slope else math.inf
        return min(n, most)

    def _most_unmeasured(self, start: int, *, scored: bool) -> float:
        """Tokens up to which the fit may be trusted, see _GROWTH: of those that are scored, and of all while a request
        decodes. Infinite if only tokens count.
        """
        largest, prompts, most = self._steps.largest, self._prompts, math.inf
        if self._itl_slo_s is None:
            return most
        if scored:
            most = max(MIN_CHUNK, _GROWTH * largest.num_scored) - prompts.num_scored
        if self._num_decoded or self._forced.num_prompt:
            tokens = max(MIN_CHUNK, _GROWTH * largest.num_prompt) - prompts.num_prompt
            pairs = max(MIN_CHUNK**2, _GROWTH * largest.num_pairs) - prompts.num_pairs
            most = min(most, tokens, pairs / (start + 1))
        return most
