"""Names, versions and aliases, on both databases: concurrent writers, promotion, rollback, resolution."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import pytest

from loray.catalog import Catalog, VersionSummary
from loray.catalog.adapters import canonical_digests
from loray.errors import AdapterNotFound, ConflictError, SpecError
from loray.spec import Evaluation, Principal
from tests.fixtures.calls import at_once, refused
from tests.fixtures.versions import BASE, digest, manifest, publish, vera_manifest

if TYPE_CHECKING:
    from sqlalchemy import QueuePool


def test_versions_count_up(catalog: Catalog) -> None:
    first = catalog.adapters.register("tone", digest(1), manifest(1))
    assert (first.label, first.digest, first.aliases) == ("tone@1", digest(1), ())
    assert first.manifest == manifest(1)
    assert catalog.adapters.register("tone", digest(2), manifest(2), ["prod"]).aliases == ("prod",)
    assert catalog.adapters.register("other", digest(2), manifest(2)).version == 1
    again = catalog.adapters.register("tone", digest(1), manifest(1), ["canary"])
    assert (again.version, again.aliases) == (1, ("canary",))
    assert list(catalog.adapters.get("tone").versions) == [1, 2]
    assert [entry.name for entry in catalog.snapshot().models()] == ["other", "tone"]


def test_the_first_pair_of_a_shape_is_the_bases(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    pairs: list[dict[str, int]] = [{}, {}, {"key": 7, "rank": 8}, {"key": 7}, {"drawn": 1}]
    for number, pair in enumerate(pairs, start=1):
        catalog.adapters.register("tone", digest(number), vera_manifest(number, **{"key": 0} | pair))
    found = catalog.bases.projections(BASE)
    assert [(p.key, p.rank) for p in found] == [(0, 256), (7, 8), (7, 256), (0, 256)]
    assert canonical_digests(found) == {found[0].sha256, found[1].sha256}
    assert catalog.bases.projections("0" * 64) == ()
    drawn_by_another_key, drawn_otherwise = (record.getMessage() for record in caplog.records)
    assert drawn_by_another_key.startswith("tone@4: its VeRA pair has key 7, not 0")
    assert "replicas hold 0.6 MB more" in drawn_by_another_key
    assert "projection_prng_key: 0" in drawn_by_another_key
    assert drawn_otherwise.startswith("tone@5: its VeRA pair is not the canonical one of this base")


def test_a_version_number_of_ones_own(catalog: Catalog) -> None:
    assert catalog.adapters.register("tone", digest(7), manifest(7), version=7).version == 7
    assert catalog.adapters.register("tone", digest(7), manifest(7), ["prod"], version=7).aliases == ("prod",)
    assert catalog.adapters.register("tone", digest(3), manifest(3), version=3).version == 3
    assert catalog.adapters.register("tone", digest(8), manifest(8)).version == 8
    with pytest.raises(ConflictError, match=r"tone@7 exists already, with other content \(digest 0000"):
        catalog.adapters.register("tone", digest(9), manifest(9), version=7)
    with pytest.raises(ConflictError, match="as version 3 already, so it cannot be 9"):
        catalog.adapters.register("tone", digest(3), manifest(3), version=9)
    refused(SpecError, "count from 1", catalog.adapters.register, "tone", digest(9), manifest(9), version=0)
    assert sorted(catalog.adapters.get("tone").versions) == [3, 7, 8]


def test_a_list_of_versions_shows_what_they_are(catalog: Catalog) -> None:
    held_out = [Evaluation(metric="loss", value=value, dataset="held-out") for value in (1.5, 2.5, 3.5)]
    told = {"job_id": "train_1", "data_fingerprint": digest(9), "evaluations": tuple(held_out[:2])}
    catalog.adapters.register("tone", digest(1), manifest(1).model_copy(update=told), ["prod", "canary"])
    catalog.adapters.register("tone", digest(2), manifest(2).model_copy(update={"sweep": "s/1"}))
    catalog.evaluations.record(digest(1), held_out[2:])
    catalog.quarantine.report_death(digest(1), "replica-1", datetime(2026, 1, 1, tzinfo=UTC), lambda _: None)
    second, first = catalog.adapters.versions("tone", limit=9).items
    for listed, version in (
        (first, catalog.adapters.version("tone", 1)),
        (second, catalog.adapters.version("tone", 2)),
    ):
        shown = {field: getattr(listed, field) for field in VersionSummary.model_fields if field != "run"}
        assert shown == {field: getattr(version, field, getattr(version.manifest, field, None)) for field in shown}
        assert listed.run == (version.manifest.job_id or version.manifest.sweep)
    assert (len(first.evaluations), first.aliases, second.run) == (3, ("canary", "prod"), "s/1")
    assert first.quarantine is not None


def test_pages_of_versions(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    first = catalog.adapters.versions("tone", limit=2)
    assert ([v.version for v in first.items], first.next) == ([3, 2], "2")
    last = catalog.adapters.versions("tone", limit=2, before=2)
    assert ([v.version for v in last.items], last.next) == ([1], None)
    assert catalog.adapters.versions("tone", limit=3).next is None
    refused(AdapterNotFound, "no version 9", catalog.adapters.version, "tone", 9)


@pytest.mark.parametrize("same", [False, True])
def test_concurrent_writers(url: str, same: bool) -> None:
    catalogs = [Catalog(url) for _ in range(8)]

    def write(i: int) -> int:
        return catalogs[i].adapters.register("tone", digest(7 if same else i), manifest(i), ["prod"]).version

    assert sorted(at_once(8, write)) == ([1] * 8 if same else list(range(1, 9)))
    for catalog in catalogs:
        catalog.close()


def test_one_namespace_for_bases_and_adapters(catalog: Catalog) -> None:
    publish(catalog, "tone", 1)
    catalog.bases.add("smollm2", BASE)
    catalog.bases.add("smollm2", BASE)
    refused(ConflictError, "adapter's name", catalog.bases.add, "tone", BASE)
    refused(ConflictError, "base model's name", publish, catalog, "smollm2", 1)
    refused(ConflictError, "fingerprint", catalog.bases.add, "smollm2", "0" * 64)
    refused(AdapterNotFound, "is a base model", catalog.adapters.resolve, "smollm2")
    assert catalog.snapshot().bases == {"smollm2": BASE}


def test_bad_names(catalog: Catalog) -> None:
    for name in ("", "a b", "a@b", "default/a/b", "/a", "-a", "x" * 97):
        refused(SpecError, "not a valid adapter name", publish, catalog, name, 1)


def test_bad_aliases(catalog: Catalog) -> None:
    bad = ("", "3", "3a", "a b", "a.b")
    for alias in bad:
        refused(SpecError, "not a valid alias", publish, catalog, "tone", 1, aliases=(alias,))
    assert tuple(catalog.snapshot().models()) == ()
    publish(catalog, "tone", 1)
    for alias in bad:
        refused(SpecError, "not a valid alias", catalog.aliases.move, "tone", alias, 1)


def test_resolution(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    assert catalog.adapters.resolve("tone").version == 3  # no prod: the newest
    catalog.aliases.move("tone", "prod", 2)
    catalog.aliases.move("tone", "canary", 3)
    publish(catalog, "tone", 4)
    snapshot = catalog.snapshot()
    for source in (catalog.adapters, snapshot):
        assert source.resolve("tone").version == 2
        assert source.resolve("tone@1").digest == digest(1)
        assert source.resolve("tone@canary").version == 3
        assert source.resolve("tone@4").label == "tone@4"
        for model, message in [
            ("tone@5", "has no version 5; it has 1 to 4"),
            ("tone@", "no alias ''"),
            ("tone@beta", "no alias 'beta'; its aliases: canary, prod"),
            ("tune", "did you mean 'tone'"),
            ("xyz", "no adapter 'xyz'"),
            ("tone@" + "9" * 30, "no"),
            ("tone@²", "no alias"),
        ]:
            refused(AdapterNotFound, message, source.resolve, model)


def test_snapshot_stays_and_counter_moves(catalog: Catalog, url: str) -> None:
    publish(catalog, "tone", 1)
    before = catalog.snapshot()
    assert catalog.change_counter() == before.counter
    other = Catalog(url)
    publish(other, "tone", 2)
    assert other.change_counter() > before.counter == before.counter
    other.close()
    assert before.resolve("tone").version == 1
    assert catalog.snapshot().resolve("tone").version == 2
    assert [entry.name for entry in before.models()] == ["tone"]
    assert {base: totals.num_adapters for base, totals in before.totals.items()} == {BASE: 1}


def test_connections_close_with_the_last_part_that_has_them(catalog_url: str) -> None:
    jobs = Catalog(catalog_url).view(Principal(actor="ann")).jobs  # catalog and view are gone, and the part goes on
    pool = cast("QueuePool", jobs.db.engine.pool)
    assert jobs.page(limit=1).items == ()
    assert pool.checkedin() == 1
    del jobs
    assert pool.checkedin() == 0
