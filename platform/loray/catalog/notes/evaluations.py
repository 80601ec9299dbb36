"""Evaluations of adapters recorded after they were published. Earlier ones are in their manifests."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from loray.catalog.database import Database, reading, writing
from loray.catalog.queries import load_evaluations, lock, log, now, owned
from loray.catalog.schema import adapters, evaluations, versions
from loray.errors import AdapterNotFound
from loray.spec import Evaluation


class Evaluations(Database):
    """The catalog's operations on evaluations. They do not count as changes, since serving does not depend on them."""

    def record_evaluations(self, digest: str, measured: Sequence[Evaluation]) -> None:
        """Record evaluations of the adapter, for each tenant that has it and whose adapters the caller may change.

        Raises AdapterNotFound where there is none.
        """
        with writing(self._engine) as c:
            lock(c)
            query = sa.select(adapters.c.tenant).join(versions, versions.c.adapter_id == adapters.c.id)
            query = query.where(versions.c.digest == digest, owned(self._principal))
            tenants = c.scalars(query.distinct().order_by(adapters.c.tenant)).all()
            if not tenants:
                raise AdapterNotFound(f"no adapter has digest {digest[:12]}; publish it first")
            common = {"digest": digest, "actor": self._actor, "created_at": now()}
            for tenant in tenants if measured else ():
                c.execute(evaluations.insert(), [e.model_dump() | common | {"tenant": tenant} for e in measured])
                log(c, self._actor, "evaluate", digest, tenant=tenant, count=len(measured))

    def evaluations(self, digest: str) -> tuple[Evaluation, ...]:
        """Evaluations recorded after publication for the caller's tenant, the oldest first."""
        with reading(self._engine) as c:
            return load_evaluations(c, self._principal.tenant, digest)
