"""Usage events in the store while the catalog takes none, so that they outlive the disk of their process.

    usage/JOURNAL/N.jsonl   some events of a journal, a JSON object a line

The journal has them too, and whoever finds the catalog first sends them: an event that comes twice counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from loray.errors import NotFoundError
from loray.spec import UsageEvent
from loray.store.objects import ObjectStore
from loray.telemetry import get_logger

_log = get_logger(__name__)

PREFIX = "usage"


class StoredEvents:
    """Those of one journal are put, those of all are taken. Used from one thread."""

    def __init__(self, open_objects: Callable[[], ObjectStore], journal: str) -> None:
        self._open, self._journal = open_objects, journal
        self._objects: ObjectStore | None = None
        self._num_put = 0

    def put(self, events: Sequence[UsageEvent]) -> None:
        """Raises StoreError."""
        data = "".join(f"{event.to_json()}\n" for event in events).encode()
        self._known().put_if_absent(f"{PREFIX}/{self._journal}/{self._num_put:06}.jsonl", data)
        self._num_put += 1

    def all(self) -> Iterator[tuple[str, list[UsageEvent]]]:
        """(key, events) of each object. Raises StoreError."""
        for key in self._known().list(f"{PREFIX}/"):
            try:
                lines = self._known().get(key).splitlines()
            except NotFoundError:  # another process has sent them
                continue
            events = []
            for line in lines:
                try:
                    events.append(UsageEvent.from_json(line))
                except ValueError:
                    _log.warning("%s in the store has a line that is no usage event; it is left out", key)
            yield key, events

    def delete(self, key: str) -> None:
        """Raises StoreError."""
        self._known().delete(key)

    def _known(self) -> ObjectStore:
        if self._objects is None:
            self._objects = self._open()
        return self._objects
