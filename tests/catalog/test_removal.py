"""Deleted names and versions do not exist, keep their place, and come back as they were."""

from __future__ import annotations

from datetime import timedelta

import pytest

from loray.catalog import Catalog, removal
from loray.errors import AdapterNotFound, ConflictError
from loray.spec import TrainSpec
from tests.fixtures.calls import refused
from tests.fixtures.recipes import RECIPE
from tests.fixtures.versions import digest, manifest, publish


def test_a_deleted_version_does_not_exist_and_its_number_is_not_used_again(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    before = catalog.snapshot()
    catalog.removal.delete_version("tone", 3)
    for model in ("tone@3", "tone@9"):
        refused(AdapterNotFound, "", catalog.adapters.resolve, model)
    assert catalog.adapters.resolve("tone").version == catalog.snapshot(before).resolve("tone").version == 2
    assert [v.version for v in catalog.adapters.versions("tone", limit=9).items] == [2, 1]
    refused(AdapterNotFound, "no version 3", catalog.aliases.move, "tone", "prod", 3)
    publish(catalog, "tone", 4)
    assert catalog.adapters.resolve("tone").version == 4
    catalog.removal.restore("tone", 3)
    assert catalog.adapters.resolve("tone@3").digest == digest(3)
    refused(AdapterNotFound, "no deleted version 3", catalog.removal.restore, "tone", 3)


def test_a_version_under_an_alias_stays_until_the_alias_moves(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, aliases=("prod",))
    refused(ConflictError, "tone@2 is what prod points at", catalog.removal.delete_version, "tone", 2)
    catalog.aliases.move("tone", "prod", 1)
    catalog.removal.delete_version("tone", 2)
    catalog.aliases.rollback("tone")  # past the deleted version, to the target before it
    assert catalog.adapters.resolve("tone").version == 1
    catalog.aliases.delete("tone", "prod")
    refused(ConflictError, "the only version", catalog.removal.delete_version, "tone", 1)
    catalog.removal.restore("tone", 2)
    assert catalog.adapters.resolve("tone@2").digest == digest(2)


def test_a_deleted_name_is_nobodys_and_comes_back_with_its_aliases(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, aliases=("prod",))
    publish(catalog, "other", 1)
    catalog.removal.delete_version("tone", 1)
    before = catalog.snapshot()
    catalog.removal.delete_adapter("tone")
    after = catalog.snapshot(before)
    for resolve in (catalog.adapters.resolve, after.resolve, catalog.adapters.get):
        refused(AdapterNotFound, "", resolve, "tone")
    assert [entry.name for entry in catalog.adapters.page(limit=9)] == ["other"]
    for change in (lambda: publish(catalog, "tone", 3), lambda: catalog.adapters.check_name("tone")):
        refused(ConflictError, r"'tone' was deleted: restore it \(`loray adapters restore tone`\)", change)
    refused(AdapterNotFound, "a deleted name is restored before its versions", catalog.removal.restore, "tone", 1)
    refused(AdapterNotFound, "", catalog.removal.delete_adapter, "tone")
    catalog.removal.restore("tone")
    assert catalog.snapshot(after).resolve("tone@prod").version == 2
    assert sorted(catalog.adapters.get("tone").aliases) == ["prod"]
    refused(AdapterNotFound, "", catalog.adapters.resolve, "tone@1")  # it was deleted before
    catalog.removal.restore("tone", 1)


def test_publishing_a_deleted_version_again_restores_it(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    catalog.removal.delete_version("tone", 1)
    assert catalog.adapters.register("tone", digest(1), manifest(1)).version == 1
    assert catalog.adapters.resolve("tone@1").digest == digest(1)


def test_a_name_for_which_a_job_trains_stays(catalog: Catalog) -> None:
    publish(catalog, "tone", 1)
    catalog.jobs.add("j", name="tone", recipe=TrainSpec.parse(RECIPE, source="recipe"))
    refused(ConflictError, "job j trains 'tone': stop it first", catalog.removal.delete_adapter, "tone")


def test_what_is_needed(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    publish(catalog, "other", 4)
    catalog.removal.delete_version("tone", 1)
    catalog.removal.delete_adapter("other")
    assert catalog.removal.references(keep_deleted_s=60).files.keys() == {digest(n) for n in (1, 2, 3, 4)}
    found = catalog.removal.references(keep_deleted_s=0)
    assert found.files == {digest(n): {digest(n)} for n in (2, 3)}
    names = [digest(n) for n in range(6)]
    with catalog.claims.deleting(names, found, keep_deleted_s=0) as allowed:
        assert allowed.names == {*names}
    catalog.removal.restore("tone", 1)
    publish(catalog, "new", 5)
    with catalog.claims.deleting(names, found, keep_deleted_s=0) as allowed:
        assert allowed.names == {digest(n) for n in (0, 4)}


def test_what_is_published_is_not_deleted(catalog: Catalog) -> None:
    before = catalog.removal.references(keep_deleted_s=0)
    names = [digest(1), digest(2)]
    with catalog.claims.publishing(names[:1]) as claim:
        with catalog.claims.deleting(names, before, keep_deleted_s=0) as allowed:
            assert allowed.names == {digest(2)}
        catalog.adapters.register("tone", digest(1), manifest(1), claim=claim)
    with catalog.claims.deleting(names, before, keep_deleted_s=0) as allowed:
        assert allowed.names == {digest(2)}
    with pytest.raises(ZeroDivisionError), catalog.claims.publishing(names):
        raise ZeroDivisionError
    with catalog.claims.deleting(names, before, keep_deleted_s=0) as allowed:
        assert allowed.names == {digest(2)}


def test_a_publication_waits_for_deletions_of_its_objects_alone(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = list[float]()
    monkeypatch.setattr(removal, "sleep", waits.append)
    before = catalog.removal.references(keep_deleted_s=0)
    deleting = catalog.claims.deleting([digest(1)], before, keep_deleted_s=0)
    deleting.__enter__()
    with catalog.claims.publishing([digest(2)]):
        assert waits == []

    def end(_: float) -> None:
        deleting.__exit__(None, None, None)
        monkeypatch.setattr(removal, "sleep", waits.append)

    monkeypatch.setattr(removal, "sleep", end)
    with catalog.claims.publishing([digest(1), digest(2)]) as claim:
        assert waits == []
        catalog.adapters.register("tone", digest(1), manifest(1), claim=claim)


def test_a_collection_that_was_killed_is_waited_for_until_its_claim_lapses(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its deletions may still be under way."""
    before = catalog.removal.references(keep_deleted_s=0)
    with pytest.raises(ZeroDivisionError), catalog.claims.deleting([digest(1)], before, keep_deleted_s=0):
        raise ZeroDivisionError
    monkeypatch.setattr(removal, "_LONGEST_WAIT_S", 0.0)
    refused(
        ConflictError, "was cut off while it deleted the same files", catalog.claims.publishing([digest(1)]).__enter__
    )
    moved = removal.now() + timedelta(minutes=11)
    monkeypatch.setattr(removal, "now", lambda: moved)
    with catalog.claims.publishing([digest(1)]) as claim:
        catalog.adapters.register("tone", digest(1), manifest(1), claim=claim)


def test_a_publication_that_took_too_long_is_refused_before_its_claim_lapses(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = catalog.removal.references(keep_deleted_s=0)
    started = removal.now()
    with catalog.claims.publishing([digest(1)]) as claim:
        monkeypatch.setattr(removal, "now", lambda: started + timedelta(hours=13))
        refused(
            ConflictError,
            "took more than 12 hours",
            catalog.adapters.register,
            "tone",
            digest(1),
            manifest(1),
            claim=claim,
        )
        with catalog.claims.deleting([digest(1)], before, keep_deleted_s=0) as allowed:
            assert not allowed.names
        monkeypatch.setattr(removal, "now", lambda: started + timedelta(hours=25))
        with catalog.claims.deleting([digest(1)], before, keep_deleted_s=0) as allowed:
            assert allowed.names == {digest(1)}
