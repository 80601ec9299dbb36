"""Aliases: promoted, rolled back, deleted; revisions that never come twice."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog
from loray.catalog.database import open_database
from loray.errors import AdapterNotFound, ConflictError, RevisionConflict
from tests.fixtures.versions import BASE, digest, publish


def test_promote_and_roll_back(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    for version in (1, 2, 3):
        assert catalog.promote("tone", "prod", version).version == version
    assert catalog.promote("tone", "prod", 3) == catalog.alias("tone", "prod")  # again: no move
    assert [catalog.rollback("tone", "prod").version for _ in range(2)] == [2, 1]
    assert catalog.resolve("tone").version == 1
    with pytest.raises(ConflictError, match="no earlier target than version 1"):
        catalog.rollback("tone", "prod")
    catalog.promote("tone", "prod", 3)
    assert catalog.rollback("tone").version == 1
    moves = catalog.adapter("tone").moves
    assert [(m.version, m.undone) for m in moves] == [(1, False), (2, True), (3, True), (3, True)]


def test_aliases_have_histories_of_their_own(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, aliases=("prod", "canary"))
    publish(catalog, "other", 1, aliases=("prod",))
    catalog.rollback("tone", "canary")
    assert catalog.adapter("tone").entry.aliases == {"prod": 2, "canary": 1}
    with pytest.raises(ConflictError, match="no earlier target"):
        catalog.rollback("other", "prod")
    with pytest.raises(AdapterNotFound, match="no alias 'beta'"):
        catalog.rollback("tone", "beta")
    with pytest.raises(AdapterNotFound, match="no adapter"):
        catalog.rollback("nothing", "prod")


def test_promotion_can_expect(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    with pytest.raises(ConflictError, match="is not set"):
        catalog.promote("tone", "prod", 1, expected=2)
    catalog.promote("tone", "prod", 1, expected=0)
    with pytest.raises(ConflictError, match="points at version 1"):
        catalog.promote("tone", "prod", 2, expected=0)
    assert catalog.promote("tone", "prod", 2, expected=1).version == 2
    with pytest.raises(AdapterNotFound, match="no version 9"):
        catalog.promote("tone", "prod", 9)


def test_revisions_never_come_twice(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    publish(catalog, "other", 1, aliases=("prod",))
    seen = []

    def note() -> int:
        state = catalog.alias("tone", "prod")
        seen.append(state.revision)
        return state.version

    catalog.promote("tone", "prod", 1, expected_revision=0)
    assert note() == 1
    catalog.promote("tone", "prod", 1)
    assert catalog.alias("tone", "prod").revision == seen[-1]  # it did not move
    catalog.promote("tone", "prod", 2, expected_revision=seen[-1])
    assert note() == 2
    catalog.rollback("tone", expected_revision=seen[-1])
    assert note() == 1  # the version is what it was at first, the revision is not
    for write in (
        lambda: catalog.promote("tone", "prod", 2, expected_revision=seen[0]),
        lambda: catalog.promote("tone", "prod", 2, expected_revision=0),
        lambda: catalog.rollback("tone", expected_revision=seen[0]),
        lambda: catalog.delete_alias("tone", "prod", expected_revision=seen[0]),
    ):
        with pytest.raises(RevisionConflict, match=f"at version 1 with revision {seen[-1]}, not"):
            write()
    catalog.delete_alias("tone", "prod", expected_revision=seen[-1])
    with pytest.raises(RevisionConflict, match="is not set with revision 0, not revision"):
        catalog.promote("tone", "prod", 2, expected_revision=seen[-1])
    catalog.promote("tone", "prod", 1, expected_revision=0)
    assert note() == 1
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)


def test_a_deleted_alias_takes_its_earlier_targets_along(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, aliases=("prod", "canary"))
    catalog.delete_alias("tone", "prod")
    assert catalog.resolve("tone@canary").version == 2
    with pytest.raises(AdapterNotFound, match="no alias 'prod'; its aliases: canary"):
        catalog.alias("tone", "prod")
    with pytest.raises(AdapterNotFound, match="no alias 'prod'"):
        catalog.delete_alias("tone", "prod")
    catalog.promote("tone", "prod", 1)
    with pytest.raises(ConflictError, match="no earlier target"):
        catalog.rollback("tone", "prod")
    assert [(s.alias, s.version, s.digest) for s in catalog.aliases("tone")] == [
        ("canary", 2, digest(2)),
        ("prod", 1, digest(1)),
    ]


def test_one_of_two_promotions_wins(catalog: Catalog, url: str) -> None:
    publish(catalog, "tone", *range(1, 9))
    catalog.promote("tone", "prod", 1)
    revision = catalog.alias("tone", "prod").revision
    barrier = threading.Barrier(7)

    def promote(version: int) -> bool:
        mine = Catalog(url)
        barrier.wait()
        try:
            if version % 2:
                mine.promote("tone", "prod", version, expected=1)
            else:
                mine.promote("tone", "prod", version, expected_revision=revision)
        except ConflictError:
            return False
        finally:
            mine.close()
        return True

    with ThreadPoolExecutor(7) as pool:
        assert sum(pool.map(promote, range(2, 9))) == 1


def test_everything_is_audited(catalog: Catalog, url: str) -> None:
    catalog.add_base("smollm2", BASE)
    publish(catalog, "tone", 1, 2, aliases=("prod",))
    catalog.rollback("tone")
    engine = open_database(url)
    with engine.connect() as db:
        rows = db.execute(sa.text("SELECT action, subject FROM audit_log ORDER BY id")).all()
    engine.dispose()
    assert [tuple(row) for row in rows] == [
        ("add_base", "smollm2"),
        ("register", "tone@1"),
        ("promote", "tone@prod"),
        ("register", "tone@2"),
        ("promote", "tone@prod"),
        ("rollback", "tone@prod"),
    ]
