"""Whether the pool suffices for what running requests will still generate.

Admission without that question fills the pool with prompts; then each further token takes the blocks of a running
request, which is computed again and again. So a request is admitted only if it and all that run can be expected to
reach their ends. Source of the formula: Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees",
ASPLOS 2025: the demand is largest when a request ends, so it is enough to look at these moments.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

_MEMORY_REQUESTS = 64
_FIRST_GUESS = 128  # tokens of an output, before any request has ended


class OutputLengths:
    """The lengths of the latest outputs, in tokens, and what they say about outputs that have not ended."""

    def __init__(self) -> None:
        self._latest: deque[int] = deque()
        self._sorted: list[int] = []
        self._means: list[float] = []  # of the lengths from each place of `_sorted` on

    def observe(self, num_output: int) -> None:
        """A request has ended."""
        if len(self._latest) == _MEMORY_REQUESTS:
            self._sorted.remove(self._latest.popleft())
        self._latest.append(num_output)
        insort(self._sorted, num_output)
        sums = accumulate(reversed(self._sorted))
        self._means = [total / n for n, total in enumerate(sums, 1)][::-1]

    @property
    def mean(self) -> float:
        """0 before a request has ended."""
        return self._means[0] if self._means else 0.0

    def remaining(self, generated: int) -> float:
        """Tokens that a request which has generated so many is expected to generate still: by the mean of the longer
        outputs, or if there is none as many again.
        """
        if not self._means:
            return max(generated, _FIRST_GUESS)
        longer = bisect_right(self._sorted, generated)
        return self._means[longer] - generated if longer < len(self._means) else generated


class Growth(NamedTuple):
    """A running request: tokens whose keys and values it has, or will have when its prompt is computed; blocks that it
    holds, or shares with other requests; tokens that it will still generate.
    """

    num_tokens: int
    num_blocks: int
    num_shared_blocks: int
    remaining: float


def blocks_wanted(running: Iterable[Growth], block_tokens: int) -> float:
    """The most blocks beyond those held now that the requests need at once, if each generates `remaining` more tokens,
    one a step, and then releases the blocks that it does not share; right to half a block for each. O(n log n).
    """
    longest_first = sorted(running, key=lambda g: -g.remaining)
    released = sum([g.num_blocks - g.num_shared_blocks for g in longest_first])
    most = num_tokens = 0.0
    num_blocks = 0
    for i, g in enumerate(longest_first, 1):  # when g ends, the first i have run until then
        num_tokens += (
            g.num_tokens + block_tokens / 2 - 1
        )  # half of the last block is empty; the last token is not stored
        num_blocks += g.num_blocks
        released -= g.num_blocks - g.num_shared_blocks
        most = max(most, (num_tokens + i * g.remaining) / block_tokens - num_blocks - released)
    return most
