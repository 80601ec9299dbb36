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
    catalog.delete_version("tone", 3)
    for model in ("tone@3", "tone@9"):
        refused(AdapterNotFound, "", catalog.resolve, model)
    assert catalog.resolve("tone").version == catalog.snapshot(before).resolve("tone").version == 2
    assert [v.version for v in catalog.versions("tone", limit=9).versions] == [2, 1]
    refused(AdapterNotFound, "no version 3", catalog.promote, "tone", "prod", 3)
    publish(catalog, "tone", 4)
    assert catalog.resolve("tone").version == 4
    catalog.restore("tone", 3)
    assert catalog.resolve("tone@3").digest == digest(3)
    refused(AdapterNotFound, "no deleted version 3", catalog.restore, "tone", 3)


def test_a_version_under_an_alias_stays_until_the_alias_moves(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, aliases=("prod",))
    refused(ConflictError, "tone@2 is what prod points at", catalog.delete_version, "tone", 2)
    catalog.promote("tone", "prod", 1)
    catalog.delete_version("tone", 2)
    catalog.rollback("tone")  # past the deleted version, to the target before it
    assert catalog.resolve("tone").version == 1
    catalog.delete_alias("tone", "prod")
    refused(ConflictError, "the only version", catalog.delete_version, "tone", 1)
    catalog.restore("tone", 2)
    assert catalog.resolve("tone@2").digest == digest(2)


def test_a_deleted_name_is_nobodys_and_comes_back_with_its_aliases(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, aliases=("prod",))
    publish(catalog, "other", 1)
    catalog.delete_version("tone", 1)
    before = catalog.snapshot()
    catalog.delete_adapter("tone")
    after = catalog.snapshot(before)
    for resolve in (catalog.resolve, after.resolve, catalog.entry):
        refused(AdapterNotFound, "", resolve, "tone")
    assert [entry.name for entry in catalog.names(limit=9)] == ["other"]
    for change in (lambda: publish(catalog, "tone", 3), lambda: catalog.check_name("tone")):
        refused(ConflictError, r"'tone' was deleted: restore it \(`loray adapters restore tone`\)", change)
    refused(AdapterNotFound, "a deleted name is restored before its versions", catalog.restore, "tone", 1)
    refused(AdapterNotFound, "", catalog.delete_adapter, "tone")
    catalog.restore("tone")
    assert catalog.snapshot(after).resolve("tone@prod").version == 2
    assert sorted(catalog.entry("tone").aliases) == ["prod"]
    refused(AdapterNotFound, "", catalog.resolve, "tone@1")  # it was deleted before
    catalog.restore("tone", 1)


def test_publishing_a_deleted_version_again_restores_it(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    catalog.delete_version("tone", 1)
    assert catalog.register("tone", digest(1), manifest(1)).version == 1
    assert catalog.resolve("tone@1").digest == digest(1)


def test_a_name_for_which_a_job_trains_stays(catalog: Catalog) -> None:
    publish(catalog, "tone", 1)
    catalog.add_job("j", name="tone", recipe=TrainSpec.parse(RECIPE, source="recipe"))
    refused(ConflictError, "job j trains 'tone': stop it first", catalog.delete_adapter, "tone")


def test_what_is_needed(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    publish(catalog, "other", 4)
    catalog.delete_version("tone", 1)
    catalog.delete_adapter("other")
    assert catalog.references(keep_deleted_s=60).files.keys() == {digest(n) for n in (1, 2, 3, 4)}
    found = catalog.references(keep_deleted_s=0)
    assert found.files == {digest(n): {digest(n)} for n in (2, 3)}
    names = [digest(n) for n in range(6)]
    with catalog.deleting(names, found, keep_deleted_s=0) as allowed:
        assert allowed.names == {*names}
    catalog.restore("tone", 1)
    publish(catalog, "new", 5)
    with catalog.deleting(names, found, keep_deleted_s=0) as allowed:
        assert allowed.names == {digest(n) for n in (0, 4)}


def test_what_is_published_is_not_deleted(catalog: Catalog) -> None:
    before = catalog.references(keep_deleted_s=0)
    names = [digest(1), digest(2)]
    with catalog.publishing(names[:1]) as claim:
        with catalog.deleting(names, before, keep_deleted_s=0) as allowed:
            assert allowed.names == {digest(2)}
        catalog.register("tone", digest(1), manifest(1), claim=claim)
    with catalog.deleting(names, before, keep_deleted_s=0) as allowed:
        assert allowed.names == {digest(2)}
    with pytest.raises(ZeroDivisionError), catalog.publishing(names):
        raise ZeroDivisionError
    with catalog.deleting(names, before, keep_deleted_s=0) as allowed:
        assert allowed.names == {digest(2)}


def test_a_publication_waits_for_deletions_of_its_objects_alone(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = list[float]()
    monkeypatch.setattr(removal, "sleep", waits.append)
    before = catalog.references(keep_deleted_s=0)
    deleting = catalog.deleting([digest(1)], before, keep_deleted_s=0)
    deleting.__enter__()
    with catalog.publishing([digest(2)]):
        assert waits == []

    def end(_: float) -> None:
        deleting.__exit__(None, None, None)
        monkeypatch.setattr(removal, "sleep", waits.append)

    monkeypatch.setattr(removal, "sleep", end)
    with catalog.publishing([digest(1), digest(2)]) as claim:
        assert waits == []
        catalog.register("tone", digest(1), manifest(1), claim=claim)


def test_a_collection_that_was_killed_is_waited_for_until_its_claim_lapses(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its deletions may still be under way."""
    before = catalog.references(keep_deleted_s=0)
    with pytest.raises(ZeroDivisionError), catalog.deleting([digest(1)], before, keep_deleted_s=0):
        raise ZeroDivisionError
    monkeypatch.setattr(removal, "_LONGEST_WAIT_S", 0.0)
    refused(ConflictError, "was cut off while it deleted the same files", catalog.publishing([digest(1)]).__enter__)
    moved = removal.now() + timedelta(minutes=11)
    monkeypatch.setattr(removal, "now", lambda: moved)
    with catalog.publishing([digest(1)]) as claim:
        catalog.register("tone", digest(1), manifest(1), claim=claim)


def test_a_publication_that_took_too_long_is_refused_before_its_claim_lapses(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = catalog.references(keep_deleted_s=0)
    started = removal.now()
    with catalog.publishing([digest(1)]) as claim:
        monkeypatch.setattr(removal, "now", lambda: started + timedelta(hours=13))
        refused(ConflictError, "took more than 12 hours", catalog.register, "tone", digest(1), manifest(1), claim=claim)
        with catalog.deleting([digest(1)], before, keep_deleted_s=0) as allowed:
            assert not allowed.names
        monkeypatch.setattr(removal, "now", lambda: started + timedelta(hours=25))
        with catalog.deleting([digest(1)], before, keep_deleted_s=0) as allowed:
            assert allowed.names == {digest(1)}
