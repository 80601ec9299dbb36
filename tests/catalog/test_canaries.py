"""Canaries: shares of an alias's requests, who ends them, and the gate that ends them by what gateways report."""

from __future__ import annotations

import pytest

from loray.catalog import Catalog
from loray.errors import AdapterNotFound, ConflictError, GateRefused, NotFoundError, RevisionConflict, SpecError
from loray.policy.canary import breach
from loray.spec import CanaryBounds, CanaryCounts, LogMoments, RopeParameters, VersionCounts
from tests.fixtures.figures import counts
from tests.fixtures.versions import digest, manifest, publish

HEALTHY = CanaryCounts(counts(90), counts(10))


@pytest.fixture
def tone(catalog: Catalog) -> Catalog:
    """With versions 1 to 4, of which `prod` has had 2 and 3."""
    publish(catalog, "tone", 1, 2, 3, 4)
    catalog.promote("tone", "prod", 2)
    catalog.promote("tone", "prod", 3)
    return catalog


# -- shares -----------------------------------------------------------------------------------------------------------


def test_a_canary_gets_a_share(tone: Catalog) -> None:
    before = tone.snapshot()
    started = tone.set_canary("tone", "prod", 4, 10)
    assert (started.stable, started.version, started.percent, started.bounds) == (3, 4, 10, CanaryBounds())
    assert tone.alias("tone", "prod").weights == {3: 90, 4: 10}
    after = tone.snapshot(before)
    assert after.entry("tone").weights == {"prod": {3: 90, 4: 10}}
    assert after.resolve("tone").version == 3  # the name itself means the stable version
    assert tone.entry("tone").canary(None) == tone.entry("tone").canary("prod")
    assert tone.entry("tone").canary("4") is None
    entry = tone.audit(limit=1).entries[0]
    assert (entry.action, entry.subject) == ("canary", "tone@prod")
    assert {"version": 4, "stable": 3, "percent": 10}.items() <= entry.detail.items()


def test_a_share_grows_and_bounds_stay(tone: Catalog) -> None:
    bounds = CanaryBounds(max_error_rate=0.01, min_requests=5)
    started = tone.set_canary("tone", "prod", 4, 10, bounds=bounds)
    revision = tone.alias("tone", "prod").revision
    assert tone.set_canary("tone", "prod", 4, 10) == started  # again: nothing changes
    assert tone.alias("tone", "prod").revision == revision
    grown = tone.set_canary("tone", "prod", 4, 20, expected_revision=revision)
    assert (grown.id, grown.percent, grown.bounds) == (started.id, 20, bounds)
    with pytest.raises(RevisionConflict):
        tone.set_canary("tone", "prod", 4, 30, expected_revision=revision)


def test_what_cannot_be_a_canary(tone: Catalog) -> None:
    for percent in (0, 100, -1):
        with pytest.raises(SpecError, match="1 to 99 %"):
            tone.set_canary("tone", "prod", 4, percent)
    with pytest.raises(ConflictError, match="points at version 3 already"):
        tone.set_canary("tone", "prod", 3, 10)
    with pytest.raises(AdapterNotFound, match="no version 9"):
        tone.set_canary("tone", "prod", 9, 10)
    with pytest.raises(AdapterNotFound, match="no alias 'beta'"):
        tone.set_canary("tone", "beta", 4, 10)
    with pytest.raises(SpecError, match="not a valid alias"):
        tone.set_canary("tone", "3", 4, 10)
    other = manifest(5).model_copy(update={"base_fingerprint": "0" * 64})
    tone.register("tone", digest(5), other)
    with pytest.raises(ConflictError, match="different bases"):
        tone.set_canary("tone", "prod", 5, 10)
    tone.set_canary("tone", "prod", 4, 10)
    with pytest.raises(ConflictError, match="version 4 is the canary"):
        tone.set_canary("tone", "prod", 2, 10)
    with pytest.raises(ConflictError, match="is a canary: end it first"):
        tone.delete_version("tone", 4)


def test_the_gate_of_aliases_asks_the_same_of_a_canary(tone: Catalog) -> None:
    rope = RopeParameters(rope_type="linear", factor=2.0, rope_theta=10_000.0)
    extended = manifest(5).model_copy(update={"method": "longlora", "rope_parameters": rope})
    tone.register("tone", digest(5), extended)
    with pytest.raises(GateRefused, match="have not been measured"):
        tone.set_canary("tone", "prod", 5, 10)
    tone.set_canary("tone", "prod", 5, 10, no_gate="a trial")
    assert tone.audit(limit=1).entries[0].detail["no_gate"] == "a trial"
    assert tone.set_canary("tone", "prod", 5, 5).percent == 5  # less of it needs no reason
    with pytest.raises(GateRefused, match="have not been measured"):
        tone.set_canary("tone", "prod", 5, 20)


