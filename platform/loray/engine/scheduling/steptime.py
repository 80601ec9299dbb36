"""How long a step takes, learned from the steps that were measured.

The model: seconds = Σ cost · quantity over the quantities of `Work`. The fixed cost is for reading the weights and for
launching a step; a decoded request and a prompt's token cost differently, since one token for each of many requests
reads the cache of each, while a prompt's tokens share it. All costs are at least 0.

The costs are a least-squares fit over the past steps. Older steps weigh less, and steps with and without prompts are
forgotten apart: an hour of decoding does not wash out what a prompt costs. Projected Gauss-Seidel sweeps, which start
from the costs known before, keep them non-negative. Where the steps do not tell two costs apart (every step
was alike) the sweeps leave their ratio as it was; so the fit cannot run away as an exact solution would. Steps that the
budget makes equally long would be explained by a fixed cost alone: it is limited by the shortest step of late.
"""

from __future__ import annotations

import math
from operator import add, le, mul

from loray.engine.scheduling.plan import Work

_MEMORY_STEPS = 128  # after that many further steps of its kind, a step's weight in the fit has fallen to 1/e
_SWEEPS = 4  # for each measured step
_KEEP = 1 - 1 / _MEMORY_STEPS
_OUTLIER = 4.0
_CHANGED = 3  # so many exceptions of a kind, without another step of it between them, are what steps take now
_SURE = 16  # measured steps of a kind, after which the fit is believed
_RISE = 1 + 1 / 2048  # of the shortest time, with each step that does not confirm it
_SIZE = len(Work._fields)
# The first steps are explained by these in order. A prompt's tokens come before the fixed cost, so that the first chunk
# does not make the next one look free.
_ORDER = [Work._fields.index(name) for name in ("num_prompt", "num_steps")]
_ORDER += [i for i in range(_SIZE) if i not in _ORDER]


class StepTime:
    """Owns the costs. Reading them takes no time, measuring a step about 30 µs."""

    def __init__(self) -> None:
        self.costs = Work()
        self.largest = Work()  # of each quantity, in any measured step
        self.last_with_prompts = (Work(), math.inf)  # and its seconds
        self._shortest = math.inf  # seconds of a step; the fixed cost is no more
        # Of steps without and with prompts: Σ w · x xᵀ and, as its last row, Σ w · x · seconds.
        self._sums = [[[0.0] * _SIZE for _ in range(_SIZE + 1)] for _ in range(2)]
        self._num_steps = [0, 0]
        self._exceptions = [0, 0]  # of each kind, since its last other step

    @property
    def is_known(self) -> bool:
        """A step has been measured. Before that every prediction is 0."""
        return self.largest.num_steps > 0

    def predict(self, work: Work) -> float:
        """Seconds."""
        return float(sum(map(mul, self.costs, work)))

    def token_seconds(self) -> float:
        """Of one more token of a prompt, without its attention."""
        return self.costs.num_prompt

    def observe(self, work: Work, seconds: float) -> None:
        """A step with that work took that long.

        A step may be slow for reasons of its own (a kernel is compiled, another process takes the cores), never fast.
        So a step of a known size that took more than 4 times as long as predicted does not count; from the third in a
        row on it counts as 4 times. One that took less than a quarter shows that the past was the exception, and the
        past's weight is halved.
        """
        kind = int(work.num_prompt > 0)
        if kind:
            self.last_with_prompts = (work, seconds)
        predicted = self.predict(work)
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
            self._sums = [[[0.5 * s for s in row] for row in sums] for sums in self._sums]
        self._num_steps[kind] += 1
        self.largest = Work(*map(max, self.largest, work))
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
        self.costs = Work(*costs)
