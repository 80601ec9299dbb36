"""How far an adapter has come that may be used before the whole of it is there.

Its loader's thread writes, the engine's thread reads and waits. Bytes are named by the SHA-256 of whole files, so what
is computed on an adapter counts for nothing until it has landed.
"""

from __future__ import annotations

import sys
from threading import Condition


class Arrival:
    """Layers come in order. `late`: the engine's alone; a step has waited for it in vain, so none is to try again
    before it is done.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._num_layers = 0
        self._landed = self._used = False
        self.error: Exception | None = None
        self.late = False

    @property
    def num_layers(self) -> int:
        """So many of the base's first layers are there, at least."""
        return self._num_layers

    @property
    def landed(self) -> bool:
        """All bytes are here and verified."""
        return self._landed

    @property
    def done(self) -> bool:
        """Landed or failed."""
        return self._landed or self.error is not None

    # -- the loader's -------------------------------------------------------------------------------------------------

    def advance(self, num_layers: int) -> None:
        """The rows of the base's first `num_layers` layers are there, and those without a layer."""
        with self._changed:
            self._num_layers = num_layers
            self._changed.notify_all()

    def land(self) -> None:
        with self._changed:
            self._num_layers = sys.maxsize
            self._landed = True
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def wait_until_used(self, timeout_s: float) -> None:
        """Until a step on it is over, or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._used, timeout_s)

    # -- the engine's -------------------------------------------------------------------------------------------------

    def wait_for_layers(self, num_layers: int, timeout_s: float) -> int:
        """Until that many layers are there, it is done, or the time is up; how many are there then."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_layers >= num_layers or self.done, timeout_s)
            return self._num_layers

    def use(self) -> None:
        """A step on it is over."""
        with self._changed:
            self._used = True
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Until it is done or the time is up; True where it has landed."""
        with self._changed:
            self._changed.wait_for(lambda: self.done, timeout_s)
            return self._landed
