"""Aliases: promoted, rolled back, deleted; revisions that never come twice; the gate before them, and canaries."""

from __future__ import annotations

from typing import Any

import pytest

from loray.catalog import Catalog
from loray.catalog.aliases import failures
from loray.errors import AdapterNotFound, ConflictError, GateRefused, NotFoundError, RevisionConflict, SpecError
from loray.spec import AdapterManifest, CanaryBounds, CanaryCounts, Evaluation, RopeParameters
from tests.fixtures.calls import at_once, refused
from tests.fixtures.figures import GOOD, NATIVE, OWN, counts, figures
from tests.fixtures.versions import digest, manifest, publish


def test_promote_and_roll_back(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, 3)
    for version in (1, 2, 3):
        assert catalog.aliases.move("tone", "prod", version).version == version
    assert catalog.aliases.move("tone", "prod", 3) == catalog.aliases.get("tone", "prod")  # again: no move
    assert [catalog.aliases.rollback("tone", "prod").version for _ in range(2)] == [2, 1]
    assert catalog.adapters.resolve("tone").version == 1
    refused(ConflictError, "no earlier target than version 1", catalog.aliases.rollback, "tone", "prod")
    catalog.aliases.move("tone", "prod", 3)
    assert catalog.aliases.rollback("tone").version == 1
    moves = catalog.aliases.moves("tone")
    assert [(m.version, m.undone) for m in moves] == [(1, False), (2, True), (3, True), (3, True)]


def test_aliases_have_histories_of_their_own(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, aliases=("prod", "canary"))
    publish(catalog, "other", 1, aliases=("prod",))
    catalog.aliases.rollback("tone", "canary")
    assert catalog.adapters.get("tone").aliases == {"prod": 2, "canary": 1}
    refused(ConflictError, "no earlier target", catalog.aliases.rollback, "other", "prod")
    refused(AdapterNotFound, "no alias 'beta'", catalog.aliases.rollback, "tone", "beta")
    refused(AdapterNotFound, "no adapter", catalog.aliases.rollback, "nothing", "prod")


def test_promotion_can_expect(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    refused(ConflictError, "is not set", catalog.aliases.move, "tone", "prod", 1, expected=2)
    catalog.aliases.move("tone", "prod", 1, expected=0)
    refused(ConflictError, "points at version 1", catalog.aliases.move, "tone", "prod", 2, expected=0)
    assert catalog.aliases.move("tone", "prod", 2, expected=1).version == 2
    refused(AdapterNotFound, "no version 9", catalog.aliases.move, "tone", "prod", 9)


def test_revisions_never_come_twice(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2)
    publish(catalog, "other", 1, aliases=("prod",))
    seen = []

    def note() -> int:
        state = catalog.aliases.get("tone", "prod")
        seen.append(state.revision)
        return state.version

    catalog.aliases.move("tone", "prod", 1, expected_revision=0)
    assert note() == 1
    catalog.aliases.move("tone", "prod", 1)
    assert catalog.aliases.get("tone", "prod").revision == seen[-1]  # it did not move
    catalog.aliases.move("tone", "prod", 2, expected_revision=seen[-1])
    assert note() == 2
    catalog.aliases.rollback("tone", expected_revision=seen[-1])
    assert note() == 1  # the version is what it was at first, the revision is not
    for write in (
        lambda: catalog.aliases.move("tone", "prod", 2, expected_revision=seen[0]),
        lambda: catalog.aliases.move("tone", "prod", 2, expected_revision=0),
        lambda: catalog.aliases.rollback("tone", expected_revision=seen[0]),
        lambda: catalog.aliases.delete("tone", "prod", expected_revision=seen[0]),
    ):
        refused(RevisionConflict, f"at version 1 with revision {seen[-1]}, not", write)
    catalog.aliases.delete("tone", "prod", expected_revision=seen[-1])
    with pytest.raises(RevisionConflict, match="is not set with revision 0, not revision"):
        catalog.aliases.move("tone", "prod", 2, expected_revision=seen[-1])
    catalog.aliases.move("tone", "prod", 1, expected_revision=0)
    assert note() == 1
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)


