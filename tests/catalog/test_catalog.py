"""Names, versions and aliases, on both databases: concurrent writers, promotion, rollback, resolution."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog
from loray.catalog.database import open_database
from loray.catalog.projections import canonical_digests
from loray.errors import AdapterNotFound, ConflictError, RevisionConflict, SpecError
from loray.spec import AdapterManifest, Projection

BASE = "ba5e" * 16


def manifest(number: int = 0) -> AdapterManifest:
    return AdapterManifest(
        method="lora",
        base="smollm2",
        base_fingerprint=BASE,
        rank=8,
        target_modules=("q_proj",),
        num_parameters=100,
        nbytes=400 + number,
        context_length=8192,
        files={"adapter_model.safetensors": digest(number)},
        created_at="2026-01-01T00:00:00+00:00",
    )


def vera_manifest(number: int, *, key: int, rank: int = 256, drawn: int | None = None) -> AdapterManifest:
    """Its pair is a function of (key, rank), unless another was `drawn`."""
    sha256 = digest(1000 * rank + key if drawn is None else drawn)
    pair = Projection(key=key, rank=rank, max_in=576, max_out=576, sha256=sha256)
    return manifest(number).model_copy(update={"method": "vera", "rank": rank, "projection": pair})


def digest(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def url(catalog_url: str) -> str:
    return catalog_url


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    catalog = Catalog(url)
    yield catalog
    catalog.close()


def publish(catalog: Catalog, name: str, *numbers: int, aliases: tuple[str, ...] = ()) -> None:
    for number in numbers:
        catalog.register(name, digest(number), manifest(number), aliases)


# -- registering ------------------------------------------------------------------------------------------------------


def test_versions_count_up(catalog: Catalog) -> None:
    first = catalog.register("tone", digest(1), manifest(1))
    assert (first.label, first.digest, first.aliases) == ("tone@1", digest(1), ())
    assert first.manifest == manifest(1)
    assert catalog.register("tone", digest(2), manifest(2), ["prod"]).aliases == ("prod",)
    assert catalog.register("other", digest(2), manifest(2)).version == 1
    assert [entry.name for entry in catalog.adapters()] == ["other", "tone"]


def test_the_first_pair_of_a_shape_is_the_bases(catalog: Catalog, caplog: pytest.LogCaptureFixture) -> None:
    manifests = [
        vera_manifest(1, key=0),
        vera_manifest(2, key=0),
        vera_manifest(3, key=7, rank=8),
        vera_manifest(4, key=7),
        vera_manifest(5, key=0, drawn=1),
    ]
    for number, vera in enumerate(manifests, start=1):
        catalog.register("tone", digest(number), vera)
    found = catalog.projections(BASE)
    assert [(p.key, p.rank) for p in found] == [(0, 256), (7, 8), (7, 256), (0, 256)]
    assert canonical_digests(found) == {found[0].sha256, found[1].sha256}
    assert catalog.projections("0" * 64) == ()
    drawn_by_another_key, drawn_otherwise = (record.getMessage() for record in caplog.records)
    assert drawn_by_another_key.startswith("tone@4: its VeRA pair has key 7, not 0")
    assert "replicas hold 0.6 MB more" in drawn_by_another_key
    assert "projection_prng_key: 0" in drawn_by_another_key
    assert drawn_otherwise.startswith(
        "tone@5: its VeRA pair is not the canonical one of this base, though its key is 0"
    )


def test_same_digest_is_the_same_version(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    again = catalog.register("tone", digest(1), manifest(1), ["canary"])
    assert (again.version, again.aliases) == (1, ("canary",))
    assert list(catalog.adapter("tone").entry.versions) == [1, 2]


def test_a_version_number_of_ones_own(catalog: Catalog) -> None:
    assert catalog.register("tone", digest(7), manifest(7), version=7).version == 7
    assert catalog.register("tone", digest(7), manifest(7), ["prod"], version=7).aliases == ("prod",)
    assert catalog.register("tone", digest(3), manifest(3), version=3).version == 3
    assert catalog.register("tone", digest(8), manifest(8)).version == 8
    with pytest.raises(ConflictError, match=r"tone@7 exists already, with other content \(digest 0000"):
        catalog.register("tone", digest(9), manifest(9), version=7)
    with pytest.raises(ConflictError, match="as version 3 already, so it cannot be 9"):
        catalog.register("tone", digest(3), manifest(3), version=9)
    with pytest.raises(SpecError, match="count from 1"):
        catalog.register("tone", digest(9), manifest(9), version=0)
    assert sorted(catalog.entry("tone").versions) == [3, 7, 8]


def test_pages_of_names(catalog: Catalog) -> None:
    catalog.add_base("smollm2", BASE)
    names = [f"{'Ab'[i % 2]}-{i}_{i}" for i in range(7)]
    for name in names:
        publish(catalog, name, 1)
    found: list[str] = []
    while page := catalog.names(limit=3, after=found[-1] if found else ""):
        found += [entry.name for entry in page]
    assert (sorted(found), len(found)) == (sorted(names), 7)
    other = manifest(2).model_copy(update={"method": "vera", "base_fingerprint": "0" * 64})
    catalog.register(names[0], digest(2), other)
    assert [e.name for e in catalog.names(limit=9, method="vera")] == names[:1]  # by the newest version
    assert names[0] not in {e.name for e in catalog.names(limit=9, base="smollm2")}
    catalog.promote(names[0], "prod", 1)
    assert catalog.names(limit=9, method="vera") == ()  # by alias prod
    assert len(catalog.names(limit=9, base="smollm2", method="lora")) == 7
    assert catalog.names(limit=9, base="nobody") == ()


def test_pages_of_versions(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    first = catalog.versions("tone", limit=2)
    assert [v.version for v in first] == [3, 2]
    assert [v.version for v in catalog.versions("tone", limit=2, before=2)] == [1]
    assert catalog.version("tone", 2) == first[1]
    with pytest.raises(AdapterNotFound, match="no version 9"):
        catalog.version("tone", 9)


@pytest.mark.parametrize("same", [False, True])
def test_concurrent_writers(url: str, same: bool) -> None:
    barrier = threading.Barrier(8)

    def write(i: int) -> int:
        catalog = Catalog(url)
        barrier.wait()
        try:
            return catalog.register("tone", digest(7 if same else i), manifest(i), ["prod"]).version
        finally:
            catalog.close()

    with ThreadPoolExecutor(8) as pool:
        versions = sorted(pool.map(write, range(8)))
    assert versions == ([1] * 8 if same else list(range(1, 9)))


def test_one_namespace_for_bases_and_adapters(catalog: Catalog) -> None:
    publish(catalog, "tone", 1)
    catalog.add_base("smollm2", BASE)
    catalog.add_base("smollm2", BASE)
    with pytest.raises(ConflictError, match="adapter's name"):
        catalog.add_base("tone", BASE)
    with pytest.raises(ConflictError, match="base model's name"):
        publish(catalog, "smollm2", 1)
    with pytest.raises(ConflictError, match="fingerprint"):
        catalog.add_base("smollm2", "0" * 64)
    with pytest.raises(AdapterNotFound, match="is a base model"):
        catalog.resolve("smollm2")
    assert catalog.snapshot().bases == {"smollm2": BASE}


@pytest.mark.parametrize("name", ["", "a b", "a@b", "a/b", "-a", "x" * 97])
def test_bad_names(catalog: Catalog, name: str) -> None:
    with pytest.raises(SpecError, match="not a valid adapter name"):
        publish(catalog, name, 1)


@pytest.mark.parametrize("alias", ["", "3", "3a", "a b", "a.b"])
def test_bad_aliases(catalog: Catalog, alias: str) -> None:
    with pytest.raises(SpecError, match="not a valid alias"):
        publish(catalog, "tone", 1, aliases=(alias,))
    assert catalog.adapters() == ()
    publish(catalog, "tone", 1)
    with pytest.raises(SpecError, match="not a valid alias"):
        catalog.promote("tone", alias, 1)


# -- resolving --------------------------------------------------------------------------------------------------------


def test_resolution(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    assert catalog.resolve("tone").version == 3  # no prod: the newest
    catalog.promote("tone", "prod", 2)
    catalog.promote("tone", "canary", 3)
    publish(catalog, "tone", 4)
    snapshot = catalog.snapshot()
    for source in (catalog, snapshot):
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
            with pytest.raises(AdapterNotFound, match=message):
                source.resolve(model)


def test_snapshot_stays_and_counter_moves(catalog: Catalog, url: str) -> None:
    publish(catalog, "tone", 1)
    before = catalog.snapshot()
    assert catalog.change_counter() == before.counter
    other = Catalog(url)
    publish(other, "tone", 2)
    assert other.change_counter() > before.counter == before.counter
    assert before.resolve("tone").version == 1
    assert catalog.snapshot().resolve("tone").version == 2
    assert [entry.name for entry in before.models(BASE)] == ["tone"]
    assert before.models("0" * 64) == ()


# -- aliases ----------------------------------------------------------------------------------------------------------


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
