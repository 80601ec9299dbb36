"""VeRA's frozen pairs that the adapters of a base share.

A replica holds a pair once for all adapters that use it. For each shape (rank, max_in, max_out), the first pair
registered for a base is the canonical one of a tenant. An adapter with another pair is served, too, but costs one more
pair.
"""

from __future__ import annotations

import sqlalchemy as sa

from loray.catalog.database import Database, reading
from loray.catalog.queries import now
from loray.catalog.schema import projections
from loray.spec import DEFAULT_TENANT, DTYPE_BYTES, Projection

_COLUMNS = [projections.c[name] for name in Projection.model_fields]


class Projections(Database):
    """The catalog's operations on pairs."""

    def projections(self, base_fingerprint: str) -> tuple[Projection, ...]:
        """The pairs of a base's adapters in the order of first registration. The first of a shape is canonical.

        The caller's tenant's and the default tenant's, which others should share; an administrator gets all.
        """
        with reading(self._engine) as c:
            principal = self._principal
            return _of(c, base_fingerprint, None if principal.is_admin else (principal.tenant, DEFAULT_TENANT))


def note_projection(c: sa.Connection, tenant: str, base_fingerprint: str, projection: Projection) -> str | None:
    """Record the pair of a tenant's adapter. Returns a warning where it is not the canonical one of its shape."""
    known = _of(c, base_fingerprint, (tenant, DEFAULT_TENANT))
    canonical = next((p for p in known if _shape(p) == _shape(projection)), projection)
    if projection.sha256 not in {p.sha256 for p in known}:
        row = projection.model_dump() | {"base_fingerprint": base_fingerprint, "tenant": tenant, "created_at": now()}
        c.execute(projections.insert().values(row))
    if canonical.sha256 == projection.sha256:
        return None
    size = (projection.max_in + projection.max_out) * projection.rank * DTYPE_BYTES["bfloat16"] / 1e6
    if canonical.key == projection.key:
        return (
            f"its VeRA pair is not the canonical one of this base, though its key is {canonical.key} too: another "
            f"PyTorch drew it, or it is another's own; replicas hold {size:.1f} MB more for it"
        )
    return (
        f"its VeRA pair has key {projection.key}, not {canonical.key} as the canonical one of this base: replicas hold "
        f"{size:.1f} MB more for it; train with projection_prng_key: {canonical.key} to share"
    )


def canonical_digests(found: tuple[Projection, ...]) -> frozenset[str]:
    """The digests of the canonical pairs among `found`, all pairs of a base in order."""
    first: dict[tuple[int, int, int], str] = {}
    for projection in found:
        first.setdefault(_shape(projection), projection.sha256)
    return frozenset(first.values())


def _of(c: sa.Connection, base_fingerprint: str, tenants: tuple[str, ...] | None) -> tuple[Projection, ...]:
    """The pairs that adapters of these tenants (None: of all) brought, each once."""
    query = sa.select(*_COLUMNS).where(projections.c.base_fingerprint == base_fingerprint).order_by(projections.c.id)
    if tenants is not None:
        query = query.where(projections.c.tenant.in_(tenants))
    found: dict[str, Projection] = {}
    for row in c.execute(query):
        found.setdefault(row.sha256, Projection(**row._asdict()))
    return tuple(found.values())


def _shape(projection: Projection) -> tuple[int, int, int]:
    return projection.rank, projection.max_in, projection.max_out