def test_a_deleted_alias_takes_its_earlier_targets_along(catalog: Catalog) -> None:
    publish(catalog, "tone", 1, 2, aliases=("prod", "canary"))
    catalog.aliases.delete("tone", "prod")
    assert catalog.adapters.resolve("tone@canary").version == 2
    refused(AdapterNotFound, "no alias 'prod'; its aliases: canary", catalog.aliases.get, "tone", "prod")
    refused(AdapterNotFound, "no alias 'prod'", catalog.aliases.delete, "tone", "prod")
    catalog.aliases.move("tone", "prod", 1)
    refused(ConflictError, "no earlier target", catalog.aliases.rollback, "tone", "prod")
    assert [(s.alias, s.version, s.digest) for s in catalog.aliases.of("tone")] == [
        ("canary", 2, digest(2)),
        ("prod", 1, digest(1)),
    ]


def test_one_of_many_promotions_wins(catalog: Catalog, url: str) -> None:
    publish(catalog, "tone", *range(1, 9))
    catalog.aliases.move("tone", "prod", 1)
    expected: list[dict[str, Any]] = [
        {"expected": 1},
        {"expected_revision": catalog.aliases.get("tone", "prod").revision},
    ]
    catalogs = [Catalog(url) for _ in range(7)]

    def promote(i: int) -> bool:
        try:
            catalogs[i].aliases.move("tone", "prod", i + 2, **expected[i % 2])
        except ConflictError:
            return False
        finally:
            catalogs[i].close()
        return True

    assert sum(at_once(7, promote)) == 1


def longlora(number: int = 0, evaluations: tuple[Evaluation, ...] = (), **fields: Any) -> AdapterManifest:
    rope = RopeParameters(rope_type="linear", rope_theta=1e5, factor=2)
    described: dict[str, Any] = {"method": "longlora", "context_length": OWN, "original_context_length": NATIVE}
    return manifest(number).model_copy(
        update=described | {"rope_parameters": rope, "evaluations": evaluations} | fields
    )


# -- the policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({("adapter", OWN): 9.999}, []),
        ({("adapter", OWN): 10.0}, ["its own context of 2,048 tokens its perplexity 10 is not below 10 of the base ("]),
        ({("base_scaled", OWN): 8.5}, ["is not below 8.5 of the base under its RoPE (docs, 16 windows)"]),
        ({("adapter", OWN): 13.0}, ["not below 10 of the base (", "not below 12 of the base under its RoPE"]),
        ({("adapter", NATIVE): 11.0}, []),
        (
            {("adapter", NATIVE): 11.5},
            ["native context of 1,024 tokens its perplexity 11.5 is 15.0% above 10 of the base (docs, 16 windows); 1"],
        ),
        ({("adapter", OWN): 11.0, ("adapter", NATIVE): 20.0}, ["not below 10 of the base (", "100.0% above"]),
    ],
)
def test_figures(values: dict[tuple[Any, int], float], said: list[str]) -> None:
    found = failures(longlora(), figures(GOOD | values), 0.1)
    assert len(found) == len(said)
    for sentence, part in zip(found, said, strict=True):
        assert part in sentence


@pytest.mark.parametrize(("missing", "context"), [(key, "own" if key[1] == OWN else "native") for key in GOOD])
def test_a_missing_figure_is_named(missing: tuple[str, int], context: str) -> None:
    (sentence,) = failures(longlora(), figures({k: v for k, v in GOOD.items() if k != missing}), 0.1)
    assert context in sentence
    assert "have not been measured on the same data" in sentence


def test_only_figures_of_the_same_data_are_compared() -> None:
    bases = figures({k: v for k, v in GOOD.items() if k[0] != "adapter"})
    adapter = {k: v for k, v in GOOD.items() if k[0] == "adapter"}
    for other in ({"data_sha256": "e" * 64}, {"stride": 128}, {"count": 8}, {"dataset": "others"}, {"metric": "loss"}):
        assert len(failures(longlora(), bases + figures(adapter, **other), 0.1)) == 2, other
    assert failures(longlora(), bases + figures(adapter), 0.1) == ()


def test_the_latest_complete_data_counts() -> None:
    good, bad = figures(GOOD), figures(GOOD | {("adapter", OWN): 20.0}, data_sha256="e" * 64)
    assert failures(longlora(), good + bad, 0.1)
    assert not failures(longlora(), bad + good, 0.1)
    assert not failures(longlora(), good + bad + good, 0.1)
    partly = figures({("adapter", OWN): 20.0}, data_sha256="f" * 64)
    assert not failures(longlora(), bad + good + partly, 0.1)
    assert failures(longlora(), good + figures({("adapter", OWN): 20.0}), 0.1)  # measured again on the same


