"""Page writers that are late."""

from __future__ import annotations

from collections.abc import Callable


class Late:
    """The part of a PageWriter that does not write: what `write` has put into `late` is done in `wait`.

    num_late  what has been done so far
    """

    def __init__(self) -> None:
        self.late: list[Callable[[], None]] = []
        self.num_late = 0

    def wait(self) -> None:
        self.num_late += len(self.late)
        while self.late:
            self.late.pop(0)()

    def arrival(self) -> Callable[[], bool]:
        """Later than the first time that it is asked."""
        asked = iter([False])

        def arrived() -> bool:
            if next(asked, True):
                self.wait()
                return True
            return False

        return arrived
