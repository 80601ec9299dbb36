"""Leases: one holder at a time, by the database's clock."""

from __future__ import annotations

import pytest

from loray.catalog import Catalog
from loray.catalog import leases as module
from loray.catalog.leases import Lease, check_lease
from loray.errors import ConflictError

FIRST, SECOND = Lease("batches", "a"), Lease("batches", "b")


def check(catalog: Catalog, lease: Lease) -> None:
    with catalog._db.changing() as c:
        check_lease(c, lease)


def test_one_holds_it_until_it_leaves_or_its_time_is_over(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConflictError):
        check(catalog, FIRST)
    assert catalog.leases.hold(FIRST)
    assert catalog.leases.hold(FIRST)
    assert not catalog.leases.hold(SECOND)
    assert catalog.leases.hold(Lease("others", "b"))
    check(catalog, FIRST)
    with pytest.raises(ConflictError):
        check(catalog, SECOND)
    catalog.leases.leave(SECOND)
    assert not catalog.leases.hold(SECOND)
    catalog.leases.leave(FIRST)
    monkeypatch.setattr(module, "HOLD_S", -1.0)
    assert catalog.leases.hold(SECOND)
    with pytest.raises(ConflictError):
        check(catalog, SECOND)
    assert catalog.leases.hold(FIRST)