def test_a_longer_context_is_gated_whatever_the_method() -> None:
    assert failures(manifest(), (), 0.1) == ()
    assert failures(longlora(rope_parameters=None, original_context_length=None), (), 0.1) == ()
    for method in ("lora", "vera"):
        assert len(failures(longlora(method=method), (), 0.1)) == 2


def test_without_a_native_context_there_is_nothing_to_compare_at() -> None:
    (sentence,) = failures(longlora(original_context_length=None), figures(GOOD), 0.1)
    assert "does not say which context was extended" in sentence


# -- in the catalog ---------------------------------------------------------------------------------------------------


def test_a_refused_registration_leaves_nothing(catalog: Catalog) -> None:
    before = catalog.snapshot()
    with pytest.raises(GateRefused) as e:
        catalog.adapters.register("long", digest(1), longlora(1), ["canary", "prod"])
    for part in (
        "alias 'canary' is refused to long@1: at its own context of 2,048 tokens",
        "at the native context of 1,024 tokens",
        "`loray eval perplexity long@1 --compare --data FILE`",
        "nothing was registered: do that without an alias first",
    ):
        assert part in str(e.value)
    assert catalog.snapshot() == before
    assert isinstance(e.value, ConflictError)


def test_measured_later_and_promoted(catalog: Catalog) -> None:
    catalog.adapters.register("long", digest(1), longlora(1, figures({("base", OWN): 10.0})))
    counter = catalog.change_counter()
    refused(GateRefused, "", catalog.aliases.move, "long", "prod", 1)
    catalog.evaluations.record(digest(1), figures(GOOD))
    assert catalog.aliases.move("long", "prod", 1).version == 1
    version = catalog.adapters.version("long", 1)
    assert version.evaluations == figures({("base", OWN): 10.0}) + figures(GOOD)
    assert catalog.change_counter() == counter + 1  # of the promotion: evaluations are no news to serving


def test_an_adapter_of_several_names_is_measured_once(catalog: Catalog) -> None:
    catalog.adapters.register("long", digest(1), longlora(1))
    catalog.adapters.register("copy", digest(1), longlora(1))
    catalog.evaluations.record(digest(1), figures(GOOD))
    assert catalog.aliases.move("copy", "prod", 1).version == 1
    refused(AdapterNotFound, "no adapter has digest 000000000000", catalog.evaluations.record, digest(2), figures(GOOD))


def test_every_field_of_an_evaluation_comes_back(catalog: Catalog) -> None:
    catalog.adapters.register("tone", digest(1), manifest(1))
    measured = [
        Evaluation(
            metric="passkey_exact_match", value=0.75, dataset="passkey, seed 0", context_length=1024, depth=0.25
        ),
        Evaluation(metric="loss", value=1 / 3, dataset="held-out", subject="base_scaled"),
        *figures({("adapter", OWN): 7.123456789012345}),
    ]
    catalog.evaluations.record(digest(1), measured[:1])
    catalog.evaluations.record(digest(1), measured[1:])
    catalog.evaluations.record(digest(1), [])
    assert list(catalog.adapters.version("tone", 1).evaluations) == measured


def test_an_override_is_recorded_with_its_reason(catalog: Catalog, url: str) -> None:
    catalog.adapters.register("long", digest(1), longlora(1), ["prod"], no_gate="a quick run")
    catalog.adapters.register("long", digest(2), longlora(2, figures(GOOD)), ["prod"], no_gate="not needed")
    assert catalog.aliases.rollback("long").version == 1  # it had the alias already: no gate
    catalog.aliases.move("long", "prod", 1)  # nothing moves
    moves = catalog.aliases.moves("long")
    assert [(m.version, m.no_gate, m.undone) for m in moves] == [(1, "a quick run", False), (2, None, True)]
    second, first = (entry.detail for entry in catalog.audit.page(action="promote").items)
    assert (first["no_gate"], "no_gate" in second) == ("a quick run", False)
    assert "have not been measured" in repr(first)


