"""What a server knows of the catalog on disk, for one that starts while the database is away.

A file of JSON lines: a header, blocks of items, and a last line with the SHA-256 of all before it. Its time of
modification says when it was last known to be current. Only its owner may read it: it speaks of all tenants.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Generic, NamedTuple, TypeVar

from loray.catalog.database import shown_url
from loray.errors import IntegrityError, SpecError
from loray.files import check_private, read_json_lines, replacing_private, write_json_lines
from loray.telemetry import get_logger

_log = get_logger(__name__)

T = TypeVar("T")

_FORMAT = 3
_BLOCK = 200  # items of a line: encoding one holds Python's lock
_MAX_BYTES = 2 << 30


class Kept(NamedTuple, Generic[T]):
    """What is in a file, which was current `age_s` seconds ago."""

    state: T
    age_s: float


@dataclass(frozen=True)
class KeptFile(ABC, Generic[T]):
    """A file with something of the catalog at `catalog_url`: a subclass says what, and how it is JSON.

    WHAT       its name in warnings
    MAX_AGE_S  after which it is not used
    """

    path: Path
    catalog_url: str

    WHAT: ClassVar[str]
    MAX_AGE_S: ClassVar[float] = float("inf")

    @abstractmethod
    def _header(self, state: T) -> dict[str, Any]:
        """What is said once."""

    @abstractmethod
    def _items(self, state: T) -> Iterator[list[Any]]:
        """What there may be much of."""

    @abstractmethod
    def _state(self, header: dict[str, Any], items: Iterable[list[Any]]) -> T:
        """From what the two others gave. Raises KeyError, TypeError, ValueError or SpecError where it is damaged."""

    def write(self, state: T) -> bool:
        """Replaces the file; False, with a warning, where that is not possible."""
        header = {"format": _FORMAT, "catalog": _name_of(self.catalog_url)} | self._header(state)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing_private(self.path) as f:
                write_json_lines(f, _lines(header, self._items(state)))
        except OSError as e:
            _log.warning("the catalog's %s cannot be kept in %s: %s", self.WHAT, self.path, e)
            return False
        return True

    def read(self) -> Kept[T] | None:
        """None where there is nothing that can be used, with a warning that says why."""
        try:
            with self.path.open("rb") as f:
                return self._read(f, max(0.0, time.time() - check_private(f, _MAX_BYTES)))
        except FileNotFoundError:
            return None
        except (OSError, IntegrityError) as e:
            _log.warning("the catalog's %s in %s are not used: %s", self.WHAT, self.path, e)
            return None

    def _read(self, f: BinaryIO, age_s: float) -> Kept[T]:
        lines = read_json_lines(f)
        try:
            header = next(lines)
            if header.get("format") != _FORMAT:
                raise IntegrityError(
                    f"another loray wrote it (format {header.get('format')}, this one reads {_FORMAT})"
                )
            if header["catalog"] != _name_of(self.catalog_url):
                raise IntegrityError("it is of another catalog")
            if age_s > self.MAX_AGE_S:
                raise IntegrityError(f"it is {age_s / 3600:.0f} h old")
            return Kept(self._state(header, (item for block in lines for item in block["items"])), age_s)
        except (AttributeError, KeyError, TypeError, ValueError, SpecError, StopIteration) as e:
            raise IntegrityError(f"it is damaged: {e!r}") from e


def _name_of(catalog_url: str) -> str:
    """Names a catalog without telling its address or password."""
    return hashlib.sha256(shown_url(catalog_url).encode()).hexdigest()


def _lines(header: dict[str, Any], items: Iterator[list[Any]]) -> Iterator[dict[str, Any]]:
    yield header
    while block := list(islice(items, _BLOCK)):
        yield {"items": block}
