"""`PartialLoad` says how much is there of an adapter that can be used before it is complete.

Its loader's thread writes, the engine's thread reads and waits. A file's SHA-256 is known only when the whole file is
there, so nothing that was computed with an adapter is kept or sent before the adapter is complete.
"""

from __future__ import annotations

import sys
from threading import Condition


class PartialLoad:
    """Layers come in order. Only the engine writes `late`: True after a step has waited in vain; no further step waits
    for the adapter before it is done.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._num_layers = 0
        self._complete = self._used = False
        self.error: Exception | None = None
        self.late = False

    @property
    def num_layers(self) -> int:
        """At least so many of the base's first layers are there."""
        return self._num_layers

    @property
    def complete(self) -> bool:
        """All bytes are there and verified."""
        return self._complete

    @property
    def done(self) -> bool:
        """Complete or failed."""
        return self._complete or self.error is not None

    # -- for the loader -----------------------------------------------------------------------------------------------

    def advance(self, num_layers: int) -> None:
        """The rows of the base's first `num_layers` layers are there, and the rows without a layer."""
        with self._changed:
            self._num_layers = num_layers
            self._changed.notify_all()

    def finish(self) -> None:
        """The adapter is complete."""
        with self._changed:
            self._num_layers = sys.maxsize
            self._complete = True
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def wait_until_used(self, timeout_s: float) -> None:
        """Until a step that uses the adapter has ended, or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._used, timeout_s)

    # -- for the engine -----------------------------------------------------------------------------------------------

    def wait_for_layers(self, num_layers: int, timeout_s: float) -> int:
        """Until that many layers are there, the adapter is done, or the time is up; returns how many are there."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_layers >= num_layers or self.done, timeout_s)
            return self._num_layers

    def mark_used(self) -> None:
        """A step that uses the adapter has ended."""
        with self._changed:
            self._used = True
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Until the adapter is done or the time is up; True if it is complete."""
        with self._changed:
            self._changed.wait_for(lambda: self.done, timeout_s)
            return self._complete