def test_the_share_is_a_setting(catalog: Catalog, url: str) -> None:
    catalog.adapters.register("long", digest(1), longlora(1, figures(GOOD)))
    strict = Catalog(url, gate_tolerance=0.05)
    refused(GateRefused, r"is 9\.0% above 10 of the base .*; 5% is allowed", strict.aliases.move, "long", "prod", 1)
    strict.close()
    assert catalog.aliases.move("long", "prod", 1).version == 1


HEALTHY = CanaryCounts(counts(90), counts(10))


@pytest.fixture
def tone(catalog: Catalog) -> Catalog:
    """With versions 1 to 4, of which `prod` has had 2 and 3."""
    publish(catalog, "tone", 1, 2, 3, 4)
    catalog.aliases.move("tone", "prod", 2)
    catalog.aliases.move("tone", "prod", 3)
    return catalog


# -- shares -----------------------------------------------------------------------------------------------------------


def test_a_canary_gets_a_share(tone: Catalog) -> None:
    before = tone.snapshot()
    started = tone.canaries.set("tone", "prod", 4, 10)
    assert (started.stable, started.version, started.percent, started.bounds) == (3, 4, 10, CanaryBounds())
    assert tone.aliases.get("tone", "prod").weights == {3: 90, 4: 10}
    after = tone.snapshot(before)
    assert after.entry("tone").weights == {"prod": {3: 90, 4: 10}}
    assert after.resolve("tone").version == 3  # the name itself means the stable version
    assert tone.adapters.get("tone").canary(None) == tone.adapters.get("tone").canary("prod")
    assert tone.adapters.get("tone").canary("4") is None
    entry = tone.audit.page(limit=1).items[0]
    assert (entry.action, entry.subject) == ("canary", "tone@prod")
    assert {"version": 4, "stable": 3, "percent": 10}.items() <= entry.detail.items()


def test_a_share_grows_and_bounds_stay(tone: Catalog) -> None:
    bounds = CanaryBounds(max_error_rate=0.01, min_requests=5)
    started = tone.canaries.set("tone", "prod", 4, 10, bounds=bounds)
    revision = tone.aliases.get("tone", "prod").revision
    assert tone.canaries.set("tone", "prod", 4, 10) == started  # again: nothing changes
    assert tone.aliases.get("tone", "prod").revision == revision
    grown = tone.canaries.set("tone", "prod", 4, 20, expected_revision=revision)
    assert (grown.id, grown.percent, grown.bounds) == (started.id, 20, bounds)
    refused(RevisionConflict, "", tone.canaries.set, "tone", "prod", 4, 30, expected_revision=revision)


def test_what_cannot_be_a_canary(tone: Catalog) -> None:
    for percent in (0, 100, -1):
        refused(SpecError, "1 to 99 %", tone.canaries.set, "tone", "prod", 4, percent)
    refused(ConflictError, "points at version 3 already", tone.canaries.set, "tone", "prod", 3, 10)
    refused(AdapterNotFound, "no version 9", tone.canaries.set, "tone", "prod", 9, 10)
    refused(AdapterNotFound, "no alias 'beta'", tone.canaries.set, "tone", "beta", 4, 10)
    refused(SpecError, "not a valid alias", tone.canaries.set, "tone", "3", 4, 10)
    other = manifest(5).model_copy(update={"base_fingerprint": "0" * 64})
    tone.adapters.register("tone", digest(5), other)
    refused(ConflictError, "different bases", tone.canaries.set, "tone", "prod", 5, 10)
    tone.canaries.set("tone", "prod", 4, 10)
    refused(ConflictError, "version 4 is the canary", tone.canaries.set, "tone", "prod", 2, 10)
    refused(ConflictError, "is a canary: end it first", tone.removal.delete_version, "tone", 4)


def test_the_gate_of_aliases_asks_the_same_of_a_canary(tone: Catalog) -> None:
    rope = RopeParameters(rope_type="linear", factor=2.0, rope_theta=10_000.0)
    extended = manifest(5).model_copy(update={"method": "longlora", "rope_parameters": rope})
    tone.adapters.register("tone", digest(5), extended)
    refused(GateRefused, "have not been measured", tone.canaries.set, "tone", "prod", 5, 10)
    tone.canaries.set("tone", "prod", 5, 10, no_gate="a trial")
    assert tone.audit.page(limit=1).items[0].detail["no_gate"] == "a trial"
    assert tone.canaries.set("tone", "prod", 5, 5).percent == 5  # less of it needs no reason
    refused(GateRefused, "have not been measured", tone.canaries.set, "tone", "prod", 5, 20)


