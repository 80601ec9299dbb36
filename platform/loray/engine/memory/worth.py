"""What evicting a block would cost: one measure for the KV blocks of known prefixes and for adapters.

    value = floor at the last use + expected further uses · seconds to have it again / blocks that it frees

What has the lowest value is evicted first (GreedyDual-Size-Frequency). The floor is the value of what was evicted
last. It rises, so the value of what is not used falls behind, however long it takes to have it again. Seconds are
measured. Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP
Laboratories, 1998; there, all uses count as expected ones.
"""

from __future__ import annotations

_MEMORY = 4096  # after that many further items, an item's weight in the share has fallen to 1/e


class Floor:
    """Shared by all that compete for the pool's blocks."""

    def __init__(self) -> None:
        self.value = 0.0

    def evicted(self, value: float) -> None:
        self.value = max(self.value, value)


class Reuse:
    """How often items of one class are used again.

    Most prompts are never seen again, and most adapters are: an item that was used once is worth the share of such
    items that were used a second time. Every use after the first counts whole.
    """

    def __init__(self) -> None:
        self._num_items, self._num_used_again = 2.0, 1.0  # before anything is known: one in two

    def used(self, uses: int) -> None:
        """An item was used; `uses` with this one."""
        if uses == 1:
            keep = 1 - 1 / _MEMORY
            self._num_items = keep * self._num_items + 1
            self._num_used_again *= keep
        elif uses == 2:
            self._num_used_again += 1

    def expected(self, uses: int) -> float:
        """Further uses of an item with so many uses."""
        return max(0, uses - 1) + min(1.0, self._num_used_again / self._num_items)
