"""Evaluations of adapters recorded after they were published. Earlier ones are in their manifests."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from loray.catalog.database import Database, reading, writing
from loray.catalog.queries import load_evaluations, lock, log, now
from loray.catalog.schema import evaluations, versions
from loray.errors import AdapterNotFound
from loray.spec import Evaluation


class Evaluations(Database):
    """The catalog's operations on evaluations. They do not count as changes, since serving does not depend on them."""

    def record_evaluations(self, digest: str, measured: Sequence[Evaluation]) -> None:
        """Record evaluations of the adapter. Raises AdapterNotFound where no version has this digest."""
        with writing(self._engine) as c:
            lock(c)
            if c.execute(sa.select(versions.c.id).where(versions.c.digest == digest)).first() is None:
                raise AdapterNotFound(f"no adapter has digest {digest[:12]}; publish it first")
            rows = [e.model_dump() | {"digest": digest, "actor": self._actor, "created_at": now()} for e in measured]
            if rows:
                c.execute(evaluations.insert(), rows)
                log(c, self._actor, "evaluate", digest, count=len(rows))

    def evaluations(self, digest: str) -> tuple[Evaluation, ...]:
        """Evaluations recorded after publication, the oldest first."""
        with reading(self._engine) as c:
            return load_evaluations(c, digest)