# -- who ends it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "version", "outcome"),
    [
        (lambda c: c.end_canary("tone"), 3, "ended"),
        (lambda c: c.promote("tone", "prod", 4), 4, "promoted"),
        (lambda c: c.promote("tone", "prod", 1), 1, "moved"),
        (lambda c: c.promote("tone", "prod", 3), 3, "ended"),  # where it points already
        (lambda c: c.rollback("tone"), 3, "ended"),  # not one move further back
        (lambda c: c.register("tone", digest(9), manifest(9), ["prod"]), 5, "moved"),
    ],
    ids=["end", "promote it", "promote another", "promote the stable one", "roll back", "publish"],
)
def test_what_ends_a_canary(tone: Catalog, end: object, version: int, outcome: str) -> None:
    tone.set_canary("tone", "prod", 4, 10)
    before, revision = tone.snapshot(), tone.alias("tone", "prod").revision
    end(tone)  # type: ignore[operator]
    state = tone.alias("tone", "prod")
    assert (state.version, state.weights, state.revision > revision) == (version, {version: 100}, True)
    assert tone.snapshot(before).entry("tone").canaries == ()
    (known,) = tone.adapter("tone").canaries
    assert (known.stable, known.version, known.outcome, known.reason) == (3, 4, outcome, None)
    assert known.ended_at is not None
    with pytest.raises(NotFoundError, match="has no canary"):
        tone.end_canary("tone")


def test_an_alias_that_is_deleted_takes_its_canary_along(tone: Catalog) -> None:
    tone.set_canary("tone", "prod", 4, 10)
    tone.delete_alias("tone", "prod")
    assert tone.entry("tone").canaries == ()
    assert tone.canary("tone").outcome == "ended"
    tone.promote("tone", "prod", 3)
    assert tone.alias("tone", "prod").weights == {3: 100}


# -- what gateways report ---------------------------------------------------------------------------------------------


def test_reports_of_gateways_add_up_and_count_once(tone: Catalog) -> None:
    canary = tone.set_canary("tone", "prod", 4, 10)
    counter = tone.change_counter()
    for _ in range(2):
        assert tone.report_canaries("a", {canary.id: HEALTHY}) == (frozenset(), ())
    tone.report_canaries("b", {canary.id: HEALTHY})
    found = tone.canary("tone").counts
    assert (found.stable.num_requests, found.canary.num_requests) == (180, 20)
    assert found.canary.ttft.mean == pytest.approx(0.1)
    assert tone.change_counter() == counter  # no snapshot is made for counts


def test_a_canary_that_leaves_its_bounds_is_ended_for_all(tone: Catalog) -> None:
    canary = tone.set_canary("tone", "prod", 4, 10)
    before = tone.snapshot()
    failing = CanaryCounts(counts(90), counts(10, errors=2))
    assert tone.report_canaries("a", {canary.id: failing}).ended == ()  # 2 of 50 may fail
    over, (ended,) = tone.report_canaries("b", {canary.id: failing})
    assert over == {canary.id}
    assert (ended.label, ended.model, ended.bound) == ("tone@4", "tone@prod", "error_rate")
    assert ended.reason.startswith("4 of 20 requests failed; of 50 or more 5.0% may")
    assert tone.snapshot(before).entry("tone").canaries == ()
    assert tone.alias("tone", "prod").weights == {3: 100}
    known = tone.canary("tone")
    assert (known.outcome, known.reason, known.counts.canary.num_errors) == ("rolled_back", ended.reason, 4)
    entry = tone.audit(limit=1).entries[0]
    assert (entry.action, entry.detail["reason"]) == ("rollback_canary", ended.reason)
    assert tone.report_canaries("a", {canary.id: failing}) == ({canary.id}, ())  # the other gateway hears of it
    again = tone.set_canary("tone", "prod", 4, 10)
    assert again.id != canary.id
    assert again.counts == CanaryCounts()


@pytest.mark.parametrize(
    ("stable", "canary", "bound"),
    [
        (counts(900), counts(100), None),
        (counts(900), counts(100, errors=5), None),
        (counts(900), counts(100, errors=6), "error_rate"),
        (counts(0), counts(3, errors=3), "error_rate"),  # whatever the next 47 do
        (counts(900), counts(2, errors=2), None),
        (counts(900), counts(100, ttft=0.19), None),
        (counts(900), counts(100, ttft=0.22), "ttft"),
        (counts(900), counts(49, ttft=9.0), None),  # too few
        (counts(49), counts(100, ttft=9.0), None),
        (counts(900), counts(100, itl=0.05), "itl"),
    ],
)
def test_bounds(stable: VersionCounts, canary: VersionCounts, bound: str | None) -> None:
    found = breach(CanaryBounds(), CanaryCounts(stable, canary))
    assert (None if found is None else found.bound) == bound


def test_a_difference_that_chance_explains_ends_nothing() -> None:
    wide = LogMoments()
    for i in range(60):
        wide = wide.plus(0.22 * (8 if i % 2 else 1 / 8))
    assert wide.mean == pytest.approx(0.22)
    found = CanaryCounts(counts(900), VersionCounts(60, 0, wide, LogMoments()))
    assert breach(CanaryBounds(), found) is None


def test_bounds_can_be_off() -> None:
    off = CanaryBounds(max_error_rate=None, max_ttft_ratio=None, max_itl_ratio=None)
    assert breach(off, CanaryCounts(counts(100), counts(100, errors=50, ttft=9.0, itl=9.0))) is None