# -- who ends it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "version", "outcome"),
    [
        (lambda c: c.canaries.end("tone"), 3, "ended"),
        (lambda c: c.aliases.move("tone", "prod", 4), 4, "promoted"),
        (lambda c: c.aliases.move("tone", "prod", 1), 1, "moved"),
        (lambda c: c.aliases.move("tone", "prod", 3), 3, "ended"),  # where it points already
        (lambda c: c.aliases.rollback("tone"), 3, "ended"),  # not one move further back
        (lambda c: c.adapters.register("tone", digest(9), manifest(9), ["prod"]), 5, "moved"),
    ],
    ids=["end", "promote it", "promote another", "promote the stable one", "roll back", "publish"],
)
def test_what_ends_a_canary(tone: Catalog, end: object, version: int, outcome: str) -> None:
    tone.canaries.set("tone", "prod", 4, 10)
    before, revision = tone.snapshot(), tone.aliases.get("tone", "prod").revision
    end(tone)  # type: ignore[operator]
    state = tone.aliases.get("tone", "prod")
    assert (state.version, state.weights, state.revision > revision) == (version, {version: 100}, True)
    assert tone.snapshot(before).entry("tone").canaries == ()
    (known,) = tone.canaries.of("tone")
    assert (known.stable, known.version, known.outcome, known.reason) == (3, 4, outcome, None)
    assert known.ended_at is not None
    refused(NotFoundError, "has no canary", tone.canaries.end, "tone")


def test_an_alias_that_is_deleted_takes_its_canary_along(tone: Catalog) -> None:
    tone.canaries.set("tone", "prod", 4, 10)
    tone.aliases.delete("tone", "prod")
    assert tone.adapters.get("tone").canaries == ()
    assert tone.canaries.get("tone").outcome == "ended"
    tone.aliases.move("tone", "prod", 3)
    assert tone.aliases.get("tone", "prod").weights == {3: 100}


# -- what gateways report ---------------------------------------------------------------------------------------------


def test_reports_of_gateways_add_up_and_count_once(tone: Catalog) -> None:
    canary = tone.canaries.set("tone", "prod", 4, 10)
    counter = tone.change_counter()
    for _ in range(2):
        assert tone.canaries.report("a", {canary.id: HEALTHY}) == (frozenset(), ())
    tone.canaries.report("b", {canary.id: HEALTHY})
    found = tone.canaries.get("tone").counts
    assert (found.stable.num_requests, found.canary.num_requests) == (180, 20)
    assert found.canary.ttft.mean == pytest.approx(0.1)
    assert tone.change_counter() == counter  # no snapshot is made for counts


def test_a_canary_that_leaves_its_bounds_is_ended_for_all(tone: Catalog) -> None:
    canary = tone.canaries.set("tone", "prod", 4, 10)
    before = tone.snapshot()
    failing = CanaryCounts(counts(90), counts(10, errors=2))
    assert tone.canaries.report("a", {canary.id: failing}).ended == ()  # 2 of 50 may fail
    over, (ended,) = tone.canaries.report("b", {canary.id: failing})
    assert over == {canary.id}
    assert (ended.label, ended.model, ended.bound) == ("tone@4", "tone@prod", "error_rate")
    assert ended.reason.startswith("4 of 20 requests failed; of 50 or more 5.0% may")
    assert tone.snapshot(before).entry("tone").canaries == ()
    assert tone.aliases.get("tone", "prod").weights == {3: 100}
    known = tone.canaries.get("tone")
    assert (known.outcome, known.reason, known.counts.canary.num_errors) == ("rolled_back", ended.reason, 4)
    entry = tone.audit.page(limit=1).items[0]
    assert (entry.action, entry.detail["reason"]) == ("rollback_canary", ended.reason)
    assert tone.canaries.report("a", {canary.id: failing}) == ({canary.id}, ())  # the other gateway hears of it
    again = tone.canaries.set("tone", "prod", 4, 10)
    assert again.id != canary.id
    assert again.counts == CanaryCounts()
