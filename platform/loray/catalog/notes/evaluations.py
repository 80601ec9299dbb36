"""Evaluations of adapters recorded after they were published. Earlier ones are in their manifests."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from loray.catalog.database import Database, reading, writing
from loray.catalog.entries import AdapterVersion
from loray.catalog.queries import load_entry, load_evaluations, load_version, lock, log, now, owned
from loray.catalog.schema import adapters, evaluations, versions
from loray.errors import AdapterNotFound, ConflictError
from loray.spec import Evaluation

MAX_REPORTED = 1024  # evaluations of an adapter


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
            for tenant in tenants if measured else ():
                self._add(c, digest, tenant, measured)

    def report_evaluations(self, name: str, version: int, reported: Sequence[Evaluation]) -> AdapterVersion:
        """Record for the tenant that has the version what somebody else has measured: the gate may not believe it.

        Raises AdapterNotFound, PermissionDenied for another tenant's name, and ConflictError for too many.
        """
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            digest = entry.select(str(version)).digest
            mine = (evaluations.c.digest == digest, evaluations.c.tenant == entry.tenant)
            of_clients = sa.select(sa.func.count()).where(*mine, evaluations.c.measured_by.is_not(None))
            known = c.execute(of_clients).scalar_one()
            if known + len(reported) > MAX_REPORTED:
                raise ConflictError(
                    f"{entry.name}@{version} has {known} evaluations that clients have reported, and may have "
                    f"{MAX_REPORTED:,} of them"
                )
            self._add(c, digest, entry.tenant, reported, measured_by="key")
            return load_version(c, entry.name, adapter_id, version).shown_to(self._principal)

    def _add(
        self,
        c: sa.Connection,
        digest: str,
        tenant: str,
        measured: Sequence[Evaluation],
        measured_by: str | None = None,
    ) -> None:
        common: dict[str, object] = {"digest": digest, "tenant": tenant, "measured_by": measured_by}
        common |= {"actor": self._actor, "created_at": now()}
        c.execute(evaluations.insert(), [e.model_dump() | common for e in measured])
        log(c, self._actor, "evaluate", digest, tenant=tenant, count=len(measured))

    def evaluations(self, digest: str) -> tuple[Evaluation, ...]:
        """Evaluations recorded after publication for the caller's tenant, the oldest first."""
        with reading(self._engine) as c:
            return load_evaluations(c, self._principal.tenant, digest)
